"""Writes a report on runs, in the format that is asked for."""

from collections.abc import Callable, Iterator, Sequence
import csv
import datetime
import io
from typing import Any

from etils import epath

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.reports import data, figure, page
from mocov3_jax.runs import history

FORMATS = ('html', 'png', 'csv')


def report(
    paths: list[str], out: str, format_: str = '', date: str = '',
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
  """Writes a report.

  Args:
    paths: workdirs, or folders of workdirs.
    out: the file.
    format_: one of FORMATS; '' takes it from the suffix of `out`.
    date: the date that a page shows; '' means today.
    note: is told what is being done.

  Returns:
    What was written, as a flat dict.

  Raises:
    UserError: for bad input; nothing is written then.
  """
  if not paths:
    raise UserError(
        'no run was given. Allowed: workdirs of runs, or folders of them, as '
        'positional arguments: python -m mocov3_jax.report RUN [RUN ...] '
        '--out=report.html.'
    )
  path = files.absolute(out, '--out')
  kind = _format(path.suffix, out, format_)
  if path.is_dir() or not path.parent.is_dir():
    why = 'is a folder' if path.is_dir() else f'{path.parent} is not a folder'
    raise UserError(
        f'--out={out} cannot be written: {why}. Use a file in a folder '
        'that exists.'
    )
  found = history.find(paths)
  note(f'{len(found)} run(s); looking for dips and spikes')
  made = data.make(_readable(found, note))
  note(f'writing {path}')
  date = date or datetime.date.today().isoformat()
  content = {
      'html': lambda: page.page(made, date).encode(errors='replace'),
      'png': lambda: figure.png(made),
      'csv': lambda: as_csv(made).encode(errors='replace'),
  }[kind]()
  with files.open_whole(path, '--out') as file:
    file.write(content)
  return {'out': str(path), **data.counts(made), 'bytes': len(content)}


def _readable(
    folders: Sequence[epath.Path], note: Callable[[str], None]
) -> Iterator[history.Run]:
  """Yields the runs that can be read, and notes why others cannot.

  Raises:
    UserError: if none of them can be read.
  """
  refused = []
  for folder in folders:
    try:
      run = history.read(folder)
    except UserError as e:
      refused.append(e)
      if len(folders) > 1:
        note(f'left out: {e}')
    else:
      yield run
  if len(refused) == len(folders):
    raise refused[-1]


def _format(suffix: str, out: str, given: str) -> str:
  if given:
    if given not in FORMATS:
      raise unknown('--format', given, FORMATS)
    return given
  if suffix[1:].lower() not in FORMATS:
    raise UserError(
        f'--out={out} does not say the format. Use a file that ends with '
        f'{", ".join(f".{kind}" for kind in FORMATS)}; or --format.'
    )
  return suffix[1:].lower()


def as_csv(made: data.Report) -> str:
  """Returns the table of runs as CSV (RFC 4180); unknown values are empty."""
  file = io.StringIO(newline='')
  columns = data.columns(made)
  writer = csv.DictWriter(file, columns)
  writer.writerow({name: files.csv_text(name) for name in columns})
  writer.writerows(
      {name: files.csv_text(value) for name, value in row.items()}
      for row in data.table(made)
  )
  return file.getvalue()
