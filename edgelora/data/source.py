"""A data file as a stream of rows: its format, encoding and layout found out or as asked for, its rows in bounded memory."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from edgelora.data import files, names
from edgelora.data.files import Opened
from edgelora.data.layouts import LAYOUTS
from edgelora.data.row import Broken, Dropped, Row
from edgelora.errors import DataError
from edgelora.recipe import Reading

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell half of a surrogate pair, which no encoding can write
_FIRST = 100  # records, of which one at least must be whole
_MOST_DROPPED = 100_000  # beyond that, and beyond the rows that were kept, the file is something else


@dataclass
class Source:
    """One data file, ready to be read. Iterating gives every Row and, in its place, every Dropped record; `rows` rows alone."""

    path: Path
    format: str
    layout: str | None  # None: no column serves as the question or as the answer
    mapping: Mapping[str, str]  # what a column serves as -> its name
    opened: Opened
    reading: Reading
    answered: bool = True
    lenient: bool = False  # whether malformed records are dropped with their reason instead of ending the reading
    dropped: list[tuple[int, str]] = field(default_factory=list)  # by the last pass of `rows`: line, reason

    @property
    def encoding(self) -> str | None:
        return self.opened.encoding

    @property
    def delimiter(self) -> str | None:
        return self.opened.delimiter

    @property
    def columns(self) -> tuple[str, ...]:
        return self.opened.columns

    def rows(self) -> Iterator[Row]:
        """The rows from the start of the file. `dropped` fills on the way."""
        self.dropped.clear()
        kept = 0
        for found in self:
            if isinstance(found, Row):
                yield found
                kept += 1
            else:
                self.dropped.append((found.line, found.reason))
                if len(self.dropped) > max(_MOST_DROPPED, kept):
                    raise DataError(
                        f"{self.path.name} {self.opened.counts} {found.line}: more than {_MOST_DROPPED:,} records make no row ({found.reason})",
                        f"columns used: {', '.join(self.mapping.values())}; name others, or look at the file",
                    )

    def __iter__(self) -> Iterator[Row | Dropped]:
        broken: list[Broken] = []

        def records() -> Iterator[tuple[int, Mapping[str, Any]]]:
            for line, record in self.opened.records():
                if isinstance(record, Broken):
                    broken.append(record)
                else:
                    yield line, record

        for found in self._layout().rows(records(), self.mapping):
            yield from self._judged(broken)
            if isinstance(found, Row):
                yield self._checked(found)
            else:
                yield from self._judged([found])
        yield from self._judged(broken)

    def _layout(self) -> ModuleType:
        if self.layout is None:
            raise self.unmapped()
        return _module(self.layout)

    def unmapped(self) -> DataError:
        """Why a file without a layout makes no rows."""
        what = "answer" if self.reading.question or names.pick(self.columns, names.QUESTIONS) else "question"
        shown = ", ".join(self.columns[:20]) + (", ..." if len(self.columns) > 20 else "")
        return DataError(f"{self.path.name}: no column looks like the {what}", f"its columns: {shown}; set data.{what}")

    def _judged(self, found: list[Any]) -> Iterator[Dropped]:
        """What was left out; a malformed record ends the reading unless it is lenient."""
        for one in found:
            if isinstance(one, Broken) and not self.lenient:
                raise DataError(f"{self.path.name} {self.opened.counts} {one.line}: {one.reason}", one.hint)
            yield one
        found.clear()

    def _checked(self, row: Row) -> Row | Dropped:
        """The row as it is trained on: with the system message, an end that is an answer, and no empty turn."""
        messages = tuple(m for m in row.messages if m[0] != "system" or m[1].strip())
        if not self.answered and messages and messages[-1][0] == "assistant":
            messages = messages[:-1]
        if self.reading.system and messages and messages[0][0] not in ("system", "text"):
            messages = (("system", self.reading.system), *messages)
        if not messages or any(not content.strip() for _, content in messages):
            return Dropped(row.line, "empty", _shown(row))
        if any(_HALF_CHARACTER.search(content) for _, content in messages):
            return Dropped(row.line, "half a character (a lone surrogate)", _shown(row))
        if self.answered and messages[0][0] != "text" and (messages[-1][0] != "assistant" or len(messages) < 2):
            return Dropped(row.line, "does not end with an answer", _shown(row))
        return Row(messages, row.line, row.group)


def open_source(path: Path, reading: Reading, *, answered: bool = True, lenient: bool = False) -> Source:
    """Look at the beginning of a file and say how it will be read.

    With ``answered=False`` rows are questions, each waiting for its answer. DataError for a file that cannot be read at
    all, that holds no records, or has no column that `reading` names.
    """
    name, opened = files.open_file(path, reading)
    first = list(islice((record for _, record in opened.records()), _FIRST))
    if not first:
        raise DataError(f"{path.name} holds no rows", "put one question and answer on each line below the header")
    sample = next((record for record in first if not isinstance(record, Broken)), first[0])
    if isinstance(sample, Broken):
        raise DataError(f"{path.name} {opened.counts} {sample.line}: {sample.reason}", sample.hint)
    for what in ("question", "answer", "context", "group"):
        wanted = getattr(reading, what)
        if wanted is not None and wanted not in opened.columns and (answered or what != "answer"):
            raise DataError(f"{path.name} has no column {wanted!r}", f"its columns: {', '.join(opened.columns)}; set data.{what}")
    layout, mapping = _find_layout(path, opened, sample, reading, answered)
    return Source(path, name, layout, mapping, opened, reading, answered, lenient)


def _find_layout(
    path: Path, opened: Opened, first: Mapping[str, Any], reading: Reading, answered: bool
) -> tuple[str | None, dict[str, str]]:
    if reading.layout is not None:
        mapping = _fits(reading.layout, opened.columns, first, reading)
        if mapping is None:
            raise DataError(
                f"{path.name} is not of the layout {reading.layout}", f"its columns: {', '.join(opened.columns)}; leave out data.layout"
            )
        return reading.layout, mapping
    for name in LAYOUTS if answered else ("messages", "sharegpt", "questions"):
        mapping = _fits(name, opened.columns, first, reading)
        if mapping is not None:
            return name, mapping
    return None, {}


def _fits(layout: str, columns: tuple[str, ...], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    found: dict[str, str] | None = _module(layout).mapping(columns, first, reading)
    return found


def _module(layout: str) -> ModuleType:
    return importlib.import_module(LAYOUTS.get(layout, "edgelora.data.layouts.questions"))


def _shown(row: Row) -> Mapping[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in row.messages]}
