"""What a cleaning step is: text in, text out, and every change in a list. Nothing is altered silently."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple


class Edit(NamedTuple):
    """One change: what stood there and what stands there now ('' when it was removed)."""

    before: str
    after: str


Step = Callable[[str, list[Edit]], str]

# Code and addresses mean exactly what they say. By what they cannot do without, so that only what may be there is looked for;
# every pattern is bounded or anchored, so that a megabyte stays linear.
_EXACT = {
    "`": r"```.*?(?:```|\Z)|`[^`\n]{1,300}`",
    "://": r"\b(?:https?|ftp|file)://[^\s<>「」『』（）、。]+",
    "@": r"(?<![A-Za-z0-9._+-])[A-Za-z0-9._+-]{1,64}@[A-Za-z0-9.-]{1,255}",
    "/": r"(?<![\w/.])~?/[\w.+-]+(?:/[\w.+-]+)+/?",  # a path
}
_QUOTED = re.compile(
    r"「[^「」\n]{1,80}」|『[^『』\n]{1,80}』|［[^［］\n]{1,80}］|【[^【】\n]{1,80}】"
    r"|“[^“”\n]{1,80}”|\"[^\"\n]{1,80}\"|\[[^\[\]\n]{1,80}\]|<[^<>\n]{1,80}>"
)


def substitute(pattern: re.Pattern[str], new: str | Callable[[re.Match[str]], str], text: str, edits: list[Edit]) -> str:
    """`pattern.sub` that lists what it changed."""

    def one(match: re.Match[str]) -> str:
        after = new if isinstance(new, str) else new(match)
        if after != match[0]:
            edits.append(Edit(match[0], after))
        return after

    return pattern.sub(one, text)


def outside_code(hint: re.Pattern[str], *, addresses: bool = False) -> Callable[[Step], Step]:
    """Makes a step that is applied only to texts in which `hint` is found, and there to what is neither code nor an address.

    With `addresses` it sees them, as part of the marks around them.
    """
    exact = ("`",) if addresses else tuple(_EXACT)

    def decorate(step: Step) -> Step:
        @functools.wraps(step)
        def guarded(text: str, edits: list[Edit]) -> str:
            return _outside_exact(step, text, edits, exact) if hint.search(text) else text

        return guarded

    return decorate


def outside_quotes(step: Step, text: str, edits: list[Edit]) -> str:
    """The step, applied to what is neither code, nor an address, nor a short quotation: labels and titles are quoted as they are."""
    return _outside_exact(lambda part, edits: _between(_QUOTED, step, part, edits), text, edits, tuple(_EXACT))


def difference(before: str, after: str, most: int = 60) -> Edit:
    """The part in which two texts differ, at most `most` characters of each."""
    left = 0
    while left < min(len(before), len(after)) and before[left] == after[left]:
        left += 1
    right = 0
    while right < min(len(before), len(after)) - left and before[-1 - right] == after[-1 - right]:
        right += 1
    return Edit(before[left : len(before) - right][:most], after[left : len(after) - right][:most])


def _outside_exact(step: Step, text: str, edits: list[Edit], exact: tuple[str, ...]) -> str:
    marks = tuple(mark for mark in exact if mark in text)
    return _between(_exact(marks), step, text, edits) if marks else step(text, edits)


@functools.cache
def _exact(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(_EXACT[mark] for mark in marks), re.DOTALL)


def _between(kept: re.Pattern[str], step: Step, text: str, edits: list[Edit]) -> str:
    pieces, end = [], 0
    for match in kept.finditer(text):
        pieces += [step(text[end : match.start()], edits), match[0]]
        end = match.end()
    if not pieces:
        return step(text, edits)
    return "".join([*pieces, step(text[end:], edits)])
