"""Multiple choice: the question with its choices, and the right one as the answer. Equal questions are a group."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data import names
from edgelora.data.layouts.cells import cell
from edgelora.data.row import Broken, Dropped, Row
from edgelora.recipe import Reading

_CHOICE = re.compile(r"(choice|option)_?\d+", re.IGNORECASE)
_GOLD = ("label", "answer", "gold", "answerkey")


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    choices = [name for name in columns if _CHOICE.fullmatch(name)]
    gold = reading.answer or names.pick(columns, _GOLD)
    question = reading.question or names.pick(columns, names.QUESTIONS)
    if len(choices) < 2 or gold is None or question is None or not cell(first.get(gold)).isdigit():
        return None
    return {"question": question, "answer": gold, **{f"choice {n}": name for n, name in enumerate(choices)}}


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    columns = [column for name, column in mapping.items() if name.startswith("choice ")]
    for line, record in records:
        question, gold = cell(record.get(mapping["question"])), cell(record.get(mapping["answer"]))
        choices = [cell(record.get(column)) for column in columns]
        if not gold.isdigit() or int(gold) >= len(choices):
            yield Broken(line, f"label {gold[:40]!r} names none of {len(choices)} choices", record, "labels count the choices from 0")
            continue
        listed = "\n".join(f"{n}. {choice}" for n, choice in enumerate(choices, 1))
        yield Row((("user", f"{question}\n{listed}"), ("assistant", choices[int(gold)])), line, f"question:{question}")
