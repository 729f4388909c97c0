"""The stages in order: data, base, fine-tune, merge, export, evaluate, bench, report, check.

Every stage is a finished folder below the recipe's `out`. One whose inputs, settings and versions are unchanged is
not run again, so the same command continues a run that was killed.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgelora import artifact, check, machine, models, quality, roofline, tuned
from edgelora import bench as benches
from edgelora import recipe as recipes
from edgelora import report as reports
from edgelora.artifact import Artifact
from edgelora.data import chat, split
from edgelora.data.split import Dataset
from edgelora.export import beside, remarks
from edgelora.export import stage as exports
from edgelora.quant import importance, moments
from edgelora.size import traffic

Progress = Callable[[str, float, str], None]  # stage, share done, what is going on


@dataclass(frozen=True)
class Result:
    """What a run leaves: the report's files and the verdicts of its budgets."""

    folder: Path
    report: Path
    exports: tuple[Path, ...]
    verdicts: tuple[check.Verdict, ...]
    document: dict[str, Any]


def run(recipe: recipes.Recipe, progress: Progress, gpus: int = 1) -> Result:
    """Everything, once. Raises before the first second of training when a later stage cannot work here."""
    with artifact.locked(recipe.out_dir):
        base, dataset = _ready(recipe, gpus)
        return _stages(recipe, base, dataset, recipe.out_dir, progress)


def prepare(recipe: recipes.Recipe, gpus: int) -> None:
    """What `run` does before it trains, for whoever trains elsewhere first, on that many GPUs."""
    with artifact.locked(recipe.out_dir):
        _ready(recipe, gpus)


def _ready(recipe: recipes.Recipe, gpus: int) -> tuple[models.Base, Dataset]:
    from edgelora import preflight

    dataset = split.load(recipe)
    roofline.chosen(roofline.load(), recipe.bench.estimate)  # an unknown device is told now, not after the training
    preflight.packages(recipe)
    base = models.open_base(recipe.base, recipe.folder, recipe.out_dir)
    preflight.resources(recipe, base, dataset, gpus)
    return base, dataset


def _stages(recipe: recipes.Recipe, base: models.Base, dataset: Dataset, out: Path, progress: Progress) -> Result:
    from edgelora.merge import merge
    from edgelora.train import pissa
    from edgelora.train.finetune import finetune

    start = pissa.start(recipe.train, base, out, lambda share, text: progress("decompose", share, text))
    adapter = finetune(recipe, start, dataset, out, lambda share, text: progress("fine-tune", share, text))
    model = tuned.tuned(start, recipe.base, adapter)
    rows = selecting_rows(recipe, base.folder, dataset)
    merged, modules = None, [exports.format_module(section.format) for section in recipe.exports]
    if not all(module.MERGES for module in modules):
        merged = merge(
            model, recipe.merge.base, rows, recipe.evaluate, threads(recipe), out, lambda share, text: progress("merge", share, text)
        )
    written = replace(model, folder=merged.path, key=merged.key) if merged else model
    pairs = []
    for number, (section, module) in enumerate(zip(recipe.exports, modules, strict=True)):
        if section.planned:
            within = _within(progress, number / len(recipe.exports), 1 / len(recipe.exports))
            pairs.append(_planned(recipe, base, model if module.MERGES else written, section, dataset, rows, out, within))
            continue
        made: list[Artifact] = []
        # what an adapter file is compared with is the base alone
        before = replace(section, format="gguf") if module.APART else replace(section, target=None)
        for source, wanted, prefix in (
            (tuned.plain(base.folder, base.key), before, "base-"),
            (model if module.MERGES else written, section, ""),
        ):
            done = (2 * number + len(made)) / (2 * len(recipe.exports))
            made.append(
                exports.export(
                    source,
                    wanted,
                    name=f"{prefix}{recipe.name}",
                    rows=rows,
                    rows_from={"valid": "select"},
                    merge_base=recipe.merge.base,
                    limits=recipe.evaluate,
                    threads=threads(recipe),
                    out=out,
                    prefix=prefix,
                    importance=_importance(recipe, source, written, wanted, dataset, out, prefix, progress),
                    origin=beside.origin(replace(source, name=base.name), _data_licence(recipe), recipe.data.attribution),
                    progress=_within(progress, done, 1 / (2 * len(recipe.exports))),
                )
            )
        pairs.append((made[0], made[1]))
    judged = quality.judge(recipe, base, dataset, pairs, out, lambda share, text: progress("evaluate", share, text))
    timed = bench(recipe, [after for _, after in pairs], out, lambda share, text: progress("bench", share, text))
    progress("report", 0.0, "writing the report")
    document = collect(recipe, base, dataset, adapter, merged, [after for _, after in pairs], judged, timed)
    verdicts = check.check(document, recipe.budgets, find=lambda name: artifact.find(out, name))
    document["checks"] = [verdict.as_row() for verdict in verdicts]
    files = reports.write(document, out)
    return Result(out, files["html"], tuple(exports.exported_path(after) for _, after in pairs), tuple(verdicts), document)


