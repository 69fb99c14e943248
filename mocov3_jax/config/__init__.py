"""Every knob of a run, its checks, and the command line."""

from mocov3_jax.config.evaluation import eval_config
from mocov3_jax.config.training import default_config

__all__ = ['default_config', 'eval_config']
