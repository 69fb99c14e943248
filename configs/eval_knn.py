"""kNN classification of a checkpoint's features (paper, appendix A).

The protocol of Wu et al. 2018 (arXiv 1805.01978), which the paper refers to:
cosine similarity, k = 200, votes weighted by exp(similarity / 0.07), backbone
features of the online network, whole images. The paper does not say which k,
temperature or encoder it used: `knn.more_k`, `knn.more_temperatures` and
`encoder` try others. With `knn.leave_one_out`, all images of both splits are
classified, each by all others.

Command:
  python -m mocov3_jax.evaluate --config=configs/eval_knn.py \\
      --config.checkpoint=RUN --workdir=OUT
Hardware and time: one CPU core, seconds, for digits.
Expected: the last knn/top1 that the run itself logged, if the run has the same
  k, at most 50,000 training images and at most 10,000 test images: its monitor
  uses no more (knn.bank_images, knn.query_images).
"""

from mocov3_jax.config import eval_config


def get_config():
  return eval_config()
