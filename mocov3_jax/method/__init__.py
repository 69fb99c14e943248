"""The paper's method: the training step and what it is built from."""
