"""English typos: rare words that no dictionary knows and that are one slip away from a common one. Reported; changed on request.

The dictionary and the search are symspellpy's (82,765 words with their frequencies). A word that the data set itself uses more
often is its own vocabulary, not a typo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from edgelora.data.clean import english
from edgelora.data.clean.edits import Edit, outside_quotes

WORD = re.compile(r"(?<![\w'’./@#$%&*+=-])[a-z]{5,24}(?![\w'’/@#$%&*+=-]|\.\w)")
_MOST_OFTEN = 2  # occurrences; more is a habit
_COMMON = 100_000  # occurrences of the suggestion in the dictionary's corpus


@dataclass(frozen=True)
class Typo:
    word: str
    suggestion: str
    count: int


def find(vocabulary: Mapping[str, int]) -> list[Typo]:
    """The likely typos among a data set's words and what was probably meant, most certain reading first."""
    from symspellpy import Verbosity

    speller = _speller()
    either_side = {spelling for british, (american, _) in english.british_to_american().items() for spelling in (british, american)}
    found = []
    for word, count in vocabulary.items():
        if count > _MOST_OFTEN or word in speller.words or word in either_side:
            continue
        if word.endswith("s") and (word[:-1] in speller.words or vocabulary.get(word[:-1], 0) > _MOST_OFTEN):
            continue  # a plural that the dictionary lacks
        near = speller.lookup(word, Verbosity.CLOSEST, max_edit_distance=1)
        known = [s for s in near if s.count >= _COMMON or vocabulary.get(s.term, 0) > _MOST_OFTEN]
        if known:
            best = max(known, key=lambda s: (vocabulary.get(s.term, 0), s.count))
            found.append(Typo(word, best.term, count))
    return sorted(found, key=lambda typo: typo.word)


def fix(text: str, typos: Mapping[str, str], edits: list[Edit]) -> str:
    """`text` with the words of `typos` replaced."""

    def one(part: str, edits: list[Edit]) -> str:
        def new(match: re.Match[str]) -> str:
            after = typos.get(match[0])
            if after is None:
                return match[0]
            edits.append(Edit(match[0], after))
            return after

        return WORD.sub(new, part)

    return outside_quotes(one, text, edits)


@cache
def _speller() -> Any:
    from importlib.resources import files

    from symspellpy import SymSpell

    speller = SymSpell(max_dictionary_edit_distance=1, prefix_length=7)
    speller.load_dictionary(str(files("symspellpy") / "frequency_dictionary_en_82_765.txt"), term_index=0, count_index=1)
    return speller
