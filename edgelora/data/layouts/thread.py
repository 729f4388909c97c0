"""One message a record with the identifier of the message it answers: every path down to an assistant's message is a row.

The messages of a thread may stand anywhere in the file, so all of them are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgelora.data.layouts.cells import ROLES, cell
from edgelora.data.row import Broken, Dropped, Row
from edgelora.recipe import Reading

_PARENTS = ("parent_message_id", "parent_id")
_IDS = ("user_message_id", "message_id", "id")
_DEEPEST = 200  # turns


def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None:
    parent = next((name for name in _PARENTS if name in columns), None)
    own = next((name for name in _IDS if name in columns), None)
    text = next((name for name in ("text", "content") if name in columns), None)
    if not (parent and own and text and "role" in columns):
        return None
    return {"parent": parent, "id": own, "role": "role", "content": text}


def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]:
    messages: dict[str, tuple[int, str, str, str]] = {}  # by identifier: line, parent, role, text
    for line, record in records:
        role = ROLES.get(cell(record.get(mapping["role"])).lower())
        if role is None:
            yield Broken(line, f"role {record.get(mapping['role'])!r} is not known", record, f"known roles: {', '.join(ROLES)}")
        else:
            messages[cell(record.get(mapping["id"]))] = (
                line,
                cell(record.get(mapping["parent"])),
                role,
                cell(record.get(mapping["content"])),
            )
    # An answer is the end of a row unless another one follows further down its branch.
    inner: set[str] = set()
    for _, parent, role, _ in messages.values():
        for _ in range(_DEEPEST if role == "assistant" else 0):
            if parent not in messages or parent in inner:
                break
            inner.add(parent)
            parent = messages[parent][1]
    for own, (line, _, role, text) in messages.items():
        if role != "assistant" or own in inner:
            continue
        path: list[tuple[str, str]] = []
        at = own
        while at in messages and len(path) <= _DEEPEST:
            path.append((messages[at][2], messages[at][3]))
            root, at = at, messages[at][1]
        if len(path) > _DEEPEST:
            yield Broken(line, f"more than {_DEEPEST} messages answer each other", text, "look for messages that answer themselves")
        else:
            yield Row(tuple(reversed(path)), line, f"conversation:{root}")
