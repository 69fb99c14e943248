"""Reading the collectives of compiled programs."""

from jax.experimental.shard_map import shard_map  # noqa: F401

