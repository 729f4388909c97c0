"""Self-Instruct: an instruction with several inputs and outputs; each pair of these is a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data.layouts.alpaca import asked
from edgelora.data.layouts.cells import cell
from edgelora.data.row import Broken, Dropped, Row
from edgelora.recipe import Reading


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    if not {"instruction", "instances"} <= set(columns) or reading.question or reading.answer:
        return None
    return {"question": "instruction", "context": "instances.input", "answer": "instances.output", "group": "instruction"}


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    for line, record in records:
        instances = record.get("instances")
        if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
            yield Broken(line, "`instances` is not a list of inputs and outputs", record, 'for instance [{"input": "", "output": "..."}]')
            continue
        instruction = cell(record.get("instruction"))
        for one in instances:
            question = asked(instruction, cell(one.get("input")))
            yield Row((("user", question), ("assistant", cell(one.get("output")))), line, f"question:{instruction}")
