"""Projects features into the plane, to show which of them are close."""

import contextlib
import io
from typing import Any
import warnings

import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.models.layers import unit

# The projection methods, and their names in a picture.
METHODS = {'pca': 'PCA', 'tsne': 't-SNE', 'umap': 'UMAP'}
# The fewest points that all methods can place.
FEWEST = 4
SEED = 0


def plane(
    features: np.ndarray, method: str
) -> tuple[np.ndarray, tuple[str, str], dict[str, float]]:
  """Projects features into the plane, deterministically.

  Args:
    features: float32 [N, D], with N at least FEWEST; scaled to unit length
      here.
    method: one of METHODS.

  Returns:
    Points float [N, 2]; the names of the axes; and numbers that show how well
    the points fit the features. With PCA, that is 'explained_variance', the
    share of the variance in the plane. With t-SNE, it is 'kl_divergence', the
    KL divergence that remains. With UMAP, there are none.

  Raises:
    UserError: for UMAP without the package umap-learn.
  """
  # Imported here, since it would double the start-up time of the command.
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
    # 30 is scikit-learn's default. A few points do not have that many
    # neighbours.
    perplexity = min(30, (len(features) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init='pca', random_state=SEED)
    points = tsne.fit_transform(features)
    return points, axes, {'kl_divergence': float(tsne.kl_divergence_)}
  # 15 is umap's default. With a seed, it runs in one thread, and warns unless
  # n_jobs is 1. Its spectral initialisation needs more than a few points.
  umap = import_umap().UMAP(
      n_neighbors=min(15, len(features) - 1), random_state=SEED, n_jobs=1,
      init='spectral' if len(features) > 15 else 'random',
  )
  return umap.fit_transform(features), axes, {}


def _count_cores() -> None:
  # To count cores, joblib runs an external program. Where there is none, its
  # first call prints long warnings; they are hidden here.
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
