"""What makes two rows belong together or be the same: hashes of their raw text under one fixed, versioned normalization.

Nothing here ever looks at cleaned text, so no cleaning switch moves a row from one set into another.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import NamedTuple

from edgelora.data.row import Row

VERSION = 1
_NOT_WORD = re.compile(r"[^a-z0-9]+")
_END = " .,!?;:。、！？．，…"


class Keys(NamedTuple):
    """Of one row, as unsigned 64-bit numbers. `group` decides the set.

    `question` is the whole question under version 1; `answer` the answer, and `pair` it with the question, whatever case,
    width and last punctuation; `raw` the row as it stands. `elsewhere`: what the group is called in other files, where a file's own identifiers mean nothing.
    """

    group: int
    question: int
    answer: int
    pair: int
    raw: int
    elsewhere: int


def keys(row: Row) -> Keys:
    question = _short(question_key(row.question))
    group = question if row.group is None else _short(group_key(row))
    answer = _plain(row.answer)
    return Keys(
        group=group,
        question=question,
        answer=_number(answer),
        pair=_number(f"{_plain(row.question)}\0{answer}"),
        raw=_number("\0".join(f"{role}\0{content}" for role, content in row.messages)),
        elsewhere=question if row.group is None or row.group.startswith("conversation:") else group,
    )


def group_key(row: Row) -> str:
    """Hash (hex) that keeps together what belongs together: what the file says, otherwise equal questions."""
    if row.group is None:
        return question_key(row.question)
    kind, _, name = row.group.partition(":")
    if kind == "question":
        return question_key(name)
    return _digest(f"{VERSION}:{kind}:{normal(name)}")


def question_key(text: str) -> str:
    """Hash (hex) of a question under version 1."""
    return _digest(f"{VERSION}:{normal(text)}")


def normal(text: str) -> str:
    """Version 1 of the normalization: NFKC, lower case, letters and digits only."""
    if text.isascii():
        return _NOT_WORD.sub("", text.lower())
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).lower()))


def point(key: int) -> float:
    """Where a group lies in [0, 1): the share of all groups below it."""
    return (key >> 12) / 2.0**52


def _plain(text: str) -> str:
    folded = " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())
    return folded.rstrip(_END) or folded


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _short(digest: str) -> int:
    return int(digest[:16], 16)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
