"""Plain text without turns: {"text": "..."}, or a text file's paragraphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data.layouts.cells import cell, grouped, under
from edgelora.data.row import Dropped, Row
from edgelora.recipe import Reading


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    if tuple(columns) != ("text",) and reading.layout != "text":
        return None
    column = reading.question or ("text" if "text" in columns else columns[0])
    return {"text": column, **grouped(reading)}


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    for line, record in records:
        yield Row((("text", cell(record.get(mapping["text"]))),), line, under(None, record, mapping))
