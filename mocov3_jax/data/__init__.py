"""Reads the images of a source, crops them, and makes batches."""
