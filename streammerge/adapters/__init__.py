"""Adapter folders: configuration, key grammar, factors."""
