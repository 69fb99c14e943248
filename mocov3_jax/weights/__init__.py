"""Weights of other projects, in both directions."""
