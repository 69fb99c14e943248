"""Tar files in the webdataset format, with random access.

The members of a sample follow each other and share their name up to its first
dot: `0001.jpg` and `0001.cls`, or `0001.jpg` and `0001.json` with a `label`.
One pass over the headers finds where each image begins. The images are then
read directly from these positions. The result of the pass is cached, like the
listing of a folder.
"""

import collections
from collections.abc import Iterator
import dataclasses
import glob
import hashlib
import os
import re
import tarfile
from typing import NamedTuple

from etils import epath
import numpy as np

from mocov3_jax.base import console, files
from mocov3_jax.base.errors import UserError
from mocov3_jax.sources import (
  Splits,
  Unreadable,
  index_cache,
  labelled_splits,
  layout,
)
from mocov3_jax.sources.listing import MORE_SUFFIXES, SUFFIXES

IMAGES = tuple(
    suffix.decode().lstrip('.') for suffix in (*SUFFIXES, *MORE_SUFFIXES)
)
# Maximum bytes of an image, and of a text beside it.
MOST_IMAGE, MOST_TEXT = 2**28, 2**20
# Fields of a .json that may hold the label; the first that exists is used.
LABEL_FIELDS = 'label', 'cls', 'class'
# Version of the cache files; others are not read.
FORMAT = 1
# Shards between two progress lines of the first pass.
SAID_EVERY = 100
# A range in the name of shards, as webdataset writes it: {000000..000146}.
RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
MOST_SHARDS = 1_000_000
ALLOWED = (
    'Use the path of tar files, such as wds:/data/train-*.tar or '
    'wds:/data/train-{000000..000146}.tar.'
)


class Index(NamedTuple):
  """The positions of the images in one shard.

  Attributes:
    offsets, sizes: int64 [n], bytes.
    keys: n texts, the keys of the samples.
    labels: n texts, '' for samples without a label.
  """

  offsets: np.ndarray
  sizes: np.ndarray
  keys: list[str]
  labels: list[str]


@dataclasses.dataclass(frozen=True)
class ShardSource:
  """Images in tar files, as a `sources.Source`.

  Attributes:
    shards: paths of the files.
    shard: int32 [N], index of the shard that each image is in.
    offsets, sizes: int64 [N], bytes.
    keys: N texts, the keys of the samples.
    all_labels: int32 [N], -1 for images without a label.
    classes: names of the labels; empty if there are no labels.
  """

  shards: tuple[str, ...]
  shard: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray
  keys: np.ndarray
  all_labels: np.ndarray
  classes: tuple[str, ...]
  shape = None
  channels = 3
  labels_at_hand = True

  def __len__(self) -> int:
    return len(self.offsets)

  def read(self, index: int) -> bytes:
    """Returns the encoded image.

    Raises:
      Unreadable: if the shard has become shorter, or cannot be read.
    """
    size = int(self.sizes[index])
    if size > MOST_IMAGE:
      raise Unreadable(f'{size:,} bytes are more than {MOST_IMAGE:,}')
    try:
      # Opened for each read, which takes microseconds. Otherwise a thousand
      # shards would be a thousand open files.
      file = os.open(self.shards[self.shard[index]], os.O_RDONLY)
      try:
        data = os.pread(file, size, int(self.offsets[index]))
      finally:
        os.close(file)
    except OSError as e:
      raise Unreadable(e.strerror or str(e)) from e
    if len(data) < size:
      raise Unreadable('the shard is shorter than it was')
    return data

  def labels(self, indices: np.ndarray) -> np.ndarray:
    """Returns the labels of these images."""
    return self.all_labels[indices]

  def name(self, index: int) -> str:
    """Returns the name of the shard, without its folder, and of the sample."""
    shard = os.path.basename(self.shards[self.shard[index]])
    return f'{shard}/{self.keys[index]}'


def load(path: str, cache: epath.Path | None) -> Splits:
  """Opens the shards that a pattern names.

  Shards with a test split in their name (`val`, `test`, ...; see
  `layout.TESTS`) are tested on, if others are left to train on. Otherwise every
  tenth labelled image is held out for that.

  Args:
    path: path of the shards, with shell wildcards * ? [ ], or a range such as
      {000000..000146}.
    cache: folder in which the index is cached; None = no cache.

  Raises:
    UserError: if there are no shards, one is damaged, or they hold no images.
  """
  where = f'wds:{path}'
  shards = _expanded(where, path)
  names = [os.path.basename(shard) for shard in shards]
  if len(set(names)) < len(names):
    raise UserError(
        f'data.source={where!r} has shards of one name in several folders: '
        f'{collections.Counter(names).most_common(1)[0][0]}. Use a pattern '
        'for those of one folder.'
    )
  train, test, unused = _split(shards)
  found = _indexed(where, [*train, *test], cache)
  texts = {text for index in found.values() for text in index.labels}
  texts.discard('')
  # Numeric labels are sorted as numbers: 10 comes after 9.
  numbers = all(map(str.isdigit, texts))
  classes = tuple(sorted(
      texts, key=lambda x: (len(x), x) if numbers else x
  ))
  if len(classes) < 2:
    classes = ()
  number = {name: i for i, name in enumerate(classes)}
  source = _source(train, found, number, classes)
  held = _source(test, found, number, classes)
  if not len(source):
    raise UserError(
        f'data.source={where!r} holds no image in {len(train)} shards. '
        f'Allowed: members named .{" .".join(IMAGES)}, each beside a .cls or '
        '.json with its label, or without labels.'
    )
  remarks = (f'{len(train)} shards, and {len(test)} to test on',)
  if unused:
    remarks += (f'{unused} shards of further splits are not used',)
  return labelled_splits(where, source, held, remarks)