def _planned(
    recipe: recipes.Recipe,
    base: models.Base,
    model: tuned.Tuned,
    section: recipes.Export,
    dataset: Dataset,
    rows: Sequence[chat.Encoded],
    out: Path,
    progress: Callable[[float, str], None],
) -> tuple[Artifact, Artifact]:
    """The untuned base and the tuned model within a budget: planned for the tuned one, the same types for the base beside it."""
    from edgelora.export import budget

    known = budget.measure(
        model,
        budget.merged_into(model, recipe.merge.base),
        planning_rows(recipe, base.folder, dataset),
        recipe.name,
        threads(recipe),
        out,
        "",
        lambda s, t: progress(0.5 * s, t),
        section.format,
    )
    made: list[Artifact] = []
    for source, prefix in ((model, ""), (tuned.plain(base.folder, base.key), "base-")):
        done = 0.5 + 0.25 * len(made)
        made.append(
            budget.export(
                source,
                section,
                name=f"{prefix}{recipe.name}",
                known=known,
                rows=rows,
                rows_from={"valid": "select"},
                merge_base=recipe.merge.base,
                limits=recipe.evaluate,
                threads=threads(recipe),
                out=out,
                prefix=prefix,
                plan=made[0].path / budget.PLAN if made else None,
                origin=beside.origin(replace(source, name=base.name), _data_licence(recipe), recipe.data.attribution),
                progress=lambda share, text, done=done: progress(done + 0.25 * share, text),  # type: ignore[misc]
            )
        )
    return made[1], made[0]


def _importance(
    recipe: recipes.Recipe,
    model: tuned.Tuned,
    tuned_model: tuned.Tuned,
    section: recipes.Export,
    dataset: Dataset,
    out: Path,
    prefix: str,
    progress: Progress,
) -> Path | None:
    """What the format's rounding wants measured on training rows, once for all exports; None for an export that gains nothing from it.

    Moments are those of the tuned model for the untuned one beside it too: the inputs hardly differ, and they cost a minute.
    """
    if not exports.weighed(model.base, section):
        return None
    step = lambda share, text: progress("importance", share, text)  # noqa: E731
    if exports.format_module(section.format).CALIBRATION == "moments":
        return moments.measure(tuned_model, planning_rows(recipe, model.base, dataset), out, step).path / moments.FILE
    made = importance.measure(
        model.base,
        model.key,
        recipe.importance,
        dataset,
        recipe.train.max_tokens,
        out,
        step,
        adapter=model.adapter,
        prefix=prefix,
    )
    return made.path / importance.FILE


def _data_licence(recipe: recipes.Recipe) -> str | None:
    """What the recipe says, else what the data card says that `data prepare` wrote beside the rows."""
    card = recipe.file(recipe.data.train).parent / "card.json"
    if recipe.data.licence or not card.is_file():
        return recipe.data.licence
    try:
        stated = json.loads(card.read_text(encoding="utf-8")).get("licence")
    except (ValueError, AttributeError):
        return None
    return stated if isinstance(stated, str) else None


def _within(progress: Progress, done: float, part: float) -> Callable[[float, str], None]:
    """Progress of one export as a part of all of them."""
    return lambda share, text: progress("export", done + part * share, text)


def threads(recipe: recipes.Recipe) -> int:
    return recipe.threads or machine.cores()


def selecting_rows(recipe: recipes.Recipe, model: Path, dataset: Dataset) -> list[chat.Encoded]:
    """The rows of `valid` that choose between merges; the first of them also verify every exported file."""
    tokenizer = models.open_tokenizer(model)
    fitting = chat.encode_all(tokenizer, dataset.selecting, recipe.train.max_tokens)
    return [ids for _, ids in fitting[: max(recipe.evaluate.rows, recipe.evaluate.verify_rows)]]


