"""Kinds of files that rows come in, one module each. A kind is a module with:

    def open_file(path: Path, reading: Reading) -> Opened

which looks at the beginning of the file, and reads the rest when its records are iterated. DataError for a file that is
not of this kind, malformed beyond the single record, or built to exhaust the memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.data.row import Record
from edgelora.errors import DataError
from edgelora.recipe import Reading

FORMATS = {
    "csv": "edgelora.data.files.delimited",
    "tsv": "edgelora.data.files.delimited",
    "xlsx": "edgelora.data.files.excel",
    "json": "edgelora.data.files.json_list",
    "jsonl": "edgelora.data.files.json_lines",
    "parquet": "edgelora.data.files.parquet",
    "text": "edgelora.data.files.text",
}
_SUFFIXES = {"ndjson": "jsonl", "txt": "text", "md": "text", "tab": "tsv", "xlsm": "xlsx", "pq": "parquet"}
_HEAD = 1 << 16  # bytes
# What a file says of itself in its first bytes; a suffix that says otherwise is wrong.
_MAGIC = {b"PK\x03\x04": "xlsx", b"PAR1": "parquet"}
_NOT_DATA = {
    b"\xd0\xcf\x11\xe0": ("an old Excel file (.xls)", "save it as .xlsx or .csv"),
    b"\x1f\x8b": ("compressed", "unpack it first (gunzip)"),
    b"%PDF": ("a PDF", "copy the questions and answers into a table"),
}


@dataclass(frozen=True)
class Opened:
    """A file whose form is known. `records` reads it from the start, each time it is called."""

    columns: tuple[str, ...]  # in the file's order; of JSON those of its first record
    records: Callable[[], Iterator[tuple[int, Record]]]
    encoding: str | None = None  # None: not a text file
    delimiter: str | None = None
    skipped: tuple[int, ...] = ()  # lines before the table that are not part of it
    header: int | None = None  # its line; 0: there is none
    counts: str = "line"  # what a record's number counts: lines of text, or rows
    sheet: str | None = None


def open_file(path: Path, reading: Reading) -> tuple[str, Opened]:
    """The format's name and the opened file."""
    name = reading.format or _detect(path)
    module: Any = importlib.import_module(FORMATS[name])
    return name, module.open_file(path, reading)


def _detect(path: Path) -> str:
    """By the first bytes where they say it, else by the suffix; .json may also hold one row a line."""
    head = _head(path)
    for magic, (what, hint) in _NOT_DATA.items():
        if head.startswith(magic):
            raise DataError(f"{path.name} is {what}", hint)
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    suffix = path.suffix.lower().removeprefix(".")
    name = _SUFFIXES.get(suffix, suffix)
    if name in ("json", "jsonl"):
        return _json_kind(head, name)
    if name not in FORMATS:
        raise DataError(
            f"{path.name}: {path.suffix or 'no suffix'} is not a known data format", f"set data.format, one of {', '.join(FORMATS)}"
        )
    return name


def _head(path: Path) -> bytes:
    from edgelora.data.lines import not_found

    try:
        with path.open("rb") as stream:
            return stream.read(_HEAD)
    except FileNotFoundError:
        raise not_found(path) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error


def _json_kind(head: bytes, name: str) -> str:
    """One JSON value a line, or one value over all lines? The suffix is often wrong; the first two lines are not."""
    first, *more = [line.strip() for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip(b" \t\r\0")] or [b""]
    if name == "jsonl":
        return "json" if first == b"[" or (first == b"{" and more) else "jsonl"
    return "jsonl" if first.startswith(b"{") and first.endswith(b"}") and more and more[0].startswith(b"{") else "json"
