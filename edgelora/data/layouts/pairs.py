"""Two columns: question and answer, prompt and completion, text and label, whatever their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data import names
from edgelora.data.layouts.alpaca import asked
from edgelora.data.layouts.cells import cell, under
from edgelora.data.row import Dropped, Row
from edgelora.recipe import Reading


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    question = reading.question or names.pick(columns, names.QUESTIONS, [reading.answer] if reading.answer else [])
    answer = reading.answer or names.pick(columns, names.ANSWERS, [question] if question else [])
    if question is None or answer is None:
        return None
    extra = {"context": reading.context, "group": reading.group}
    return {"question": question, "answer": answer, **{name: column for name, column in extra.items() if column}}


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    for line, record in records:
        question = cell(record.get(mapping["question"]))
        if "context" in mapping:
            question = asked(question, cell(record.get(mapping["context"])))
        yield Row((("user", question), ("assistant", cell(record.get(mapping["answer"])))), line, under(None, record, mapping))
