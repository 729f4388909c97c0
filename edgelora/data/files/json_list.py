"""JSON: a list of rows, or an object that holds one ({"data": [...]}), read one row at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from edgelora.data.encoding import encoding_of
from edgelora.data.files import Opened
from edgelora.data.files.json_value import as_record, columns
from edgelora.data.lines import MAX_LINE, check, misencoded, open_text
from edgelora.data.row import Record
from edgelora.errors import DataError
from edgelora.recipe import Reading

_CHUNK = 1 << 16  # characters
_SPACE = re.compile(r"[ \t\r\n]*")


def open_file(path: Path, reading: Reading) -> Opened:
    encoding = encoding_of(path, reading.encoding)
    return Opened(columns(_records(path, encoding)), lambda: _records(path, encoding), encoding, counts="row")


def _records(path: Path, encoding: str) -> Iterator[tuple[int, Record]]:
    try:
        with open_text(path, encoding) as stream:
            for number, value in enumerate(_rows(_Scanner(path, stream)), 1):
                yield number, as_record(number, value)
    except UnicodeDecodeError:
        raise misencoded(path, encoding) from None


def _rows(scanner: _Scanner) -> Iterator[Any]:
    """The values of the list that the file is, or of the first list of objects in the object that it is."""
    opening = scanner.peek()
    if opening == "[":
        yield from _items(scanner)
    elif opening == "{":
        found = False
        scanner.take("{")
        while scanner.peek() != "}":
            scanner.value()  # the key
            scanner.take(":")
            if scanner.peek() == "[" and not found:
                for value in _items(scanner):
                    found |= isinstance(value, dict)
                    if found:
                        yield value
            else:
                scanner.value()
            if scanner.peek() == ",":
                scanner.take(",")
        scanner.take("}")
        if not found:
            raise scanner.error("expected a JSON list of rows, found dict", "put the rows into one list, or use .jsonl")
    elif opening:
        value = scanner.value()
        raise scanner.error(f"expected a JSON list of rows, found {type(value).__name__}", "put the rows into one list, or use .jsonl")
    if scanner.peek():
        raise scanner.error("more after the end of the list", "the file should hold one list; of one row a line, name it .jsonl")


def _items(scanner: _Scanner) -> Iterator[Any]:
    scanner.take("[")
    while scanner.peek() != "]":
        yield scanner.value()
        if scanner.peek() == ",":
            scanner.take(",")
        elif scanner.peek() != "]":
            raise scanner.error("not JSON (expected ',' or ']' after a row)", "look at the row before that line")
    scanner.take("]")


class _Scanner:
    """JSON values from a stream, one after the other. Holds no more than the value that it reads."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self.path, self.stream = path, stream
        self.text, self.at, self.line = "", 0, 1
        self.ended = False
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            self._move(_SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more(_CHUNK)

    def take(self, mark: str) -> None:
        if self.peek() != mark:
            raise self.error(f"not JSON (expected {mark!r})", "the file may have been cut short")
        self._move(self.at + 1)

    def value(self) -> Any:
        """The next value. DataError when it is none, or larger than any row."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if end < len(self.text) or self.ended:
                    self._move(end)
                    return value
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.error(f"not JSON ({error.msg})", "the file may have been cut short", error.pos) from error
                if error.pos < len(self.text) - _CHUNK and not error.msg.startswith("Unterminated"):
                    raise self.error(f"not JSON ({error.msg})", "mend that line", error.pos) from error
            except RecursionError:
                raise self.error("nested too deeply", "each row should be one flat JSON object") from None
            except ValueError as error:  # a number of thousands of digits
                raise self.error(f"not a usable number ({error})", "write such numbers as text") from error
            size = len(self.text) - self.at
            if size > MAX_LINE:
                raise self.error(
                    f"a row of more than {MAX_LINE >> 20} Mi characters", "a row of data is far shorter: is this a list of rows?"
                )
            self._more(max(size, _CHUNK))

    def error(self, message: str, hint: str, position: int | None = None) -> DataError:
        line = self.line + self.text.count("\n", self.at, self.at if position is None else position)
        return DataError(f"{self.path.name} line {line}: {message}", hint)

    def _move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _more(self, characters: int) -> None:
        text = self.stream.read(characters)
        check(self.path, text, self.line + self.text.count("\n", self.at))
        self.text, self.at, self.ended = self.text[self.at :] + text, 0, not text
