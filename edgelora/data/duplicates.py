"""Rows that are nearly the same, found by MinHash (rensa) over pieces of five characters.

Signatures that agree in a whole band are candidates; a pair counts when its Jaccard similarity, computed exactly, is high enough.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

PERMUTATIONS = 64
_BAND = 4  # numbers a band: 16 bands find a pair of similarity 0.8 with probability 0.9998
_PIECE = 5  # characters
_SLACK = 0.2  # an estimate from 64 numbers is off by 0.05 (one standard deviation)
_SEED = 1
_SPACES = re.compile(r"\W+")


class Near(NamedTuple):
    """Row `row` is nearly the same as row `like`, which stays (indices into the rows)."""

    row: int
    like: int
    similarity: float


def pieces(text: str) -> set[str]:
    """All runs of five characters of a text without case, widths and punctuation; a shorter text is one piece."""
    folded = _SPACES.sub(" ", unicodedata.normalize("NFKC", text).lower()).strip()
    return {folded[i : i + _PIECE] for i in range(max(1, len(folded) - _PIECE + 1))}


def signature(text: str) -> np.ndarray:
    """MinHash of a text's pieces, uint32 (64,)."""
    from rensa import RMinHash

    made = RMinHash(num_perm=PERMUTATIONS, seed=_SEED)
    made.update(list(pieces(text)))
    return np.array(made.digest(), dtype=np.uint32)


def near(signatures: np.ndarray, first: Sequence[int] | np.ndarray, similarity: float, text: Callable[[int], str]) -> list[Near]:
    """Every row that is nearly the same as one that comes before it in the order `first`.

    `signatures` is uint32 (rows, 64); `first` lists rows, those to be kept before the others; `text` gives a row's text.
    """
    found: dict[int, Near] = {}
    known: dict[int, set[str]] = {}
    for like, row in _candidates(signatures, np.asarray(first)):
        if row in found or like in found:
            continue
        if float((signatures[row] == signatures[like]).mean()) < similarity - _SLACK:
            continue
        if like not in known:
            known.clear()  # candidates come sorted by the row that stays
            known[like] = pieces(text(like))
        exact = _jaccard(known[like], pieces(text(row)))
        if exact >= similarity:
            found[row] = Near(row, like, exact)
    return sorted(found.values())


def _candidates(signatures: np.ndarray, first: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs (row that stays, row) that agree in a band, each once, sorted by the place of the row that stays."""
    ordered = signatures[first]
    pairs: list[Any] = []
    for start in range(0, PERMUTATIONS, _BAND):
        bands = np.ascontiguousarray(ordered[:, start : start + _BAND]).view(np.dtype((np.void, 4 * _BAND))).ravel()
        order = np.argsort(bands, kind="stable")  # equal bands side by side, in the order of `first`
        same = np.flatnonzero(bands[order][1:] == bands[order][:-1])
        if not len(same):
            continue
        opens = np.ones(len(order), dtype=bool)
        opens[same + 1] = False
        leader = order[np.maximum.accumulate(np.where(opens, np.arange(len(order)), 0))]
        pairs.append(np.stack([leader[same + 1], order[same + 1]], axis=1))
    if not pairs:
        return
    for a, b in np.unique(np.concatenate(pairs), axis=0):
        yield int(first[a]), int(first[b])


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)
