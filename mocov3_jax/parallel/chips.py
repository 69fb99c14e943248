"""Published figures of accelerators."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip's published figures (cloud.google.com/tpu/docs).

  Attributes:
    flops: peak bfloat16 operations per second.
    memory: HBM, bytes.
    bandwidth: HBM bandwidth, bytes per second.
    clock: clock of a core, Hz: the peak divided by the operations of its matrix
      units per cycle (v6e: a calibrated value, since its units are 256 wide).
    interconnect: bandwidth of all links of a chip together, one way, bytes per
      second.
    dimensions: number of dimensions of the torus of chips.
    host: arrangement of the chips of one host, in the compiler's notation.
    config: the compiler's name for a chip that is one device.
  """

  flops: float
  memory: int
  bandwidth: float
  clock: float
  interconnect: float
  dimensions: int
  host: tuple[int, int, int] = (2, 2, 1)
  config: str = 'default'


GIB = 2**30
CHIPS = {
    'v4': Chip(
        275e12, 32 * GIB, 1228e9, 275e12 / (2 * 128**2 * 8), 2400e9 / 8, 3,
        config='megacore',
    ),
    'v5e': Chip(197e12, 16 * GIB, 819e9, 197e12 / (2 * 128**2 * 4),
                1600e9 / 8, 2),
    'v5p': Chip(459e12, 95 * GIB, 2765e9, 459e12 / (2 * 128**2 * 8),
                4800e9 / 8, 3),
    'v6e': Chip(918e12, 32 * GIB, 1640e9, 918e12 / (2 * 256**2 * 4),
                3584e9 / 8, 2),
}

# JAX's names for these chips.
DEVICE_KINDS = {
    'v4': ('TPU v4',),
    'v5e': ('TPU v5 lite', 'TPU v5e'),
    'v5p': ('TPU v5', 'TPU v5p'),
    'v6e': ('TPU v6 lite', 'TPU v6e'),
}

# Peak dense bfloat16 operations per second of one device, by JAX's name for it,
# from the makers' data sheets (float16 on the T4 and V100, which have no
# bfloat16).
PEAK_FLOPS = {
    **{
        kind: CHIPS[name].flops
        for name, kinds in DEVICE_KINDS.items() for kind in kinds
    },
    'NVIDIA A100-PCIE-40GB': 312e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA A100 80GB PCIe': 312e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA H200': 989e12,
    'NVIDIA L4': 121e12,
    'NVIDIA L40S': 362e12,
    'NVIDIA GeForce RTX 4090': 165e12,
    'Tesla T4': 65e12,
    'Tesla V100-SXM2-16GB': 125e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Returns the peak of a `jax.Device.device_kind`; None if it is unknown."""
  return PEAK_FLOPS[device_kind] if device_kind in PEAK_FLOPS else None
