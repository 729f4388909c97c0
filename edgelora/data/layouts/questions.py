"""Questions alone, each waiting for its answer: what `predict` reads. Not in LAYOUTS, because nothing can be trained on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data import names
from edgelora.data.layouts.alpaca import asked
from edgelora.data.layouts.cells import cell
from edgelora.data.row import Dropped, Row
from edgelora.recipe import Reading


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    question = reading.question or names.pick(columns, names.QUESTIONS)
    context = reading.context or ("input" if question == "instruction" and "input" in columns else None)
    return {"question": question, **({"context": context} if context else {})} if question else None


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    for line, record in records:
        question = cell(record.get(mapping["question"]))
        if "context" in mapping:
            question = asked(question, cell(record.get(mapping["context"])))
        yield Row((("user", question),), line)
