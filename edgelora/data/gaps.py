"""Answers that look cut or unfinished. Found by their form and reported: only the owner knows what should stand there."""

from __future__ import annotations

import re
from collections import Counter

BROKEN_CHARACTER = "broken characters (�)"
OPEN_CODE = "a code block that is not closed"
CUT = "ends in the middle of a sentence"
PLACEHOLDER = "a placeholder that was never filled in"

_CUT = re.compile(
    r"(?:[,、，;:（(「『［\[{]|\b(?:and|or|the|a|an|of|to|in|with|for|is|are|that|which|because)|[のをはがにへとで])\Z"
    r"|(?:\.\.\.|…)\s*\[?(?:more|続き|read more|continued)\]?\Z",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"(?<![\\$\w{'\"])\{[a-z][a-z0-9]{2,30}(?:[-_][a-z0-9]{1,30}){0,4}\}(?!\})|\{\{[^{}\n]{1,80}\}\}|\[(?:TODO|TBD|INSERT[^\]\n]{0,60})\]|#REF!|#N/A|#VALUE!"
)
_LEAST_WORDS = 4  # a label or a name needs no full stop


def look(answer: str) -> list[str]:
    """What is wrong with the form of an answer, if anything."""
    found = []
    if "\ufffd" in answer:
        found.append(BROKEN_CHARACTER)
    if answer.count("```") % 2:
        found.append(OPEN_CODE)
    tail = answer[-40:].rstrip()[-24:]
    if (len(answer.split(None, _LEAST_WORDS)) > _LEAST_WORDS or len(answer) > 20) and _CUT.search(tail):
        found.append(CUT)
    if ("{" in answer or "[" in answer or "#" in answer) and _PLACEHOLDER.search(answer):
        found.append(PLACEHOLDER)
    return found


def cut_length(lengths: Counter[int]) -> tuple[int, int] | None:
    """(characters, answers): the longest length, when suspiciously many answers have exactly it, as after a cut at a limit."""
    if not lengths:
        return None
    longest = max(lengths)
    return (longest, lengths[longest]) if longest >= 100 and lengths[longest] >= 5 and lengths[longest] > 2 * lengths[longest - 1] else None
