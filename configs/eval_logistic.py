"""Logistic regression on the features of whole images: a quick linear probe.

This is not a protocol of the paper. Features are computed once, without
augmentation, standardised, and classified by scikit-learn's L-BFGS. The penalty
is chosen on a tenth of the training images. The accuracy is usually within a
point or two of the linear probe's, in a fraction of its time.

Command:
  python -m mocov3_jax.evaluate --config=configs/eval_logistic.py \\
      --config.checkpoint=RUN --workdir=OUT
Hardware and time: CPU; seconds for digits, and as long as scikit-learn takes.
Expected: see docs/evaluation.md for the digits' smoke run.
"""

from mocov3_jax.config import eval_config


def get_config():
  c = eval_config()
  c.protocol = 'logistic'
  return c
