"""Plain text: every paragraph (lines up to a blank one) is a record of one column, long ones cut at the end of a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgelora.data.encoding import encoding_of
from edgelora.data.files import Opened
from edgelora.data.lines import lines
from edgelora.data.row import Record
from edgelora.recipe import Reading

_LONGEST = 2000  # characters, after which a paragraph ends with its line: a model trains on some hundred tokens at a time


def open_file(path: Path, reading: Reading) -> Opened:
    encoding = encoding_of(path, reading.encoding)
    return Opened(("text",), lambda: _records(path, encoding), encoding)


def _records(path: Path, encoding: str) -> Iterator[tuple[int, Record]]:
    paragraph: list[str] = []
    begin = size = 0
    for number, line in enumerate(lines(path, encoding), 1):
        line = line.rstrip("\r\n")  # the file's own line ends, not the text's
        if line.strip() and size < _LONGEST:
            begin = begin or number
            paragraph.append(line)
            size += len(line)
        elif paragraph:
            yield begin, {"text": "\n".join(paragraph)}
            paragraph, begin, size = ([line], number, len(line)) if line.strip() else ([], 0, 0)
    if paragraph:
        yield begin, {"text": "\n".join(paragraph)}
