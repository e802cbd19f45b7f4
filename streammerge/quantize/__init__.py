"""The calibrated second stage: quantize one decoder layer at a time."""
