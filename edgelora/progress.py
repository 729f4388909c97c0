"""What a long job tells of itself: the share of it that is done, and a text."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, str], None]


def part(progress: Progress, number: int, of: int) -> Progress:
    """Progress of one of `of` equal steps."""
    return lambda share, text: progress((number + share) / of, text)
