"""ShareGPT and dialogues of its kind: {"conversations": [{"from": "human", "value": "..."}, ...]}."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data.layouts.cells import conversation, grouped, identifier, under
from edgelora.data.row import Dropped, Row
from edgelora.recipe import Reading

_COLUMNS = ("conversations", "conversation", "utterances", "dialogue", "dialog", "turns")
_KEYS = (("from", "value"), ("role", "content"), ("role", "value"), ("speaker", "text"), ("role", "text"))
_IDS = ("id", "conversation_id", "dialogue_id")


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    column = next((name for name in _COLUMNS if name in columns), None)
    turns = first.get(column) if column else None
    turn = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    keys = next((keys for keys in _KEYS if all(key in turn for key in keys)), None)
    if column is None or keys is None or reading.question or reading.answer:
        return None
    return {"messages": column, "role": keys[0], "content": keys[1], **grouped(reading)}


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    for line, record in records:
        group = under(identifier(record, _IDS), record, mapping)
        yield conversation(line, record, mapping["messages"], mapping["role"], mapping["content"], group)
