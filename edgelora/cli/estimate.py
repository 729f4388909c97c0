"""The command that says beforehand what a recipe needs, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.output import PATH, SET, Output, calm_libraries, command, load_recipe
from edgelora.errors import UsageError

if TYPE_CHECKING:
    from edgelora import recipe as recipes
    from edgelora.data.lengths import Lengths
    from edgelora.outline import Outline
    from edgelora.train.estimate import Estimate

HERE = "here"


@click.command()
@click.argument("recipe", type=PATH, required=False)
@SET
@click.option(
    "--devices", metavar="NAMES", help="GPUs of the table, comma-separated; 'here' is this machine. Default all of them, and this machine."
)
@click.option("--prices", type=PATH, help="Table of GPUs, their prices and yen a dollar; default edgelora/gpus.yaml.")
@click.option("--rows", type=click.IntRange(1), help="Plan for so many rows instead of reading the recipe's data.")
@click.option("--tokens", type=click.IntRange(1), help="With --rows: tokens a row; default 256.")
@click.option("--probe", is_flag=True, help="Load the base, train 20 steps on this machine, and correct its row by them.")
@click.option(
    "--article", is_flag=True, help="Hold the figures of an introduction to fine-tuning against these estimates. Needs no recipe."
)
@command
def estimate(
    echo: Output,
    recipe: Path | None,
    overrides: tuple[str, ...],
    devices: str | None,
    prices: Path | None,
    rows: int | None,
    tokens: int | None,
    probe: bool,
    article: bool,
) -> None:
    """Memory, time, money, disk and sizes of a recipe, before anything is loaded or fetched: estimates.

    A base that is not on this machine is planned by its published shape, or by a folder with its config.json.

    \b
    Example:  edgelora estimate faq-7b --rows 10000 --tokens 256
    """
    from edgelora import gpus

    table = gpus.load(prices or gpus.TABLE)
    if article:
        from edgelora import article as introduction
        from edgelora.cli import costs

        found = introduction.tables(table)
        echo.result(found, *costs.article(found))
        return
    if recipe is None:
        raise UsageError("no recipe", "name one: edgelora estimate quickstart")
    if tokens and not rows:
        raise UsageError("--tokens is of rows that are assumed", "say how many, too: --rows N")
    if probe and rows:
        raise UsageError("--probe trains on the recipe's own rows", "leave --rows out")
    names = [name.strip() for name in devices.split(",")] if devices else []
    chosen = table.chosen([name for name in names if name != HERE]) if not names or set(names) != {HERE} else []
    calm_libraries()
    loaded = load_recipe(recipe, overrides, None)
    _estimate(echo, loaded, table, chosen, rows, tokens or 256, probe, not names or HERE in names or probe)


def _estimate(
    echo: Output, recipe: recipes.Recipe, table: Any, gpus: Sequence[Any], rows: int | None, tokens: int, probe: bool, here: bool
) -> None:
    from edgelora import doctor, outline
    from edgelora import estimate as whole
    from edgelora.cli import costs
    from edgelora.data import lengths, split

    base = outline.of(recipe.base, recipe.folder)
    dataset = None if rows else split.load(recipe)
    found = lengths.of(recipe, base, dataset) if dataset else lengths.assumed(rows or 0, tokens, recipe.data.valid_share)
    own = None
    if here and doctor.importable("torch"):
        own = _here(recipe, base, found)
        if probe and dataset:
            with echo.progress() as progress:
                own = whole.probed(recipe, base, dataset, found, own, lambda share, text: progress("probe", share, text))
    document = whole.estimate(recipe, base, found, table, gpus, own)
    echo.result(document, *costs.lines(document))


def _here(recipe: recipes.Recipe, base: Outline, found: Lengths) -> Estimate:
    from edgelora.train import estimate as training

    return training.training(base, recipe.train, found.train, training.here(recipe.train.dtype, recipe.threads), found.valid)
