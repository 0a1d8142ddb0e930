"""Rows of tables (CSV, parquet) and items of arrays of JSON, each with its place; a row that is none is a BadRow."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from cofitune.data.read import READ_ERRORS, BadRow, Row, lines, open_text
from cofitune.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader  # what csv.reader gives: the standard library names it nowhere else

ROWS_AT_ONCE = 128  # of a parquet file: a row may hold a picture
_SPACE = re.compile(r"[ \t\r\n]*")


def json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Items of a file of JSON lines, or of one array. Values keep their types.

    Raises:
        DataError: the file cannot be read, or its array is no valid JSON (line and column).
    """
    if Path(file.name.lower().removesuffix(".gz")).suffix == ".json" and _starts_an_array(file):
        yield from _array(file)
        return
    for number, line in lines(file):
        yield f"{file}:{number}", line


def table_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a CSV, TSV or parquet file. In CSV every value is text, also a number or the word NA.

    Raises:
        DataError: the file cannot be read.
    """
    if file.stat().st_size == 0:
        return
    reader = _parquet if file.suffix.lower() == ".parquet" else _csv
    yield from reader(file)


def _starts_an_array(file: Path) -> bool:
    return next((line.lstrip()[0] for _, line in lines(file)), "") == "["


def _array(file: Path) -> Iterator[tuple[str, str]]:
    """The text of each item: what is wrong inside one of them is then that item's own mistake."""
    try:
        with open_text(file) as opened:
            text = opened.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: cannot be read: {error}; save it as UTF-8") from None
    except READ_ERRORS as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    skip: Callable[[int], int] = lambda at: _SPACE.match(text, at).end()  # type: ignore[union-attr]  # noqa: E731
    decoder, number = json.JSONDecoder(), 0
    try:
        at = skip(skip(0) + 1)
        while text[at : at + 1] != "]":
            end = decoder.raw_decode(text, at)[1]
            number += 1
            yield f"{file}: item {number}", text[at:end]
            at = skip(end)
            if text[at : at + 1] == ",":
                at = skip(at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, skip(at + 1))
    except json.JSONDecodeError as error:
        where = f"{file}:{error.lineno}"
        raise DataError(f"{where}: cannot be read: {error.msg} at column {error.colno} (item {number + 1})") from None
    except (ValueError, RecursionError) as error:
        deep = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{file}: cannot be read: {deep} (item {number + 1})") from None


def _csv(file: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # Python's own limit is 128 KiB a field
    try:
        with open_text(file, newline="") as opened:
            first = opened.readline()
            reader = csv.reader(chain([first], opened), strict=True, delimiter=_delimiter(file, first))
            columns = _header(file, next(reader, []))
            number = 0
            while (fields := _next_row(reader)) is not None:
                if not fields:
                    continue
                number += 1
                yield f"{file}: row {number}", fields if isinstance(fields, BadRow) else _record(columns, fields)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: cannot be read: {error}; save it as UTF-8") from None
    except (*READ_ERRORS, ValueError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def _delimiter(file: Path, header: str) -> str:
    """What separates the fields: the first of comma, semicolon and tab that the header has; of a TSV file the tab."""
    is_tsv = file.name.lower().removesuffix(".gz").endswith(".tsv")
    return next((character for character in ("\t,;" if is_tsv else ",;\t") if character in header), ",")


def _header(file: Path, columns: list[str]) -> list[str]:
    """The columns' names. One without a name, such as a data frame's index, gets one by which it is told as unread."""
    names = [name.strip() or f"column {place} (no name)" for place, name in enumerate(columns, start=1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file}: cannot be read: two columns are called '{twice}'; which one is meant?")
    return names


def _next_row(reader: Reader) -> list[str] | BadRow | None:
    """The next row, `[]` for an empty line, None at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise csv.Error(f"a quoted field is never closed (line {reader.line_num} is the last)") from None
        return BadRow("not valid CSV", f"line {reader.line_num} is not valid CSV: {error}")


def _record(columns: list[str], fields: list[str]) -> Row:
    if len(fields) > len(columns):
        return BadRow(
            "too many fields",
            f"the row has {len(fields)} fields and the header {len(columns)}; a text with a comma stands in quotes",
        )
    return dict(zip(columns, fields, strict=False))


def _parquet(file: Path) -> Iterator[tuple[str, Row]]:
    """Read without `datasets`, which decodes pictures and sounds of columns that nobody asks for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{file}: cannot be read: two columns are called '{twice}'; which one is meant?")
            number = 0
            for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", without_gaps(row)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None


def without_gaps(value: object) -> object:
    """A table's value without the keys whose value is null: in a column of objects each has every key of all."""
    if isinstance(value, dict):
        return {key: without_gaps(part) for key, part in value.items() if part is not None}
    return [without_gaps(part) for part in value] if isinstance(value, list) else value
