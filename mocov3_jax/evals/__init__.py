"""Evaluators: callables from a TrainState to a dict of numbers."""
