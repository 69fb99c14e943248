"""Published peaks of accelerators, for the share of them that a step uses."""

from mocov3_jax.tools import tpu

# Dense bfloat16 operations per second (float16 on the T4 and V100, which have
# no other) of one device as JAX names it: the makers' data sheets.
PEAK_FLOPS = {
    'TPU v4': tpu.CHIPS['v4'].flops,
    'TPU v5 lite': tpu.CHIPS['v5e'].flops,
    'TPU v5e': tpu.CHIPS['v5e'].flops,
    'TPU v5': tpu.CHIPS['v5p'].flops,
    'TPU v5p': tpu.CHIPS['v5p'].flops,
    'TPU v6 lite': tpu.CHIPS['v6e'].flops,
    'TPU v6e': tpu.CHIPS['v6e'].flops,
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
  """The peak of `jax.Device.device_kind`; None if it is not in the table."""
  return PEAK_FLOPS[device_kind] if device_kind in PEAK_FLOPS else None
