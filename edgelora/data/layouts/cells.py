"""Cells as text, and turns as messages: what the layouts share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgelora.data.row import Broken, Dropped, Row
from edgelora.recipe import Reading

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "agent": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}


def cell(value: Any) -> str:
    """A value as text: nothing as "", text as it is, everything else as JSON."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def conversation(line: int, record: Mapping[str, Any], column: str, role: str, content: str, group: str | None) -> Row | Dropped:
    """The row of a column of turns, whose speaker and text stand under the keys `role` and `content`."""
    turns = record.get(column)
    if not isinstance(turns, list):
        looks = json.dumps({column: [{role: "user", content: "..."}]})
        return Broken(line, f"`{column}` is not a list", record, f"a row looks like {looks}")
    found: list[tuple[str, str]] = []
    for turn in turns:
        speaker = turn.get(role) if isinstance(turn, dict) else None
        words = text_of(turn.get(content)) if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker.lower() not in ROLES or words is None:
            return Broken(line, f"{str(turn)[:80]!r} is not a message", record, f"{role} is one of {', '.join(ROLES)}; {content} is text")
        found.append((ROLES[speaker.lower()], words))
    return Row(tuple(found), line, group)


def text_of(content: Any) -> str | None:
    """The text of a message: text itself, or a list of text parts as OpenAI writes them."""
    if isinstance(content, list) and content and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else None


def identifier(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The group that a conversation's own identifier makes."""
    name = next((name for name in names if isinstance(record.get(name), (str, int))), None)
    return f"conversation:{record[name]}" if name else None


def grouped(reading: Reading) -> dict[str, str]:
    """The mapping of the group's column, where one was asked for."""
    return {"group": reading.group} if reading.group else {}


def under(group: str | None, record: Mapping[str, Any], mapping: Mapping[str, str]) -> str | None:
    """The group by the column that was asked for, else `group`."""
    return f"conversation:{cell(record.get(mapping['group']))}" if "group" in mapping else group
