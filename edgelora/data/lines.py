"""The lines of a text file in bounded memory, whatever the file holds."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from edgelora.errors import DataError

MAX_LINE = 8 << 20  # characters; a row of data is far shorter, and a file without line ends must not fill the memory
_CHUNK = 1 << 20  # bytes


def lines(path: Path, encoding: str) -> Iterator[str]:
    """Every line with its end (LF, CRLF or CR). DataError with the line number for bytes that are not text in `encoding`."""
    with open_text(path, encoding) as stream:
        number = 0
        try:
            while line := stream.readline(MAX_LINE + 1):
                number += 1
                check(path, line, number)
                if len(line) > MAX_LINE:
                    raise DataError(
                        f"{path.name} line {number} is longer than {MAX_LINE >> 20} Mi characters",
                        "a row of data is far shorter: is this a text file with one row a line?",
                    )
                yield line
        except UnicodeDecodeError:
            raise misencoded(path, encoding) from None


def open_text(path: Path, encoding: str) -> TextIO:
    """A text file with its line ends as they are. DataError when it cannot be opened or `encoding` is none."""
    try:
        if not codecs.lookup(encoding)._is_text_encoding:
            raise LookupError
        return path.open(encoding=encoding, newline="")
    except LookupError:
        raise DataError(f"{encoding!r} is not an encoding", "set data.encoding, for instance utf-8, cp932 or cp1252") from None
    except FileNotFoundError:
        raise not_found(path) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error


def check(path: Path, text: str, line: int) -> None:
    """DataError when `text`, which begins at `line`, holds a NUL."""
    if "\0" in text:
        raise DataError(
            f"{path.name} line {line + text.count(chr(10), 0, text.index(chr(0)))}: a NUL byte; this is not a text file",
            "export the data as CSV or JSONL",
        )


def misencoded(path: Path, encoding: str) -> DataError:
    """Where the first bytes stand that are not `encoding`."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(_CHUNK)
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(encoding, "ignore").count("\n")
                return DataError(
                    f"{path.name} line {line}: byte 0x{error.object[error.start]:02x} is not {encoding}",
                    "set data.encoding, for instance cp932 (Excel in Japan), or mend that line",
                )
            if not chunk:
                return DataError(f"{path.name} is not {encoding}", "set data.encoding, for instance cp932 (Excel in Japan)")


def not_found(path: Path) -> DataError:
    return DataError(f"data file not found: {path}", "check `data:` in the recipe; paths are relative to the recipe")
