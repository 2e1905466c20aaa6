"""Tables that people bring along (CSV, Parquet) -> columns: numbers float64 with NaN, texts with "" where missing.

CSVs may have a byte order mark, semicolons or tabs between fields, decimal commas, and Windows' western encoding.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mefem_cli.errors import UsageError

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "-", "."})  # in a column of numbers, lower case
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
LEADING_ZERO = re.compile(r"[+-]?0\d")  # 007 is a name


@dataclass(frozen=True)
class Table:
    """A table's columns by name, as text; `numeric` holds those that are numbers once more, as float64."""

    path: Path
    texts: dict[str, list[str]]
    numeric: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.texts.values()), []))

    def values(self, name: str) -> np.ndarray:
        """Return a column: float64 with NaN, or objects (str) with ""."""
        return self.numeric[name] if name in self.numeric else np.array(self.texts[name], dtype=object)


def read_table(path: Path) -> Table:
    """Read a CSV or Parquet file. Raises UsageError where it is neither, or its columns are not distinct."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; wanted a CSV or Parquet table") from error
    if content.startswith(b"PAR1"):
        return _read_parquet(path)
    if content.startswith(b"PK\x03\x04"):
        raise UsageError(f"{path} looks like an Excel file; save it as CSV")
    texts = _read_csv(path, content)
    return Table(path, texts, {name: numbers for name in texts if (numbers := to_numbers(texts[name])) is not None})


def _read_csv(path: Path, content: bytes) -> dict[str, list[str]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    if "\0" in text:
        raise UsageError(f"{path} is no text; wanted a CSV or Parquet table")
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    if not rows:
        raise UsageError(f"{path} is empty; wanted a header line and one line per picture")
    names = [name.strip() or f"unnamed_{index}" for index, name in enumerate(rows[0])]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UsageError(f'{path} has several columns called "{repeated[0]}"')
    for number, row in enumerate(rows[1:], start=1):
        if len(row) > len(names):
            raise UsageError(f"{path}: row {number} has {len(row)} fields, the header has {len(names)}")
    columns = list(zip(*(row + [""] * (len(names) - len(row)) for row in rows[1:]), strict=True)) or [()] * len(names)
    return {name: [value.strip() for value in column] for name, column in zip(names, columns, strict=True)}


def to_numbers(texts: list[str]) -> np.ndarray | None:
    """Return the column as float64 with NaN, or None where it holds texts.

    >>> to_numbers(["1,5", "", "20"])
    array([ 1.5,  nan, 20. ])
    """
    numbers = np.full(len(texts), np.nan)
    for index, text in enumerate(texts):
        if text.lower() in MISSING:
            continue
        if DECIMAL_COMMA.fullmatch(text):
            text = text.replace(",", ".")
        if not NUMBER.fullmatch(text) or LEADING_ZERO.match(text):
            return None
        numbers[index] = float(text)
    return numbers


def _read_parquet(path: Path) -> Table:
    try:
        content = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} is a damaged Parquet file ({str(error)[:80]})") from error
    texts, numeric = {}, {}
    for name, column in zip(content.column_names, content.columns, strict=True):
        texts[name] = ["" if value is None else str(value) for value in column.to_pylist()]
        kind = column.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            values = [np.nan if value is None else value for value in column.to_pylist()]
            numeric[name] = np.array(values, dtype=np.float64)
    return Table(path, texts, numeric)
