"""JSONL: one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgelora.data.encoding import encoding_of
from edgelora.data.files import Opened
from edgelora.data.files.json_value import as_record, columns, parse
from edgelora.data.lines import lines
from edgelora.data.row import Record
from edgelora.recipe import Reading


def open_file(path: Path, reading: Reading) -> Opened:
    encoding = encoding_of(path, reading.encoding)
    return Opened(columns(_records(path, encoding)), lambda: _records(path, encoding), encoding)


def _records(path: Path, encoding: str) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(lines(path, encoding), 1):
        if line.strip():
            yield number, as_record(number, parse(line, number))
