"""Devices that merge tiles."""
