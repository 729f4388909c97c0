"""Names of columns: which are usual for what, and what to call those without one."""

from __future__ import annotations

from collections.abc import Sequence

# Usual column names, best first; compared without case. Found columns are shown, and a recipe can name others.
QUESTIONS = ("question", "質問", "質問文", "instruction", "prompt", "query", "text", "input", "utterance", "問い", "q")
ANSWERS = ("answer", "回答", "回答文", "output", "completion", "response", "label", "category", "intent", "答え", "a")


def pick(columns: Sequence[str], usual: Sequence[str], taken: Sequence[str] = ()) -> str | None:
    """The column with the best of the usual names."""
    lower = {name.strip().lower(): name for name in reversed(columns) if name not in taken}
    return next((lower[name] for name in usual if name in lower), None)


def is_usual(cells: Sequence[str]) -> bool:
    """Whether one of a row's cells names a question or an answer."""
    return pick(cells, (*QUESTIONS, *ANSWERS)) is not None


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def numbered(width: int) -> tuple[str, ...]:
    return tuple(f"column {n}" for n in range(1, width + 1))


def unique(cells: Sequence[str]) -> tuple[str, ...]:
    """A header's cells as names: trimmed, empty ones numbered, repeated ones told apart. Empty ones at the end are no columns."""
    cells = [cell.strip() for cell in cells]
    while cells and not cells[-1]:
        cells.pop()
    found: list[str] = []
    for number, cell in enumerate(cells, 1):
        name = cell or f"column {number}"
        found.append(name if name not in found else f"{name} ({number})")
    return tuple(found)