def _source(
    shards: list[str], found: dict[str, Index], number: dict[str, int],
    classes: tuple[str, ...],
) -> ShardSource:
  indices = [found[shard] for shard in shards]
  counts = [len(index.keys) for index in indices]
  empty = np.zeros(0, np.int64)
  return ShardSource(
      tuple(shards), np.repeat(np.arange(len(shards), dtype=np.int32), counts),
      np.concatenate([empty, *(index.offsets for index in indices)]),
      np.concatenate([empty, *(index.sizes for index in indices)]),
      np.array([key for index in indices for key in index.keys], object),
      np.array([
          number[text] if text in number else -1
          for index in indices for text in index.labels
      ], np.int32),
      classes,
  )


def _expanded(where: str, path: str) -> list[str]:
  """Returns the shards that a pattern names, sorted."""
  if not path:
    raise UserError(f'data.source={where!r} names no shards. {ALLOWED}')
  pattern = str(files.absolute(path, 'data.source'))
  patterns = [pattern]
  if match := RANGE.search(pattern):
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < MOST_SHARDS:
      raise UserError(
          f'data.source={where!r}: {match[0]} is not a range. {ALLOWED}'
      )
    patterns = [
        f'{pattern[:match.start()]}{n:0{len(first)}d}{pattern[match.end():]}'
        for n in range(int(first), int(last) + 1)
    ]
  found = []
  for each in patterns:
    its = glob.glob(each)
    if not its and len(patterns) > 1:
      raise UserError(
          f'data.source={where!r}: {each} is missing, which the range names.'
      )
    found += its
  found = sorted(shard for shard in found if os.path.isfile(shard))
  packed = [shard for shard in found if not shard.endswith('.tar')]
  if not found or packed:
    what = (
        f'{packed[0]} is not a .tar file' if packed else 'there is no such file'
    )
    raise UserError(
        f'data.source={where!r}: {what}. {ALLOWED} Compressed files (.tar.gz) '
        'have no random access: unpack them with gunzip.'
    )
  return found


def _split(shards: list[str]) -> tuple[list[str], list[str], int]:
  """Returns the shards to train on and to test on, and how many are unused."""
  by_word = collections.defaultdict(list)
  for shard in shards:
    words = re.findall('[a-z]+', os.path.basename(shard).lower())
    found = next((word for word in layout.TESTS if word in words), '')
    by_word[found].append(shard)
  train = by_word.pop('', [])
  if not train:  # Only test shards, so they are trained on.
    return shards, [], 0
  chosen = next((word for word in layout.TESTS if word in by_word), '')
  test = by_word.pop(chosen, [])
  return train, test, sum(map(len, by_word.values()))


def _indexed(
    where: str, shards: list[str], cache: epath.Path | None
) -> dict[str, Index]:
  """Returns the index of each shard, from the cache or from a new pass."""
  stamps = {}
  for shard in shards:
    status = os.stat(shard)
    stamps[shard] = f'{status.st_size}:{status.st_mtime_ns}'
  file = None
  if cache is not None:
    key = '\0'.join([str(FORMAT), *shards, *IMAGES])
    name = hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()
    file = cache / f'{name[:16]}.wds.npz'
    try:
      known = _load(file, shards, stamps)
      if known is not None:
        return known
    except (OSError, UserError, *index_cache.DAMAGED):
      pass  # Not cached yet, or no longer usable.
  found = {}
  for count, shard in enumerate(shards):
    if count % SAID_EVERY == 0 and len(shards) > SAID_EVERY:
      console.say(
          f'{where}: indexing shard {count} of {len(shards)}; this is done '
          'only once'
      )
    found[shard] = index(shard)
  if file is not None:
    _store(file, found, stamps)
  return found


