"""How sure an accuracy is."""

import math

# Of the normal distribution, for 95 %.
Z = 1.959963984540054


def interval(share: float, count: int) -> tuple[float, float]:
  """Returns the 95 % interval of a share of `count` images (Wilson 1927).

  It covers the choice of the images alone; another seed may differ by more.
  """
  middle = share + Z**2 / (2 * count)
  width = Z * math.sqrt(
      share * (1 - share) / count + Z**2 / (4 * count**2)
  )
  scale = 1 + Z**2 / count
  # Rounding must not take an end of 0 or 1 beyond it.
  low, high = (middle - width) / scale, (middle + width) / scale
  return max(0.0, min(low, share)), min(1.0, max(high, share))
