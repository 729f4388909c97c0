"""JSONL: one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgelora.data.encoding import encoding_of
from edgelora.data.files import Opened
from edgelora.data.files.json_value import as_record, parse
from edgelora.data.lines import lines
from edgelora.data.row import Broken, Record
from edgelora.recipe import Reading


def open_file(path: Path, reading: Reading) -> Opened:
    encoding = encoding_of(path, reading.encoding)
    first = next((record for _, record in _records(path, encoding) if not isinstance(record, Broken)), {})
    return Opened(tuple(first), lambda: _records(path, encoding), encoding)


def _records(path: Path, encoding: str) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(lines(path, encoding), 1):
        if line.strip():
            yield number, as_record(number, parse(line, number))
