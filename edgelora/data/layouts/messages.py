"""OpenAI's messages: {"messages": [{"role": "user", "content": "..."}, ...]}; also TRL's prompt and completion as such lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data.layouts.cells import conversation, grouped, identifier, under
from edgelora.data.row import Dropped, Row
from edgelora.recipe import Reading

_IDS = ("conversation_id", "tree_id", "message_tree_id", "dialogue_id", "thread_id")


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    if reading.question or reading.answer:
        return None
    if "messages" in columns:
        return {"messages": "messages", **grouped(reading)}
    if isinstance(first.get("prompt"), list) and isinstance(first.get("completion"), list):
        return {"question": "prompt", "answer": "completion", **grouped(reading)}
    return None


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    for line, record in records:
        group = under(identifier(record, _IDS), record, mapping)
        if "messages" in mapping:
            yield conversation(line, record, mapping["messages"], "role", "content", group)
        else:
            turns = [turn for part in ("prompt", "completion") if isinstance(record.get(part), list) for turn in record[part]]
            yield conversation(line, {"messages": turns}, "messages", "role", "content", group)
