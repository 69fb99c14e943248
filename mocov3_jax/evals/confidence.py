"""Confidence intervals of accuracies."""

import math

# The 97.5 % quantile of the standard normal distribution.
Z = 1.959963984540054


def interval(share: float, count: int) -> tuple[float, float]:
  """Returns the 95 % confidence interval of an accuracy (Wilson 1927).

  It accounts only for the choice of the images. The results of different seeds
  may differ by more.

  Args:
    share: the accuracy, from 0 to 1.
    count: the number of images.
  """
  middle = share + Z**2 / (2 * count)
  width = Z * math.sqrt(
      share * (1 - share) / count + Z**2 / (4 * count**2)
  )
  scale = 1 + Z**2 / count
  # Rounding must not move an end beyond 0 or 1.
  low, high = (middle - width) / scale, (middle + width) / scale
  return max(0.0, min(low, share)), min(1.0, max(high, share))
