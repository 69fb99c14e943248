"""Maps of features: which lie near which, as points of the plane."""

import contextlib
import io
from typing import Any
import warnings

import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.models.layers import unit

# The ways into the plane, as a picture calls them.
METHODS = {'pca': 'PCA', 'tsne': 't-SNE', 'umap': 'UMAP'}
# As few points as all of them can place.
FEWEST = 4
SEED = 0


def plane(
    features: np.ndarray, method: str
) -> tuple[np.ndarray, tuple[str, str], dict[str, float]]:
  """Places features in the plane; the same ones always alike.

  Args:
    features: float32 [N, D], FEWEST or more; scaled to unit length here.
    method: one of METHODS.

  Returns:
    Points float [N, 2]; the names of the axes; numbers that tell how well they
    fit: with PCA 'explained_variance', the share of the variance in the plane,
    with t-SNE 'kl_divergence', what is left of it.

  Raises:
    UserError: for UMAP without the package umap-learn.
  """
  # Here, since it would double the time that the command takes to start.
  from sklearn.decomposition import PCA
  from sklearn.manifold import TSNE

  _count_cores()
  features = np.asarray(unit(features))
  if method == 'pca':
    pca = PCA(2, random_state=SEED)
    points = pca.fit_transform(features)
    shares = pca.explained_variance_ratio_.tolist()
    first, second = (
        f'component {i}: {share:.1%} of the variance'
        for i, share in enumerate(shares, start=1)
    )
    return points, (first, second), {'explained_variance': sum(shares)}
  axes = (f'{METHODS[method]} 1', f'{METHODS[method]} 2')
  if method == 'tsne':
    # 30 is scikit-learn's default; few points have no so many neighbours.
    perplexity = min(30, (len(features) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init='pca', random_state=SEED)
    points = tsne.fit_transform(features)
    return points, axes, {'kl_divergence': float(tsne.kl_divergence_)}
  # 15 is umap's default. With a seed it computes in one thread, and warns
  # unless it is told so. Its spectral start needs more than a few points.
  umap = import_umap().UMAP(
      n_neighbors=min(15, len(features) - 1), random_state=SEED, n_jobs=1,
      init='spectral' if len(features) > 15 else 'random',
  )
  return umap.fit_transform(features), axes, {}


def _count_cores() -> None:
  # joblib asks a program, and complains at length where there is none; but only
  # the first time.
  import joblib

  with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter('ignore')
    joblib.cpu_count(only_physical_cores=True)


def import_umap() -> Any:
  """Imports the package umap-learn.

  Raises:
    UserError: if it is not installed.
  """
  try:
    import umap
  except ImportError as e:
    raise UserError(
        "--method='umap' needs the package umap-learn, which is not installed. "
        'Try pip install umap-learn; or --method=pca or --method=tsne.'
    ) from e
  return umap
