"""Reading one data file into columns, remembering the line of every row so that errors can name it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camtl.errors import UsageError

#: Endings that can be read, each also with ``.gz``, in the order in which a folder is searched.
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
#: Characters of one field; the csv module's own limit of 131,072 is less than some texts have.
_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and the line of each row (None for Parquet, which has no lines)."""

    path: str
    columns: dict[str, list[Any]]
    lines: list[int] | None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def where(self, row: int) -> str:
        """``"file, line 7"``, or ``"file, row 7"`` counted from 1."""
        return (
            f"{self.path}, line {self.lines[row]}"
            if self.lines is not None
            else f"{self.path}, row {row + 1}"
        )


def file_kind(path: str | os.PathLike[str]) -> str:
    """The ending of a file name that says how to read it, without ``.gz``; unknown ones raise UsageError."""
    name = Path(path).name.lower().removesuffix(".gz")
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise UsageError(
        f"{path}: unknown kind of file; the name must end in {', '.join(SUFFIXES)} (or these with .gz)"
    )


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read a JSON Lines, JSON, CSV, TSV or Parquet file, gzipped or not, UTF-8 with or without its mark.

    Every problem is a :class:`UsageError` with file and line: no such file, not UTF-8, a broken line, a row
    with more or fewer fields than the header, no rows at all. A key that some JSON rows lack is None there.
    """
    kind = file_kind(path)
    try:
        if kind == ".jsonl":
            table = _read_json_lines(path)
        elif kind == ".json":
            table = _read_json(path)
        elif kind == ".parquet":
            table = _read_parquet(path)
        else:
            table = _read_separated(path, "," if kind == ".csv" else "\t")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder, not a file") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UsageError(f"{path}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(table) == 0:
        raise UsageError(f"{path}: holds no rows")
    return table


def _open(path: str | os.PathLike[str]) -> io.BufferedIOBase:
    if str(path).lower().endswith(".gz"):
        return gzip.open(path, "rb")
    return open(path, "rb")


def _read_json_lines(path: str | os.PathLike[str]) -> Table:
    rows, lines = [], []
    with _open(path) as handle:
        # Lines end at \n only: str.splitlines would also break at U+2028, which is legal inside JSON strings.
        for number, raw in enumerate(handle, 1):
            text = _decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, path, number)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); each line must "
                    "be one JSON object"
                ) from None
            if not isinstance(row, dict):
                raise UsageError(
                    f"{path}, line {number}: each line must be one JSON object, found {_brief(row)}"
                )
            rows.append(row)
            lines.append(number)
    return Table(str(path), _columns(rows), lines)


def _read_json(path: str | os.PathLike[str]) -> Table:
    with _open(path) as handle:
        raw = handle.read().removeprefix(b"\xef\xbb\xbf")
    text = _decode(raw, path, 1)
    if text.lstrip().startswith("{"):
        # One object per line is often saved as .json too.
        return _read_json_lines(path)
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})"
        ) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: expected a JSON list of objects, or one object per line")
    return Table(str(path), _columns(rows), None)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: str | os.PathLike[str]) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(path) as handle:
            table = pq.read_table(pa.BufferReader(handle.read()))
    except pa.ArrowException as error:
        raise UsageError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    return Table(str(path), {name: table.column(name).to_pylist() for name in table.column_names}, None)


def _read_separated(path: str | os.PathLike[str], separator: str) -> Table:
    with _open(path) as handle:
        text = _decode(handle.read().removeprefix(b"\xef\xbb\xbf"), path, 1)
    records: Iterator[tuple[int, list[str]]]
    if separator == "\t" and (plain := _plain_tsv(text)) is not None:
        records = iter(plain)
    else:
        records = _quoted(text, separator, path)
    header_line, header = next(records, (1, []))
    header = [name.strip() for name in header]
    if len(set(header)) != len(header) or "" in header:
        raise UsageError(f"{path}, line {header_line}: the first line must name every column, each name once")
    columns: dict[str, list[Any]] = {name: [] for name in header}
    lines = []
    for line, fields in records:
        if len(fields) != len(header):
            quotes = "" if separator == "\t" else "; a text with commas in it must stand in double quotes"
            raise UsageError(
                f"{path}, line {line}: {len(fields)} fields, but the first line names {len(header)} columns "
                f"({', '.join(header)}){quotes}"
            )
        lines.append(line)
        for name, value in zip(header, fields, strict=True):
            columns[name].append(value)
    return Table(str(path), columns, lines)


def _quoted(text: str, separator: str, path: str | os.PathLike[str]) -> Iterator[tuple[int, list[str]]]:
    """Records with the line each begins on (a quoted text may go over several lines)."""
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    begins = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{path}, line {begins}: broken quotes ({error})") from None
        if fields:
            yield begins, fields
        begins = reader.line_num + 1


def _plain_tsv(text: str) -> list[tuple[int, list[str]]] | None:
    """The records of a TSV in which quote marks mean nothing special, as in GLUE's; None if it is not one.

    If every line has as many fields as the first, tabs alone separate. A field wholly in quotes with all
    inner quotes doubled is still unquoted (spreadsheet style).
    """
    records: list[tuple[int, list[str]]] = []
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.removesuffix("\r")
        if not line.strip():
            continue
        fields = line.split("\t")
        if records and len(fields) != len(records[0][1]):
            # Quotes might hold a tab or a line break together; without quotes the line is simply wrong, and
            # the csv reader will say so with its number.
            return None
        records.append((number, [_unquoted(field) for field in fields]))
    return records


def _unquoted(field: str) -> str:
    if len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    return field


def _decode(raw: bytes, path: str | os.PathLike[str], first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise UsageError(
            f"{path}, line {line}: not UTF-8 text (byte {raw[error.start]:#04x}); save the file as UTF-8"
        ) from None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
