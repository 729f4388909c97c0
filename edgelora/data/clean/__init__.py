"""Cleaning: named steps, each a plain function from text to text whose every change is listed.

Rows are cleaned in two passes. The first mends each text by itself and counts spellings; the second, which knows the counts
of the whole data set, makes the spellings one. What decides (which rows train, which are sealed) never looks at cleaned text.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edgelora.data.clean import characters, personal, remnants, spaces, typos, variants
from edgelora.data.clean.edits import Edit, Step, outside_quotes
from edgelora.recipe import Clean

STEPS: Mapping[str, Step] = {  # those that look at one text alone, in the order in which they run
    "mojibake": characters.mojibake,
    "controls": characters.controls,
    "tokens": remnants.tokens,
    "html": remnants.html,
    "ruby": remnants.ruby,
    "markup": remnants.markup,
    "width": characters.width,
    "joins": spaces.joins,
    "whitespace": spaces.whitespace,
}
Messages = tuple[tuple[str, str], ...]
Steps = Sequence[tuple[str, str, Step]]  # (name, where it applies, step)
# What at least one of the steps above looks for; most English texts hold none of it, and looking once is ten times faster.
_REMARKABLE = re.compile(r"[^ -~]|[<&#\[=|]|'''|  |\A | \Z")


class Change(NamedTuple):
    """One change in one message. `turn` counts the row's messages from 0."""

    step: str
    turn: int
    before: str
    after: str


@dataclass
class Seen:
    """What the first pass learns of texts; two of them add up, so that processes can share the work."""

    spellings: variants.Counts = field(default_factory=Counter)
    vocabulary: Counter[str] = field(default_factory=Counter)

    def add(self, other: Seen) -> None:
        self.spellings.update(other.spellings)
        self.vocabulary.update(other.vocabulary)


@dataclass(frozen=True)
class Decided:
    """What the whole data set decided: spellings to replace, what was chosen or left open, and likely typos."""

    spellings: variants.Spellings
    choices: tuple[variants.Choice, ...]
    typos: tuple[typos.Typo, ...]

    @property
    def slips(self) -> dict[str, str]:
        return {typo.word: typo.suggestion for typo in self.typos}


def mend(messages: Messages, clean: Clean) -> tuple[Messages, list[Change]]:
    """The first pass over one row: every step that needs to know nothing but the text."""
    steps = [(name, getattr(clean, name), step) for name, step in STEPS.items()]
    if not any(_REMARKABLE.search(content) for _, content in messages):
        steps = []
    if clean.personal == "remove":
        steps.append(("personal", "all", personal.remove))
    return apply(messages, steps) if steps else (messages, [])


def observe(messages: Messages, clean: Clean, seen: Seen) -> None:
    """Count the spellings and words of a mended row. A spelling counts where it would be replaced."""
    for role, content in messages:
        japanese, english = _applies(clean.variants, role), _applies(clean.spelling, role)

        def look(part: str, edits: list[Edit], japanese: bool = japanese, english: bool = english) -> str:
            variants.count(part, seen.spellings, japanese_words=japanese, english_words=english)
            if clean.typos != "none":
                seen.vocabulary.update(typos.WORD.findall(part))
            return part

        outside_quotes(look, content, [])


def report_personal(messages: Messages, clean: Clean) -> list[tuple[int, personal.Found]]:
    """Personal data of a row as (turn, what was found), unless it is not to be looked for."""
    if clean.personal == "none":
        return []
    return [(turn, found) for turn, (_, content) in enumerate(messages) for found in personal.find(content)]


def decide(seen: Seen, clean: Clean) -> Decided:
    """What to write throughout, given what the training rows write."""
    spellings, choices = variants.choose(
        seen.spellings, least=clean.least, share=clean.majority, dictionary=clean.dictionary, keep=clean.keep
    )
    slips = typos.find(seen.vocabulary) if clean.typos != "none" and seen.vocabulary else []
    return Decided(spellings, tuple(choices), tuple(typo for typo in slips if typo.word not in clean.keep))


def unify(messages: Messages, clean: Clean, decided: Decided) -> tuple[Messages, list[Change]]:
    """The second pass over one row: the data set's own spellings, and typos where they are to be mended."""
    return apply(messages, second(clean, decided))


def second(clean: Clean, decided: Decided) -> Steps:
    """The steps of the second pass."""
    japanese = dataclasses.replace(decided.spellings, english={})
    english = variants.Spellings({}, {}, decided.spellings.english, {})
    steps: list[tuple[str, str, Step]] = []
    if japanese:
        steps.append(("variants", clean.variants, lambda text, edits: variants.unify(text, japanese, edits)))
    if english:
        steps.append(("spelling", clean.spelling, lambda text, edits: variants.unify(text, english, edits)))
    if clean.typos == "fix" and decided.typos:
        slips = decided.slips
        steps.append(("typos", "answers", lambda text, edits: typos.fix(text, slips, edits)))
    return steps


def apply(messages: Messages, steps: Steps) -> tuple[Messages, list[Change]]:
    """A row after `steps`, and what they changed."""
    changes: list[Change] = []
    cleaned = []
    for turn, (role, content) in enumerate(messages):
        for name, where, step in steps:
            if _applies(where, role):
                edits: list[Edit] = []
                content = step(content, edits)
                if edits:
                    changes += [Change(name, turn, before, after) for before, after in edits]
        cleaned.append((role, content))
    return tuple(cleaned), changes


def _applies(where: str, role: str) -> bool:
    """Plain text is answered text: it is all trained."""
    return where == "all" or (where == "answers" and role in ("assistant", "text"))
