"""Answers to one prompt as a tree of tokens: what several begin with is read once, so that choosing among 77 labels costs about one.

    "card lost"     card ─┬─ lost ──── <stop>
    "card stolen"         └─ stolen ── <stop>

Node i holds a token and the node before it (-1: the prompt's end). Parents come before their children.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edgelora.runtime import Session


@dataclass(frozen=True)
class Tree:
    """`tokens` and `parents` of the nodes; `paths`: the nodes of each answer, in order."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def inner(self) -> tuple[int, ...]:
        """Nodes that something follows: only they have to be read, their predictions tell the rest."""
        return tuple(sorted(set(self.parents) - {-1}))

    def depth(self, node: int) -> int:
        """0 for a first token."""
        return 0 if self.parents[node] < 0 else 1 + self.depth(self.parents[node])


def tree(answers: Sequence[Sequence[int]]) -> Tree:
    """The tree of answers, which are token ids of at least one token each."""
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    paths = []
    for answer in answers:
        path: list[int] = []
        for token in answer:
            path.append(nodes.setdefault((path[-1] if path else -1, token), len(nodes)))
        paths.append(tuple(path))
    return Tree(tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes), tuple(paths))


def in_order(last: np.ndarray, answers: Sequence[Sequence[int]], feed: Callable[[Sequence[int], int], np.ndarray]) -> list[np.ndarray]:
    """What `score_answers` gives, for a runtime that holds one sequence: in order, each answer begins where it parts from the one before.

    `last`: log-probabilities after the prompt, shape (1, vocabulary); `feed(ids, at)` forgets the answer's tokens from `at` on,
    reads `ids` and gives theirs, shape (len(ids), vocabulary).
    """
    found: list[np.ndarray] = [np.empty(0)] * len(answers)
    before: list[int] = []
    kept = last
    for place in sorted(range(len(answers)), key=lambda place: list(answers[place])):
        answer = list(answers[place])
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, answer[:-1], strict=False)))
        kept = kept[: same + 1]
        if fresh := answer[same:-1]:
            kept = np.concatenate([kept, feed(fresh, same)])
        before, found[place] = answer[:-1], kept[np.arange(len(answer)), answer]
    return found


def one_by_one(session: Session, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """What `score_answers` gives, by `score` alone: the prompt is read once an answer."""
    found = []
    for answer in answers:
        rows = session.score([*prompt, *answer[:-1]], first=len(prompt) - 1)
        found.append(rows[np.arange(len(answer)), list(answer)])
    return found
