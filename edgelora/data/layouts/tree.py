"""OpenAssistant's message trees: every path from the prompt to a last assistant's reply is a row; a tree is a group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data.layouts.cells import ROLES
from edgelora.data.row import Broken, Dropped, Row
from edgelora.recipe import Reading

_DEEPEST = 200  # turns


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    prompt = first.get("prompt")
    if not isinstance(prompt, dict) or "replies" not in prompt:
        return None
    return {"messages": "prompt", **({"group": "message_tree_id"} if "message_tree_id" in columns else {})}


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    for line, record in records:
        group = f"conversation:{record.get(mapping['group'])}" if "group" in mapping else f"conversation:{line}"
        try:
            found = list(dict.fromkeys(_paths(record["prompt"], ())))
        except (KeyError, TypeError, ValueError) as error:
            yield Broken(line, f"not a tree of messages ({error!r})"[:200], record, "a message has text, role and replies")
            continue
        if not found:
            yield Dropped(line, "does not end with an answer", record)
        yield from (Row(path, line, group) for path in found)


def _paths(message: Mapping[str, Any], before: tuple[tuple[str, str], ...]) -> Iterator[tuple[tuple[str, str], ...]]:
    """The longest paths that end with the assistant: a question at the end of a branch is cut off."""
    path = (*before, (ROLES[message["role"]], str(message["text"])))
    if len(path) > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} turns")
    further = [found for reply in message.get("replies") or () for found in _paths(reply, path)]
    if further:
        yield from further
    elif path[-1][0] == "assistant":
        yield path
