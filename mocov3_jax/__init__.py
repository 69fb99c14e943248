"""MoCo v3 self-supervised pre-training of vision transformers in JAX."""

__version__ = '0.2.0.dev0'
