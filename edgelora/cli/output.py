"""What every command shares: how it speaks, its common options, and how it opens a recipe."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora import processes
from edgelora.errors import UsageError

if TYPE_CHECKING:
    from edgelora import recipe as recipes
    from edgelora.artifact import Artifact

Progress = Callable[[str, float, str], None]  # stage, share done, what is going on

PATH = click.Path(path_type=Path)
RECIPE = click.argument("recipe", type=PATH)
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. train.lr=2e-4. Repeatable.")
OUT = click.option("--out", type=PATH, help="Folder of the results; default runs/<name of the recipe>.")
GPUS = click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="Train on so many GPUs of this machine.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Print the plan (sizes, memory, time) and stop.")


class Output:
    """What a command says: one JSON document or lines on stdout, progress on stderr."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet or processes.index() > 0

    @property
    def debug(self) -> bool:
        return bool(click.get_current_context().find_root().ensure_object(dict).get("debug"))

    def result(self, document: Any, *lines: str) -> None:
        if processes.index():
            return
        if self.as_json:
            click.echo(json.dumps(document, ensure_ascii=False, indent=1, default=str))
        else:
            for line in lines:
                click.echo(line)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """A bar a stage on a terminal; silent elsewhere and with --quiet."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda stage, share, text: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.fields[stage]:>10}"), BarColumn(24), TextColumn("{task.percentage:>3.0f} %"))
        bars = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"), console=Console(stderr=True)
        )
        tasks: dict[str, Any] = {}

        def show(stage: str, share: float, text: str) -> None:
            if stage not in tasks:
                for done in tasks.values():
                    bars.update(done, completed=1.0)
                tasks[stage] = bars.add_task("", total=1.0, stage=stage)
            bars.update(tasks[stage], completed=share, description=text)

        with bars:
            yield show
            for task in tasks.values():
                bars.update(task, completed=1.0)


def _debug(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().ensure_object(dict)["debug"] = True


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The options that every command has; the command gets an Output as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @click.option("--quiet", is_flag=True, help="No progress bars.")
    @click.option("--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug, help="Show the traceback of an error.")
    def wrapper(as_json: bool, quiet: bool, **arguments: Any) -> None:
        if processes.count() > 1 and function.__name__ != "finetune":
            raise UsageError(f"{function.__name__} is no work for several processes", "start it without accelerate launch")
        function(Output(as_json=as_json, quiet=quiet), **arguments)

    wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
    wrapper.__click_params__ = [*getattr(function, "__click_params__", []), *wrapper.__click_params__]  # type: ignore[attr-defined]
    return wrapper


def load_recipe(recipe: Path, overrides: tuple[str, ...], out_dir: Path | None) -> recipes.Recipe:
    """A recipe file, or one of the package's own by its bare name."""
    import dataclasses

    from edgelora import recipe as recipes

    loaded = recipes.load(recipes.locate(recipe), overrides)
    return dataclasses.replace(loaded, out=str(out_dir)) if out_dir else loaded


def open_artifact(path: Path, kind: str) -> Artifact:
    """The artifact at `path`; UsageError when it is of another kind."""
    from edgelora import artifact

    found = artifact.load(path)
    if found.kind != kind:
        raise UsageError(f"{path}: expected an artifact of kind {kind}, found {found.kind}", f"name a folder {kind}-...")
    return found


def calm_libraries() -> None:
    """Third-party progress bars and warnings off: stdout is the result, stderr is ours."""
    import logging
    import warnings

    if click.get_current_context().find_root().ensure_object(dict).get("debug"):
        return
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|torch|accelerate|huggingface_hub)(\..*)?")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
