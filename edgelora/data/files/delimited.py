"""CSV and TSV as spreadsheets and people write them: any delimiter, quotes or none, lines before the header, no header."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Literal

from edgelora.data import names
from edgelora.data.encoding import encoding_of
from edgelora.data.files import Opened
from edgelora.data.lines import lines
from edgelora.data.row import Broken, Record
from edgelora.errors import DataError
from edgelora.recipe import Reading

MAX_CELL = 1 << 20  # characters
_DELIMITERS = (",", "\t", ";", "|")
_SAMPLE = 1000  # lines that the delimiter and the header are found in
FIRST = 60  # rows within which the table begins


@dataclass(frozen=True)
class _Dialect:
    delimiter: str
    quoting: Literal[0, 3]


def open_file(path: Path, reading: Reading) -> Opened:
    encoding = encoding_of(path, reading.encoding)
    sample = list(islice(lines(path, encoding), _SAMPLE))
    if not "".join(sample).strip():
        raise DataError(f"{path.name} holds no rows", "put one question and answer on each line below the header")
    dialect = _dialect(sample, reading.delimiter, "\t" if path.suffix.lower() in (".tsv", ".tab") else ",")
    first = _first_rows(path, sample, dialect)
    header, columns = header_of(path, first, reading)
    return Opened(
        columns=columns,
        records=lambda: _records(path, encoding, dialect, columns, header),
        encoding=encoding,
        delimiter=dialect.delimiter,
        skipped=tuple(line for line, cells in first if line < header and any(cells)),
        header=header,
    )


def _records(path: Path, encoding: str, dialect: _Dialect, columns: Sequence[str], header: int) -> Iterator[tuple[int, Record]]:
    notes = bool(columns) and columns[0].startswith("#")  # a header with "#" stands among lines of notes with "#"
    for line, cells in _rows(path, lines(path, encoding), dialect):
        if line <= header or not cells or (notes and cells[0].startswith("#")):
            continue
        if any(cells[len(columns) :]):
            reason = f"{len(cells)} cells for {len(columns)} columns"
            yield line, Broken(line, reason, dialect.delimiter.join(cells), f"quote cells that contain {dialect.delimiter!r}")
        else:
            yield line, dict(zip(columns, cells, strict=False))


def _rows(path: Path, text: Iterator[str], dialect: _Dialect) -> Iterator[tuple[int, list[str]]]:
    """Line on which each row begins, and its cells."""
    reader = csv.reader(text, delimiter=dialect.delimiter, quoting=dialect.quoting, strict=True)
    while True:
        line = reader.line_num + 1
        old_limit = csv.field_size_limit(MAX_CELL)  # the library's limit is one for all readers: set it for this row alone
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path.name} line {line}: {error}", "look for an unclosed quotation mark in that row") from error
        finally:
            csv.field_size_limit(old_limit)
        yield line, cells


def _dialect(sample: Sequence[str], wanted: str | None, usual: str) -> _Dialect:
    """The delimiter and quoting under which the most rows have the same number of cells, more than one.

    Comma-separated files carry quotation marks as quotes. Tab-separated ones carry them as text, unless only quotes make
    their rows even (Excel quotes cells with line ends).
    """
    candidates = [wanted] if wanted else [usual, *(d for d in _DELIMITERS if d != usual)]
    best, best_score = _Dialect(candidates[0], _usual_quoting(candidates[0])), (0.0, 0)
    for delimiter in candidates:
        for quoting in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL) if delimiter == "\t" else (csv.QUOTE_MINIMAL,):
            score = _evenness(sample, delimiter, quoting)
            if score > best_score and score[0] > best_score[0] * 1.05:  # in doubt the usual one
                best, best_score = _Dialect(delimiter, quoting), score
    return best


def _usual_quoting(delimiter: str) -> Literal[0, 3]:
    return csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL


def _evenness(sample: Sequence[str], delimiter: str, quoting: Literal[0, 3]) -> tuple[float, int]:
    """Share of rows with the most frequent number of cells, and that number; (0, 0) when it is one."""
    counts: Counter[int] = Counter()
    try:
        for row in csv.reader(sample, delimiter=delimiter, quoting=quoting, strict=True):
            if row:
                counts[len(row)] += 1
    except csv.Error:  # the sample may end inside a quoted cell, so what was counted until here stands
        if not counts:
            return 0.0, 0
    width, rows = max(counts.items(), key=lambda item: (item[1], item[0]), default=(1, 0))
    return (rows / counts.total(), width) if width > 1 else (0.0, 0)


def _first_rows(path: Path, sample: Sequence[str], dialect: _Dialect) -> list[tuple[int, list[str]]]:
    first: list[tuple[int, list[str]]] = []
    try:
        first.extend(islice(_rows(path, iter(sample), dialect), FIRST))
    except DataError:  # the file itself is read to the end later, and says where it is broken
        if not first:
            raise
    return first


def header_of(path: Path, first: Sequence[tuple[int, list[str]]], reading: Reading) -> tuple[int, tuple[str, ...]]:
    """The header's line (0: none) and the columns' names.

    A header holds a usual name or one that was asked for. Else it is the first row that fills more than half of the
    columns, unless that row holds a number, which names no column.
    """
    width = max(len(cells) for _, cells in first)
    rows = [(line, cells) for line, cells in first if any(cell.strip() for cell in cells)]
    if reading.header == 0:
        return 0, names.numbered(width)
    if reading.header is not None:
        found = next((cells for line, cells in rows if line == reading.header), None)
        if found is None:
            raise DataError(
                f"{path.name} has no row at line {reading.header}", "set data.header to the line of the header, or to 0 for none"
            )
        return reading.header, names.unique(found)
    asked = {name for name in (reading.question, reading.answer, reading.group, reading.context) if name}
    for line, cells in rows:
        if asked and asked <= set(cells):
            return line, names.unique(cells)
    noted = list(takewhile(lambda row: row[1][0].startswith("#"), rows))  # open data puts "#" before notes and header alike
    for line, cells in [max(noted, key=lambda row: sum(map(bool, row[1])))] if noted else rows:
        filled = [cell for cell in cells if cell.strip()]
        if names.is_usual(cells) or len(filled) > width / 2:
            return (0, names.numbered(width)) if any(names.is_number(cell) for cell in filled) else (line, names.unique(cells))
    raise DataError(f"{path.name} has no header line", "the first line should name the columns, for instance question,answer")
