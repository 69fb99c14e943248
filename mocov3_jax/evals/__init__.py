"""Evaluators: callables from a network's variables to numbers."""