def planning_rows(recipe: recipes.Recipe, model: Path, dataset: Dataset) -> list[chat.Encoded]:
    """The training rows on which second moments are measured, for plans and for rounding."""
    fitting = chat.encode_all(models.open_tokenizer(model), dataset.train, recipe.train.max_tokens)
    return [ids for _, ids in importance.spread(fitting, recipe.importance.plan_rows)]


def bench(recipe: recipes.Recipe, made: Sequence[Artifact], out: Path, progress: Callable[[float, str], None]) -> Artifact:
    """Measure the exported files on this machine, one after the other and in turns."""
    files = [(exports.exported_path(export), str(export.facts["runtime"])) for export in made]
    return artifact.build(
        out,
        "bench",
        "bench",
        lambda folder: {"rows": benches.bench_all(files, recipe.bench, threads(recipe), progress), "machine": machine.describe()},
        made_from={str(export.facts["file"]): export.key for export in made},
        recipe={
            **{key: value for key, value in recipes.as_dict(recipe.bench).items() if key != "estimate"},  # measures nothing
            "threads": threads(recipe),
            "machine": machine.describe()["class"],
        },
        versions=artifact.versions_of("llama-cpp-python", "onnxruntime"),
    )


def collect(
    recipe: recipes.Recipe,
    base: models.Base,
    dataset: Dataset,
    adapter: Artifact,
    merged: Artifact | None,
    made: Sequence[Artifact],
    judged: Artifact,
    timed: Artifact,
) -> dict[str, Any]:
    """The report's document out of what the stages measured."""
    files = []
    for export in made:
        facts = dict(export.facts)
        name = str(facts["file"])
        sha = export.files.get(name)
        parts = reports.parts(exports.exported_path(export))
        files.append({**facts, "parts": parts, **({"sha256": sha} if sha else {})})
    return {
        "schema": reports.SCHEMA,
        "name": recipe.name,
        "created": datetime.now(UTC).date().isoformat(),
        "edgelora": artifact.versions_of()["edgelora"],
        "machine": timed.facts["machine"],
        "versions": {**adapter.versions, **made[0].versions} if made else dict(adapter.versions),
        "recipe": _shown(recipe),
        "commit": _commit(recipe.folder),
        "training": {**adapter.facts, **({"model_16bit_bytes": merged.bytes} if merged else {})},
        **({"merge": dict(merged.facts)} if merged else {}),
        "files": files,
        **judged.facts,
        "bench": timed.facts["rows"],
        "estimates": estimates(recipe, made),
        "commands": [f"edgelora run {recipe.name}.yaml"],
        "notes": [*_notes(dataset, base), *(f"{facts['file']}: {remark}" for facts in files for remark in remarks.all_of(facts))],
    }


def estimates(recipe: recipes.Recipe, made: Sequence[Artifact]) -> list[dict[str, Any]]:
    """What the devices that the recipe names should reach with each exported file: never measured."""
    if not recipe.bench.estimate:
        return []
    table, rows = roofline.load(), []
    for device in roofline.chosen(table, recipe.bench.estimate):
        for path in map(exports.exported_path, made):
            read = traffic.bytes_per_token(path)
            rows.append(roofline.estimate(table, device, roofline.runtime_for(path), path.name, read).as_row())
    return rows


def _shown(recipe: recipes.Recipe) -> dict[str, Any]:
    """The recipe as others may read it: without the places where files lie on this machine."""
    values = recipes.as_dict(recipe)
    values["base"] = models.shown(values["base"])
    values["out"] = values["out"] and models.shown(values["out"])
    data = values["data"]
    data |= {name: models.shown(data[name]) for name in ("train", "valid", "sealed") if data[name]}
    data["held_out"] = {name: models.shown(file) for name, file in data["held_out"].items()}
    return values


def _commit(folder: Path) -> str | None:
    """The short commit of the repository that the recipe lies in, None where there is none."""
    try:
        found = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _notes(dataset: Dataset, base: models.Base) -> list[str]:
    notes = list(dataset.notes)
    for reason in sorted({reason for _, _, reason in dataset.dropped}):
        count = sum(r == reason for _, _, r in dataset.dropped)
        notes.append(f"{count} training {'row' if count == 1 else 'rows'} left out: {reason}")
    if base.gguf is not None:
        notes.append("The base was a quantized GGUF file; 'the model it was made from' is that file written out in 16 bits.")
    return notes
