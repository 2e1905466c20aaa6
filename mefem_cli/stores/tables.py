"""Tables that people bring along (CSV, Parquet), read in pieces so that millions of rows fit.

A column holds numbers if all of its values do: float64, null where one is missing. Else it holds texts, "" where one is
missing. CSVs may have a byte order mark, semicolons or tabs between fields, decimal commas, and Windows' western
encoding. Tables are not trusted: a field has at most LONGEST_FIELD characters, a damaged file is a UsageError.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import itertools
import json
import os
import stat
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mefem_cli.errors import OutputError, UsageError, did_you_mean

LONGEST_FIELD = 131_072  # characters; csv's own limit
LONGEST_ROW = 1 << 20  # characters of a CSV's row, and of its header
BATCH_CELLS, BATCH_ROWS, BATCH_CHARACTERS = 1 << 17, 1 << 13, 1 << 24  # a batch ends at the first of them
MISSING = pa.array(["", "na", "n/a", "nan", "null", "none", "-", "."])  # in a column of numbers, lower case
NUMBER = r"^(?:[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?\d*,\d+)$"  # 1.5e3, or with a decimal comma 1,5
NAME = r"^[+-]?(?:0\d|\d{16,}$)"  # 007 and 76561198000000001 are names: as numbers they would lose digits
MOST_EXACT = 2**53  # integers up to here are exact as float64
DEFAULT_KEY = "path"
Headerless = Callable[[list[str]], list[str] | None]
Value = str | float | None


class Table(ABC):
    """A table file: its column names, and its rows in batches."""

    def __init__(self, path: Path, names: list[str]):
        self.path, self.names = path, names
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise UsageError(f'{path} has several columns called "{repeated[0][:80]}"')

    @abstractmethod
    def numeric(self, names: Sequence[str]) -> set[str]:
        """Return those of the named columns that hold nothing but numbers."""

    @abstractmethod
    def as_written(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the named columns as the file has them; a CSV's are strings without spaces around them."""

    @property
    @abstractmethod
    def can_label(self) -> list[str]:
        """The columns that can travel as labels."""

    def batches(self, labels: Sequence[str], raw: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield `raw` columns as written, then `labels` as float64 or string; at least one batch, perhaps without rows.

        Raises UsageError where the table is damaged.
        """
        numeric = self.numeric(labels)
        for batch in self.as_written([*raw, *labels]):
            columns = [batch.column(index) for index in range(len(raw))]
            for name, column in zip(labels, batch.columns[len(raw) :], strict=True):
                columns.append(_as_numbers(column) if name in numeric else as_texts(column))
            yield pa.RecordBatch.from_arrays(columns, names=[*raw, *labels])

    def key_column(self, key: str | None) -> str:
        """Return the column that names pictures. Raises UsageError where the table has none such."""
        if key is not None and key not in self.names:
            raise UsageError(f"--key {key}: {self.path} has no such column{did_you_mean(key, self.names)}")
        if key is None and DEFAULT_KEY not in self.names:
            known = ", ".join(self.names)[:200]
            wanted = f'has no column "{DEFAULT_KEY}"; type --key with the one that names pictures'
            raise UsageError(f"{self.path} {wanted}: {known}")
        return key or DEFAULT_KEY


def open_table(path: Path, headerless: Headerless | None = None) -> Table:
    """Open a CSV or Parquet file; `headerless` returns the columns of a CSV from a first line that is no header.

    Raises UsageError where the file is neither, is empty, or its columns are not distinct.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{path} is no regular file; wanted a CSV or Parquet table")
        with open(path, "rb") as file:
            start = file.read(4)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', error)}; wanted a CSV or Parquet table") from error
    if start == b"PAR1":
        return ParquetTable(path)
    if start == b"PK\x03\x04":
        raise UsageError(f"{path} looks like an Excel file; save it as CSV")
    return CsvTable(path, headerless)


class CsvTable(Table):
    """A CSV file."""

    def __init__(self, path: Path, headerless: Headerless | None = None):
        self.path, self.has_header = path, True
        self._encoding = _encoding(path)
        with self._open() as file:
            header = next(iter(_Lines(path, file)), "")
            self._delimiter = max(",;\t", key=header.count)
        first = [field.strip() for field in next(self._read(most=1), [[]])[0]]
        if not first:
            raise UsageError(f"{path} is empty; wanted a header line and one line per picture")
        names = headerless(first) if headerless is not None else None
        self.has_header = names is None
        super().__init__(path, names or [name or f"unnamed_{index}" for index, name in enumerate(first)])

    @property
    def can_label(self) -> list[str]:
        return self.names

    def numeric(self, names: Sequence[str]) -> set[str]:
        left = list(names)
        for batch in self.as_written(names) if names else ():
            left = [name for name in left if to_numbers(batch.column(name)) is not None]
            if not left:
                break
        return set(left)

    def as_written(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        wanted = [self.names.index(name) for name in names]
        done = 0
        for rows in self._read(most=max(1, min(BATCH_ROWS, BATCH_CELLS // len(self.names)))):
            below = rows[1:] if self.has_header and not done else rows
            done += len(rows)
            self._even_out(below, first=done - len(below) + (not self.has_header))
            columns = [pa.array(list(map(itemgetter(index), below)), pa.string()) for index in wanted]
            trimmed = [pc.utf8_trim_whitespace(column) for column in columns]
            yield pa.RecordBatch.from_arrays(trimmed, names=list(names))

    def _even_out(self, rows: list[list[str]], first: int) -> None:
        """Give each row as many fields as the header has; `first` is the number of the first one, from 1."""
        width = len(self.names)
        if set(map(len, rows)) <= {width}:
            return
        for number, row in enumerate(rows, start=first):
            if len(row) > width:
                raise UsageError(f"{self.path}: row {number} has {len(row)} fields, the header has {width}")
            row += [""] * (width - len(row))

    def _read(self, most: int) -> Iterator[list[list[str]]]:
        """Yield the fields of all lines that have any, so many lines at once."""
        rows: list[list[str]] = []
        count = begun = 0
        with self._open() as file:
            lines = _Lines(self.path, file)
            try:
                for row in csv.reader(lines, delimiter=self._delimiter, strict=True):
                    lines.row_begun = lines.total
                    if any(row):
                        rows.append(row)
                    if len(rows) == most or lines.total - begun > BATCH_CHARACTERS:
                        yield rows
                        rows, count, begun = [], count + len(rows), lines.total
            except csv.Error as error:
                number = count + len(rows) + (not self.has_header)
                where = f"row {number}" if number else "the header"
                raise UsageError(f"{self.path}: {where} is no CSV ({error})") from error
        if rows:
            yield rows

    def _open(self) -> TextIO:
        return open(self.path, encoding=self._encoding, errors="replace", newline="")


class _Lines:
    """The lines of a file, one by one; refuses a row of more than LONGEST_ROW characters."""

    def __init__(self, path: Path, file: TextIO):
        self._path, self._file = path, file
        self.total = self.row_begun = 0  # characters read, and before the row; a quoted field can hold many lines

    def __iter__(self) -> Iterator[str]:
        read = self._file.readline
        while line := read(LONGEST_ROW + 1):
            self.total += len(line)
            if self.total - self.row_begun > LONGEST_ROW:
                raise UsageError(f"{self._path} has a row of more than {LONGEST_ROW} characters; wanted a table")
            yield line


def _encoding(path: Path) -> str:
    """Return how a text file is encoded: UTF-8 with or without a mark, UTF-16 (Excel's "Unicode text"), else cp1252.

    Raises UsageError for what is no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    encoding = "utf-8-sig"
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        file.seek(0)
        while block := file.read(1 << 20):
            if b"\0" in block:
                raise UsageError(f"{path} is no text; wanted a CSV or Parquet table")
            if encoding != "cp1252":
                encoding = "utf-8-sig" if _decodes(decoder, block) else "cp1252"
    return encoding if _decodes(decoder, b"", final=True) else "cp1252"


def _decodes(decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError:
        return False
    return True


def to_numbers(texts: pa.Array) -> pa.Array | None:
    """Return a column of texts as float64 with nulls, or None where one of them is no number.

    >>> to_numbers(pa.array(["1,5", "", "20"])).to_pylist()
    [1.5, None, 20.0]
    """
    is_missing = pc.is_in(pc.utf8_lower(texts), value_set=MISSING)
    present = texts.filter(pc.invert(is_missing))
    if not pc.all(pc.match_substring_regex(present, NUMBER), min_count=0).as_py():
        return None
    if pc.any(pc.match_substring_regex(present, NAME), min_count=0).as_py():
        return None
    numbers = pc.cast(pc.replace_substring(present, ",", "."), pa.float64())
    if not pc.all(pc.is_finite(numbers), min_count=0).as_py():  # 1e999
        return None
    nothing = pa.nulls(len(texts), pa.float64())
    return pc.replace_with_mask(nothing, pc.invert(is_missing), numbers)


class ParquetTable(Table):
    """A Parquet file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._schema = pq.ParquetFile(path, pre_buffer=False).schema_arrow
            names = self._schema.names
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from error
        super().__init__(path, names)

    def _damaged(self, error: Exception) -> UsageError:
        return UsageError(f"{self.path} is a damaged Parquet file ({' '.join(str(error).split())[:80]})")

    @property
    def can_label(self) -> list[str]:
        return [one.name for one in self._schema if not _holds_bytes(one.type)]

    def numeric(self, names: Sequence[str]) -> set[str]:
        kinds = {name: _plain(self._schema.field(name).type) for name in names}
        integers = [name for name, kind in kinds.items() if pa.types.is_integer(kind) and kind.bit_width == 64]
        inexact = self._inexact(integers)
        return {name for name, kind in kinds.items() if _is_number(kind) and name not in inexact}

    def _inexact(self, names: list[str]) -> set[str]:
        """Return those columns of integers that float64 would round: they are names of something."""
        found: set[str] = set()
        for batch in self.as_written(names) if names else ():
            for name in names:
                ends = pc.min_max(batch.column(name)).as_py().values()
                if any(end is not None and abs(end) > MOST_EXACT for end in ends):
                    found.add(name)
        return found

    def as_written(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        names = list(names)
        schema = pa.schema([self._schema.field(name) for name in names])
        most = max(1, min(BATCH_ROWS, BATCH_CELLS // max(1, len(names))))
        found = False
        try:
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                self._refuse_long_fields(file, names)
                for batch in file.iter_batches(batch_size=most, columns=names, use_threads=False):
                    batch.validate(full=True)  # texts that are no UTF-8, lists that end outside
                    found = True
                    yield batch.select(names)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise self._damaged(error) from error
        if not found:
            yield pa.RecordBatch.from_pylist([], schema=schema)

    def _refuse_long_fields(self, file: pq.ParquetFile, names: list[str]) -> None:
        """Refuse texts of a dictionary that are long: a file of some bytes could repeat one of them a million times."""
        texts = [name for name in names if _is_text(_plain(self._schema.field(name).type))]
        if not texts:
            return
        with pq.ParquetFile(self.path, pre_buffer=False, read_dictionary=texts) as encoded:
            for group in range(file.num_row_groups):
                pieces = encoded.iter_batches(batch_size=1, row_groups=[group], columns=texts, use_threads=False)
                first = next(pieces, None)
                for column in first.columns if first is not None else ():
                    values = column.dictionary if pa.types.is_dictionary(column.type) else column
                    if (pc.max(pc.binary_length(values)).as_py() or 0) > LONGEST_FIELD:
                        raise UsageError(f"{self.path} has a field of more than {LONGEST_FIELD} bytes; wanted a table")


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_number(kind: pa.DataType) -> bool:
    simple = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return simple or pa.types.is_decimal(kind) or pa.types.is_null(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_bytes(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Return whether a column holds pictures and the like, itself or in lists and records."""
    kind = _plain(kind)
    return _is_bytes(kind) or any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))


def _as_numbers(column: pa.Array) -> pa.Array:
    """Return a column that holds numbers as float64, null where there is none."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        numbers = to_numbers(column)
        assert numbers is not None  # the whole column was looked at before
        return numbers
    numbers = pc.cast(column, pa.float64())
    return pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)


def as_texts(column: pa.Array) -> pa.Array:
    """Return a column of any kind as strings, "" where there is none; what is no text or number, as JSON.

    >>> as_texts(pa.array([12.0, 0.5, None])).to_pylist()
    ['12', '0.5', '']
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_floating(kind):
        return pa.array([number_text(value) for value in column.to_pylist()], pa.string())
    if _is_bytes(kind):
        return pa.array([(one or b"").decode("utf-8", "replace") for one in column.to_pylist()], pa.string())
    if pa.types.is_nested(kind):
        texts = ["" if one is None else json.dumps(one, ensure_ascii=False, default=str) for one in column.to_pylist()]
        return pa.array(texts, pa.string())
    return pc.fill_null(pc.cast(column, pa.string()), "")


def number_text(value: float | None) -> str:
    """Return a number as short text that means the same number, an integer without a point; "" for none.

    >>> number_text(12.0)
    '12'
    """
    if value is None or value != value:
        return ""
    return str(int(value)) if abs(value) <= MOST_EXACT and value == int(value) else repr(float(value))


def spooled(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Return batches as one table that lies in a temporary file, not in memory; it ends with the process.

    Raises OutputError where there is no room for the file.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix="mefem-table-", suffix=".arrow") as file:
            batches = iter(batches)
            first = next(batches)
            with pa.ipc.new_file(file, first.schema) as writer:
                for batch in itertools.chain([first], batches):
                    writer.write_batch(batch)
            file.flush()
            return pa.ipc.open_file(pa.memory_map(file.name)).read_all()
    except OSError as error:
        detail = error.strerror or str(error)[:80]
        folder = tempfile.gettempdir()
        raise OutputError(f"{folder} has no room for a copy of the table ({detail}); set TMPDIR to another") from error


class Rows:
    """A spooled table's rows by number.

    >>> Rows(pa.table({"age": [31.0, 40.0], "sex": ["m", ""]}))[1]
    [40.0, '']
    """

    def __init__(self, table: pa.Table):
        batches = [batch for batch in table.to_batches() if len(batch)]
        self._columns = [batch.columns for batch in batches]
        self._ends = np.cumsum([len(batch) for batch in batches]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> list[Value]:
        which = bisect.bisect_right(self._ends, row)
        before = self._ends[which - 1] if which else 0
        return [column[row - before].as_py() for column in self._columns[which]]


class HashIndex:
    """Where each of many 63-bit hashes stands: 12 bytes for each."""

    def __init__(self, hashes: np.ndarray, rows: np.ndarray | None = None):
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._rows = (order if rows is None else rows[order]).astype(np.uint32)

    def find(self, one: int) -> np.ndarray:
        """Return the rows with this hash, in their order."""
        begin = self._hashes.searchsorted(one)
        if begin == len(self._hashes) or self._hashes[begin] != one:
            return self._rows[:0]
        return self._rows[begin : self._hashes.searchsorted(one, side="right")]
