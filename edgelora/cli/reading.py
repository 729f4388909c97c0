"""The options that say how a data file is read, where what is found out does not suit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from edgelora.data.files import FORMATS
from edgelora.data.layouts import LAYOUTS

_OPTIONS = {
    "format": {"type": click.Choice(list(FORMATS)), "help": "Format of the file; default found out."},
    "layout": {"type": click.Choice(list(LAYOUTS)), "help": "What its columns mean; default found out."},
    "encoding": {"help": "Encoding of the file, e.g. cp932; default found out."},
    "delimiter": {"help": "Delimiter of a CSV file, one character; default found out."},
    "header": {"type": click.IntRange(0), "help": "Line of the column names, 0 for none; default found out."},
    "sheet": {"help": "Sheet of a workbook; default the first that holds rows."},
    "question": {"help": "Column of the questions (or texts)."},
    "answer": {"help": "Column of the answers (or labels)."},
    "context": {"help": "Column that is put below the question."},
    "group": {"help": "Column whose equal values belong together."},
}


def reading(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """All of them but `without`; the command gets one `reading`, a recipe's Reading."""
    names = [name for name in _OPTIONS if name not in without]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*arguments: Any, **options: Any) -> None:
            from edgelora.errors import UsageError
            from edgelora.recipe import Reading

            chosen = {name: options.pop(name) for name in names}
            if chosen.get("delimiter") is not None:
                chosen["delimiter"] = chosen["delimiter"].replace("\\t", "\t")
                if len(chosen["delimiter"]) != 1:
                    raise UsageError(f"--delimiter {chosen['delimiter']!r} is not one character", "for instance --delimiter ';' or '\\t'")
            function(*arguments, reading=Reading(**chosen), **options)

        wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
        wrapper.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
        decorated: Callable[..., None] = wrapper
        for name in reversed(names):
            decorated = click.option(f"--{name}", **_OPTIONS[name])(decorated)  # type: ignore[arg-type]
        return decorated

    return decorate
