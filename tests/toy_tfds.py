"""Small sets as TFDS prepares them, written without TensorFlow."""

import io
import json

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
import tensorflow_datasets as tfds


class ToyDigits(tfds.core.GeneratorBasedBuilder):
  """Digits in colour: RGB PNGs of 8x8, like CIFAR's of 32x32."""

  VERSION = tfds.core.Version('1.0.0')
  SHAPE = 8, 8, 3

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(shape=self.SHAPE),
            'label': tfds.features.ClassLabel(num_classes=10),
        }),
    )

  def _split_generators(self, manager):
    del manager
    return {
        'train': self._generate_examples(range(400)),
        'test': self._generate_examples(range(400, 500)),
    }

  def _generate_examples(self, numbers):
    data = load_digits()
    for i in numbers:
      gray = np.round(data.images[i] * (255 / 16)).astype(np.uint8)
      file = io.BytesIO()
      Image.fromarray(gray).convert('RGB').save(file, 'PNG')
      yield i, {'image': file.getvalue(), 'label': int(data.target[i])}


class ToyPhotos(ToyDigits):
  """The same, but of no fixed size, and without a test split."""

  SHAPE = None, None, 3

  def _split_generators(self, manager):
    del manager
    return {'train': self._generate_examples(range(100))}


class ToyRgba(ToyPhotos):
  """As the digits, of a fixed size with four channels."""

  SHAPE = 8, 8, 4


class ToyContest(ToyDigits):
  """With a test split whose labels are kept secret, like ImageNet's."""

  def _split_generators(self, manager):
    del manager
    return {
        'train': self._generate_examples(range(100)),
        'validation': self._generate_examples(range(100, 150)),
        'test': self._secret(range(150, 180)),
    }

  def _secret(self, numbers):
    for i, example in self._generate_examples(numbers):
      yield i, example | {'label': -1}


def prepare(folder, builder=ToyDigits, file_format='array_record'):
  """Writes the files of a set; returns the folder of its version."""
  made = builder(data_dir=str(folder), file_format=file_format)
  made.download_and_prepare()
  return made.data_path


def pretend_tfrecord(path):
  """Makes a prepared set look as if it were tfrecord files."""
  info = path / 'dataset_info.json'
  values = json.loads(info.read_text())
  assert values['fileFormat'] == 'array_record'
  values['fileFormat'] = 'tfrecord'
  info.write_text(json.dumps(values))
  for file in path.glob('*.array_record-*'):
    file.rename(path / file.name.replace('array_record', 'tfrecord'))
