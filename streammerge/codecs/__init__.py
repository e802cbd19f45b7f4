"""Stored formats of weights: which tensors hold one, where its rows are, how they are decoded."""
