"""Times several functions side by side."""

from collections.abc import Callable
import statistics
import time


def take_turns(
    contenders: dict[str, Callable[[], int]], rounds: int
) -> dict[str, float]:
  """Runs each contender once to warm up, then all of them in turn.

  Args:
    contenders: functions that return how many images they handled.
    rounds: turns of each.

  Returns:
    For each, the median of its images per second.
  """
  rates = {name: [] for name in contenders}
  for turn in range(rounds + 1):
    for name, run in contenders.items():
      start = time.perf_counter()
      images = run()
      if turn:
        rates[name].append(images / (time.perf_counter() - start))
  return {name: statistics.median(values) for name, values in rates.items()}
