"""The paper's method: the training step and its parts."""
