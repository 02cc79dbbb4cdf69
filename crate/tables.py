"""CSV tables of any origin, read so that nothing in them is dropped or taken for something else without a word."""

import csv
import io
from pathlib import Path

import pandas as pd

from crate import ranks
from crate.cli import InputError

MISSING = ["", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "none"]


def read_cells(file):
    """The table as text, indexed by the lines of the file, which may be a pipe; rows of empty cells are skipped."""
    try:
        reader = csv.reader(io.StringIO(Path(file).read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        rows = {reader.line_num: [cell.strip() for cell in row] for row in reader if any(map(str.strip, row))}
    except (ValueError, csv.Error) as error:
        raise InputError(f"{file}: not a CSV table in UTF-8 ({error})")
    if not rows:
        raise InputError(f"{file}: not a CSV table in UTF-8 (it is empty)")
    header = rows.pop(min(rows))
    for line, row in rows.items():
        if len(row) != len(header):
            raise InputError(f"{file}: line {line} has {len(row)} cells, the header {len(header)}")
    for name in header:
        if header.count(name) > 1:
            raise InputError(f"{file}: two columns are called {name or 'nothing'}")
    return pd.DataFrame(rows.values(), rows.keys(), header, dtype=object)


def numbers(cells, flag=None):
    """A column of text as numbers, NaN where missing. Text is refused with its line, but without a flag, where at least half of
    the cells are text, this is no column of numbers: None.
    """
    values = pd.to_numeric(cells, errors="coerce").astype(float)
    text = cells[values.isna() & ~cells.str.lower().isin(MISSING)]
    if len(text) and (flag or values.notna().sum() > len(text)):
        raise InputError(f"{flag or 'column'} {cells.name}: line {text.index[0]}: {text.iloc[0]!r} is not a number")
    return values if values.notna().any() or flag else None


def hyperparameter(cells):
    """A column of hyperparameters: numbers, equal within 1e-6, if all cells are; else text, in which None and NA are levels.

    Numbers among text become equal text. An empty cell is refused.
    """
    if (cells == "").any():
        raise InputError(f"column {cells.name}: line {cells.index[cells == ''][0]}: an empty cell in a hyperparameter")
    values = pd.to_numeric(cells, errors="coerce").astype(float)
    values = values.groupby(ranks.levels(values)).transform("first")  # NaN where a cell is no finite number
    return values if values.notna().all() else cells.where(values.isna(), values.map(shown))


def shown(level):
    """A level as text: 48, not 48.0."""
    return f"{level:.12g}" if isinstance(level, float) else str(level)
