"""Commands that make something: init, run, finetune, merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelora.cli import lines
from edgelora.cli.output import DRY_RUN, GPUS, OUT, PATH, RECIPE, SET, Output, calm_libraries, command, load_recipe, open_artifact
from edgelora.cli.reading import reading
from edgelora.errors import CheckFailed, UsageError
from edgelora.own_process import keep_few_kernels

if TYPE_CHECKING:
    from edgelora import recipe as recipes


@click.command()
@click.argument("data", type=PATH)
@click.option("-o", "--output", type=PATH, help="Where to write the recipe; default <name of the data>.yaml.")
@click.option("--base", help="Base model; default the embedded one.")
@reading()
@command
def init(echo: Output, data: Path, output: Path | None, base: str | None, reading: recipes.Reading) -> None:
    """Look at a data file and write a commented recipe for it.

    \b
    Example:  edgelora init faq.csv -o faq.yaml
    """
    from edgelora.suggest import suggest

    target = output or Path(f"{data.stem}.yaml")
    if target.exists():
        raise UsageError(f"{target} exists", "choose another name with -o; a recipe is never overwritten")
    found = suggest(data, reading, base=base, folder=target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(found.recipe, encoding="utf-8")
    document = {
        "recipe": str(target),
        "rows": found.rows,
        "format": found.format,
        "layout": found.layout,
        "columns": found.columns,
        "encoding": found.encoding,
        "dropped": found.dropped,
        "task": found.task,
        "base": found.base,
    }
    echo.result(
        document,
        f"{data.name}: {found.rows} rows, {', '.join(filter(None, [found.format, found.layout, found.encoding]))}, columns {', '.join(found.columns)}"
        + (f", {found.dropped} without both left out" if found.dropped else ""),
        f"task: {found.task}" + (f", {found.labels} labels" if found.labels else ""),
        f"base: {found.base}" + ("  (an English model; see the note in the recipe)" if found.japanese and not base else ""),
        f"wrote {target}; next: edgelora run {target} --dry-run",
    )


@click.command()
@RECIPE
@SET
@OUT
@GPUS
@DRY_RUN
@command
def run(echo: Output, recipe: Path, overrides: tuple[str, ...], out: Path | None, gpus: int, dry_run: bool) -> None:
    """Fine-tune, merge, export, verify, evaluate, bench, report and check, as a recipe says.

    Finished stages are kept: the same command continues a run that was interrupted.

    \b
    Example:  edgelora run quickstart
    """
    keep_few_kernels()
    loaded = load_recipe(recipe, overrides, out)
    if dry_run:
        _plan(echo, loaded, gpus)
        return
    from edgelora import pipeline, processes
    from edgelora.check import broken

    calm_libraries()
    if gpus > 1:
        processes.check_gpus(gpus)
        pipeline.prepare(loaded, gpus)
        _train_on(gpus, echo, recipe, overrides, out, silent=True)
    with echo.progress() as progress:
        result = pipeline.run(loaded, progress, gpus)
    echo.result(
        result.document, *lines.summary(result.document), f"report: {result.report}", *(f"file:   {path}" for path in result.exports)
    )
    if failed := broken(result.verdicts):
        raise CheckFailed(
            f"{len(failed)} of {len(result.verdicts)} budgets broken: " + "; ".join(f"{v.what}: {v.value}, limit {v.limit}" for v in failed)
        )


@click.command()
@RECIPE
@SET
@OUT
@GPUS
@DRY_RUN
@command
def finetune(echo: Output, recipe: Path, overrides: tuple[str, ...], out: Path | None, gpus: int, dry_run: bool) -> None:
    """Train a LoRA adapter on a base held in 4-bit NF4 (QLoRA) or in 16 bits (LoRA).

    Several GPUs share the rows before each update (train.batch x train.accumulate): the adapter is the one that a single GPU trains.
    --gpus starts a process a GPU through accelerate launch; a base that one cannot hold is divided among them (train.shard).

    \b
    Example:  edgelora finetune quickstart --set train.epochs=1 --out runs/try
    """
    keep_few_kernels()
    loaded = load_recipe(recipe, overrides, out)
    if dry_run:
        _plan(echo, loaded, gpus)
        return
    from edgelora import artifact, doctor, models, preflight, processes
    from edgelora.data import split
    from edgelora.train import pissa
    from edgelora.train.finetune import finetune as train

    calm_libraries()
    doctor.require(preflight.TRAINING)
    if gpus > 1:
        processes.check_gpus(gpus)
        _train_on(gpus, echo, recipe, overrides, out)
        return
    with echo.progress() as progress, processes.joined(), artifact.locked(loaded.out_dir):
        with processes.first_alone():
            dataset = split.load(loaded)
            base = models.open_base(loaded.base, loaded.folder, loaded.out_dir)
            base = pissa.start(loaded.train, base, loaded.out_dir, lambda share, text: progress("decompose", share, text))
        made = train(loaded, base, dataset, loaded.out_dir, lambda share, text: progress("fine-tune", share, text))
    facts = made.facts
    echo.result(
        {"adapter": str(made.path), **facts},
        *lines.training(facts),
        f"adapter: {made.path}",
        f"next: edgelora export {loaded.base} --adapter {made.path} --format gguf",
    )


@click.command()
@click.argument("adapter", type=PATH)
@click.option(
    "--recipe", "recipe", type=PATH, required=True, help="The recipe it was trained with: names the base and the rows that choose."
)
@click.option("--base", "into", type=click.Choice(["auto", "nf4", "16bit"]), help="Which base to merge into; default as the recipe says.")
@SET
@command
def merge(echo: Output, adapter: Path, recipe: Path, into: str | None, overrides: tuple[str, ...]) -> None:
    """Add an adapter to its base: W' = W + (alpha / r) B A, on the base that serves better.

    \b
    Example:  edgelora merge runs/quickstart/adapter-1a2b3c4d --recipe quickstart
    """
    from edgelora import artifact, doctor, models, pipeline, preflight, tuned
    from edgelora.data import split
    from edgelora.merge import merge as merge_
    from edgelora.train import pissa

    calm_libraries()
    doctor.require(preflight.TRAINING)
    made_adapter = open_artifact(adapter, "adapter")
    loaded = load_recipe(recipe, (*overrides, *([f"merge.base={into}"] if into else [])), adapter.parent)
    with echo.progress() as progress, artifact.locked(adapter.parent):
        dataset = split.load(loaded)
        base = models.open_base(loaded.base, loaded.folder, adapter.parent)
        base = pissa.start(loaded.train, base, adapter.parent, lambda share, text: progress("decompose", share, text))
        made = merge_(
            tuned.tuned(base, loaded.base, made_adapter),
            loaded.merge.base,
            pipeline.selecting_rows(loaded, base.folder, dataset),
            loaded.evaluate,
            pipeline.threads(loaded),
            adapter.parent,
            lambda share, text: progress("merge", share, text),
        )
    echo.result({"model": str(made.path), **made.facts}, f"kept the {made.facts['kept']} merge: {made.facts['why']}", f"model: {made.path}")


def _train_on(gpus: int, echo: Output, recipe: Path, overrides: tuple[str, ...], out: Path | None, *, silent: bool = False) -> None:
    """`edgelora finetune` in a process a GPU; `silent`: it prints no result."""
    from edgelora import processes

    options = [f"--set={item}" for item in overrides] + ([f"--out={out}"] if out else [])
    options += [f"--{name}" for name, on in (("json", echo.as_json), ("quiet", echo.quiet), ("debug", echo.debug)) if on]
    processes.launch(["finetune", *options, "--", str(recipe)], gpus, silent=silent, debug=echo.debug)


def _plan(echo: Output, recipe: recipes.Recipe, gpus: int) -> None:
    from edgelora import doctor, plan, preflight

    calm_libraries()
    doctor.require(preflight.TRAINING)
    found = plan.plan(recipe, gpus)
    echo.result(found, *plan.lines(found))
