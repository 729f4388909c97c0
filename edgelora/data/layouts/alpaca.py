"""Alpaca: instruction, input (often empty), output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data.layouts.cells import cell, grouped, under
from edgelora.data.row import Dropped, Row
from edgelora.recipe import Reading


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    if not {"instruction", "output"} <= set(columns) or (reading.question or "instruction", reading.answer or "output") != (
        "instruction",
        "output",
    ):
        return None
    context = {"context": "input"} if "input" in columns else {}
    return {"question": "instruction", **context, "answer": "output", **grouped(reading)}


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    for line, record in records:
        question = asked(cell(record.get("instruction")), cell(record.get("input")))
        yield Row((("user", question), ("assistant", cell(record.get("output")))), line, under(None, record, mapping))


def asked(instruction: str, given: str) -> str:
    """An instruction with what it is about."""
    return f"{instruction}\n\n{given}" if given.strip() else instruction
