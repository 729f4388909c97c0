"""Commands about data: data inspect, data prepare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.inspect import inspect
from edgelora.cli.output import PATH, Output, command
from edgelora.cli.reading import reading as reading_options
from edgelora.errors import UsageError

if TYPE_CHECKING:
    from edgelora.recipe import Reading

_WHERE = click.Choice(["all", "answers", "none"])
_STEPS = {  # of a recipe's data.clean, in their order
    "mojibake": "Text decoded with a wrong encoding.",
    "controls": "Control and invisible characters, odd spaces.",
    "tokens": "Stray tokens of chat templates.",
    "html": "HTML tags and entities.",
    "ruby": "Ruby and notes of Aozora Bunko.",
    "markup": "Wiki and AsciiDoc marks.",
    "width": "Half-width kana, full-width letters and digits.",
    "joins": "Spaces between Japanese words.",
    "whitespace": "Runs of spaces, trailing spaces, blank lines.",
    "variants": "Japanese notation variants, by majority.",
    "spelling": "British and American English, by majority.",
}
_CHOICES = {
    "typos": (("report", "fix", "none"), "English typos."),
    "personal": (("report", "remove", "none"), "Personal data."),
    "duplicates": (("drop", "none"), "Rows that repeat another."),
    "near": (("report", "drop", "none"), "Rows that are nearly the same."),
}


@click.group()
def data() -> None:
    """Look at data files and prepare them for training."""


data.add_command(inspect)


def _cleaning(function: Callable[..., None]) -> Callable[..., None]:
    """A switch for every cleaning step; the command gets those that were given as `clean`."""

    def wrapper(*arguments: Any, **options: Any) -> None:
        chosen = {name: value for name in (*_STEPS, *_CHOICES) if (value := options.pop(name)) is not None}
        function(*arguments, clean=chosen, **options)

    wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
    wrapper.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
    decorated: Callable[..., None] = wrapper
    for name, (values, text) in reversed(_CHOICES.items()):
        decorated = click.option(f"--{name}", type=click.Choice(values), help=f"{text} Default: {values[0]}.")(decorated)
    for name, text in reversed(_STEPS.items()):
        default = "answers" if name in ("variants", "spelling") else "all"
        decorated = click.option(f"--{name}", type=_WHERE, help=f"{text} Default: {default}.")(decorated)
    return decorated


@data.command()
@click.argument("file", type=PATH)
@click.option("-o", "--output", type=PATH, help="Folder to write; needed unless --dry-run.")
@click.option("--valid", type=PATH, help="A file of rows that select; default a share of FILE by hash.")
@click.option("--sealed", type=PATH, help="A file of rows that report; default a share of FILE by hash.")
@click.option("--held-out", metavar="NAME=FILE", multiple=True, help="A further file of rows that report. Repeatable.")
@click.option("--valid-share", type=click.FloatRange(0, 0.5, min_open=True, max_open=True), help="Share of the rows that select.")
@click.option("--sealed-share", type=click.FloatRange(0, 0.5, max_open=True), help="Share of the rows that report.")
@click.option(
    "--task", type=click.Choice(["chat", "classify"]), help="classify: answers are labels, which are never cleaned. Default: chat."
)
@reading_options()
@_cleaning
@click.option("--dictionary", type=PATH, help="Your own spellings, a YAML file: spelling -> the one to use.")
@click.option("--keep", multiple=True, metavar="WORD", help="A spelling that stays as it is. Repeatable.")
@click.option("--licence", help="Licence of the data, for its card.")
@click.option("--strict", is_flag=True, help="Stop at the first malformed record instead of listing it.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Processes that clean.")
@click.option("--show-changes", is_flag=True, help="List every kind of change and how often it was made.")
@click.option("--dry-run", is_flag=True, help="Say what would be changed, dropped and found, and write nothing.")
@command
def prepare(
    echo: Output,
    file: Path,
    output: Path | None,
    valid: Path | None,
    sealed: Path | None,
    held_out: tuple[str, ...],
    valid_share: float | None,
    sealed_share: float | None,
    task: str | None,
    reading: Reading,
    clean: dict[str, str],
    dictionary: Path | None,
    keep: tuple[str, ...],
    licence: str | None,
    strict: bool,
    processes: int,
    show_changes: bool,
    dry_run: bool,
) -> None:
    """Read, clean and split rows into a folder: train, valid and sealed as JSONL, a data card, every change and every dropped row.

    The folder then serves as `data.train` of a recipe.

    \b
    Example:  edgelora data prepare faq.csv -o faq-prepared --show-changes
    """
    from edgelora import recipe as recipes
    from edgelora.data import card, folder

    if output is None and not dry_run:
        raise UsageError("-o DIR is missing", "name the folder to write, or add --dry-run")
    here = Path()
    sets = dict(_named(one) for one in held_out)
    settings: dict[str, Any] = {
        **{name: value for name, value in recipes.as_dict(reading).items() if value is not None},
        "train": str(file.absolute()),
        **{name: str(path.absolute()) for name, path in (("valid", valid), ("sealed", sealed)) if path is not None},
        "held_out": {name: str(Path(path).absolute()) for name, path in sets.items()},
        **{
            name: value
            for name, value in (("task", task), ("valid_share", valid_share), ("sealed_share", sealed_share))
            if value is not None
        },
        "clean": {**clean, "keep": list(keep), "dictionary": recipes.load_mapping(dictionary) if dictionary else {}},
    }
    chosen = recipes.parse({"name": "data", "base": "none", "data": settings}, source="the command line").data
    with echo.progress() as progress:
        options: dict[str, Any] = {
            "licence": licence,
            "processes": processes,
            "lenient": not strict,
            "progress": lambda share, text: progress("prepare", share, text),
        }
        if dry_run:
            found = folder.look(chosen, here, **options)
        else:
            assert output is not None
            found = dict(folder.write(chosen, here, output.absolute(), **options).facts)
    shown = (
        [f"{step}: {b!r} -> {a!r}, {n:,} times" for step, entry in found["changes"].items() for b, a, n in entry["most"]]
        if show_changes
        else []
    )
    end = (
        "nothing was written (--dry-run)"
        if dry_run
        else f"wrote {output}; next: data: {{train: {output}}} in a recipe. The card: {output}/card.md"
    )
    echo.result(found, *card.lines(found), *shown, end)


def _named(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not sign or not name or not path:
        raise UsageError(f"--held-out {text!r} is not NAME=FILE", "for instance --held-out test=test.csv")
    return name, path
