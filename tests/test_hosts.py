"""The same examples, crops and jitters on one, two and four processes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import photos
import pytest
import tiny


def free_address():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def read_run(folder, processes, first, last):
  """What `processes` processes together see of steps first .. last - 1."""
  address = free_address()
  arguments = [sys.executable, str(tiny.ROOT / 'tests' / 'hosts.py'), folder,
               address, str(processes)]
  started = [
      subprocess.Popen(
          [*arguments, str(p), str(first), str(last)], cwd=tiny.ROOT,
          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
          env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': '.'},
      )
      for p in range(processes)
  ]
  together = {}
  for process in started:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for step, rows in json.loads(out.splitlines()[-1]).items():
      whole = together.setdefault(step, {})
      assert not whole.keys() & rows.keys()  # Each place is read once.
      whole |= rows
  return together


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  photos.write_tiles(folder, tile=48, each=6, nested=False, corrupt=0.1)
  return str(folder)


@pytest.fixture(scope='module')
def one_process(folder):
  return read_run(folder, 1, 0, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    'processes, first', [(2, 0), (2, 5), (4, 3), (4, 0)]
)
def test_any_number_of_processes_sees_the_same(
    folder, one_process, processes, first
):
  # 54 images, so 3 steps an epoch: this crosses epochs.
  together = read_run(folder, processes, first, 8)
  assert together.keys() == {str(s) for s in range(first, 8)}
  for step, rows in together.items():
    expected = one_process[step]
    assert rows.keys() == expected.keys() == {str(i) for i in range(16)}
    for place, (crops, views, unreadable) in rows.items():
      assert crops == expected[place][0]
      np.testing.assert_allclose(views, expected[place][1], atol=1e-4)
      assert unreadable == expected[place][2]
  assert any(
      row[2] >= 0 for rows in together.values() for row in rows.values()
  )
