"""Benchmarks of the input pipeline and the training step."""