def index(shard: str) -> Index:
  """Finds the images of a shard by the headers of its members.

  Raises:
    UserError: if it is not a tar file, is cut off, or a sample has two images.
  """
  offsets, sizes, keys, labels = [], [], [], []
  try:
    end = os.path.getsize(shard)
    with tarfile.open(shard, 'r:') as tar:
      for key, members in _samples(tar):
        image, label = None, ''
        for extension, member in members:
          if member.offset_data + member.size > end:
            raise tarfile.ReadError('it is cut off')
          kind = extension.rpartition('.')[2].lower()
          if kind in IMAGES:
            if image is not None:
              raise tarfile.ReadError(
                  f'the sample {console.shown(key)!r} has several images'
              )
            image = member
          elif kind in ('cls', 'json'):
            label = _label(kind, member, tar) or label
        if image is None:
          continue
        offsets.append(image.offset_data)
        sizes.append(image.size)
        keys.append(key)
        labels.append(label)
      _require_end(shard, tar.offset)
  except (OSError, tarfile.TarError, ValueError, OverflowError) as e:
    raise UserError(
        f'{shard} cannot be read as a tar file: {e}. Use whole, unpacked tar '
        'files with one image per sample.'
    ) from e
  return Index(
      np.array(offsets, np.int64), np.array(sizes, np.int64), keys, labels
  )


def _require_end(shard: str, offset: int) -> None:
  """Raises ReadError unless zeros follow; tarfile stops at any bad header."""
  with open(shard, 'rb') as file:
    file.seek(offset)
    while block := file.read(2**20):
      if block.strip(b'\0'):
        raise tarfile.ReadError(
            f'what stands at byte {offset:,} is no header, and not the end'
        )


def _samples(
    tar: tarfile.TarFile
) -> Iterator[tuple[str, list[tuple[str, tarfile.TarInfo]]]]:
  """Yields each sample: its key, and its members as (extension, member)."""
  last, members = None, []
  while (member := tar.next()) is not None:
    tar.members = []  # tarfile would keep all of them.
    folder, name = os.path.split(member.name)
    stem, dot, extension = name.partition('.')
    if not member.isreg() or not stem or not dot:
      continue
    key = os.path.join(folder, stem)
    if key != last and members:
      yield last, members
      members = []
    last = key
    members.append((extension, member))
  if members:
    yield last, members


def _label(kind: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> str:
  """Returns the label in a .cls or .json; '' if there is none."""
  if member.size > MOST_TEXT:
    return ''
  data = tar.extractfile(member).read()
  if kind == 'cls':
    return data.decode(errors='replace').strip()
  try:
    found = files.parse(data)
  except ValueError as e:
    raise tarfile.ReadError(
        f'{console.shown(member.name)!r} is not JSON ({e})'
    ) from e
  if isinstance(found, dict):
    for field in LABEL_FIELDS:
      if field in found and isinstance(found[field], (int, str)):
        return str(found[field])
  return ''


def _load(
    file: epath.Path, shards: list[str], stamps: dict[str, str]
) -> dict[str, Index] | None:
  """Returns what `_store` has cached; None if the shards have changed since.

  Raises:
    UserError, OSError, or one of index_cache.DAMAGED: if the file cannot be
      used.
  """
  saved = index_cache.load(file)
  if saved is None or saved['stamps'].tolist() != [
      stamps[shard] for shard in shards
  ]:
    return None
  texts = {
      name: _unpacked(saved[name]) for name in ('keys', 'labels')
  }
  bounds = np.cumsum([0, *saved['counts'].tolist()])
  if not all(
      len(x) == bounds[-1]
      for x in (*texts.values(), saved['offsets'], saved['sizes'])
  ):
    raise ValueError('its parts do not fit')
  return {
      shard: Index(
          saved['offsets'][a:b], saved['sizes'][a:b], texts['keys'][a:b],
          texts['labels'][a:b],
      )
      for shard, a, b in zip(shards, bounds[:-1], bounds[1:], strict=True)
  }


def _store(
    file: epath.Path, found: dict[str, Index], stamps: dict[str, str]
) -> None:
  indices = found.values()
  index_cache.store(
      file, stamps=np.array([stamps[shard] for shard in found]),
      counts=np.array([len(index.keys) for index in indices]),
      offsets=np.concatenate([index.offsets for index in indices]),
      sizes=np.concatenate([index.sizes for index in indices]),
      keys=_packed(key for index in indices for key in index.keys),
      labels=_packed(text for index in indices for text in index.labels),
  )


def _packed(texts: Iterator[str]) -> np.ndarray:
  # A fixed-width array would give each text the length of the longest.
  joined = '\0'.join(texts).encode(errors='surrogatepass')
  return np.frombuffer(joined, np.uint8)


def _unpacked(data: np.ndarray) -> list[str]:
  return data.tobytes().decode(errors='surrogatepass').split('\0')
