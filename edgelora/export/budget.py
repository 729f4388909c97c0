"""Export within a size or a loss: measure how much each matrix matters, plan, write the best plans, measure them, keep the best.

Predictions choose a plan for each way of rounding; the files are then written and compared with the model as trained,
in the runtime of their users, on rows that choose. Rows that report are never seen here.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from edgelora import artifact, labels, merge, models
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data.chat import Encoded
from edgelora.errors import ModelError, Unsupported
from edgelora.export import beside, gguf, verify
from edgelora.export.referee import Referee, part
from edgelora.export.reference import Reference
from edgelora.quant import compensate, curvature, ggml, sensitivity, size_plan
from edgelora.quant.ggml import Type
from edgelora.quant.size_plan import Menu, Option, Plan
from edgelora.tuned import Tuned
from edgelora.weights import Checkpoint

Progress = Callable[[float, str], None]

PLAN = "plan.json"
_MOMENTS, _MENUS = "moments.safetensors", "menus.json"
_COLLECTING = 0.5  # of the time that `measure` takes
_SHRINK = 0.2  # of the correlations between inputs, estimated from few rows; less lets feedback overshoot the blocks (bench/NOTES.md)
_ROUNDINGS = {"compensated": True, "nearest": False}
# A file is named in llama.cpp's header after the type that most of its bytes have.
_NAMES = {
    Type.Q2_K: "q2_k", Type.Q3_K: "q3_k_m", Type.IQ4_XS: "iq4_xs", Type.Q4_0: "q4_0", Type.IQ4_NL: "iq4_nl", Type.Q4_K: "q4_k_m",
    Type.Q4_1: "q4_1", Type.Q5_0: "q5_0", Type.Q5_K: "q5_k_m", Type.Q5_1: "q5_1", Type.Q6_K: "q6_k", Type.Q8_0: "q8_0", Type.F16: "f16",
}  # fmt: skip


def label(section: recipes.Export) -> str:
    """What stands for the type in names: max-90mb, max-kl-0.1 or min-score-0.8."""
    if section.max_size is not None:
        return "max-" + section.max_size.replace(" ", "").lower()
    return f"min-score-{section.min_score:g}" if section.min_score is not None else f"max-kl-{section.max_kl:g}"


def measure(
    model: Tuned, base: str, calibration: Sequence[Encoded], name: str, threads: int, out: Path, prefix: str, progress: Progress
) -> Artifact:
    """The curvature of `model`, merged into `base`, on training rows, and what every type of every matrix would cost; once a model."""

    def make(folder: Path) -> dict[str, Any]:
        scratch = folder / ".scratch"
        scratch.mkdir()
        described = model.folder or model.describe(scratch)
        weights = model.merged(base)
        learned, judged = curvature.divided(calibration)
        opened = curvature.open_model(described, weights, threads)
        found = curvature.collect(opened, learned, lambda share, text: progress(_COLLECTING * share, text), judged)
        curvature.save(found, folder / _MOMENTS)
        moments = curvature.Moments(folder / _MOMENTS)
        fixed, matrices = gguf.matrices(described, name, weights)
        menus = _costs(matrices, found, moments, threads, lambda share, text: progress(_COLLECTING + (1 - _COLLECTING) * share, text))
        shutil.rmtree(scratch)
        text = {rounding: size_plan.menu_as_dict(Menu(options, fixed)) for rounding, options in menus.items()}
        (folder / _MENUS).write_text(json.dumps(text), encoding="utf-8")
        return {"rows": len(calibration), "answer_tokens": found.answers, "matrices": len(matrices), "name": name}

    return artifact.build(
        out,
        f"{prefix}curvature",
        "curvature",
        make,
        made_from={"model": model.key, "rows": merge.rows_key(calibration)},
        recipe={"base": base, "name": name, "shrink": _SHRINK},
        versions=artifact.versions_of("torch", "transformers", "llama-cpp-python"),
        rows={"train": "train"},
    )


def _costs(
    matrices: Mapping[str, gguf.Matrix], found: curvature.Curvature, moments: curvature.Moments, threads: int, progress: Progress
) -> dict[str, dict[str, tuple[Option, ...]]]:
    """What each type of each matrix costs, by way of rounding. ggml and numpy let other threads run while they compute."""

    def options(key: str, compensated: bool) -> tuple[Option, ...]:
        matrix = matrices[key]
        costs = sensitivity.costs(key, matrix.read(), found, compensate.Rounding(moments, compensated, _SHRINK), len(matrices))
        return tuple(Option(kind.name, matrix.bytes(kind), cost) for kind, cost in costs.items())

    menus: dict[str, dict[str, tuple[Option, ...]]] = {rounding: {} for rounding in _ROUNDINGS}
    largest_first = sorted(matrices, key=lambda key: -matrices[key].bytes(Type.F16))
    total, done = len(_ROUNDINGS) * sum(matrix.bytes(Type.F16) for matrix in matrices.values()), 0
    with ThreadPoolExecutor(threads) as pool:
        jobs = {pool.submit(options, key, compensated): (key, name) for key in largest_first for name, compensated in _ROUNDINGS.items()}
        try:
            for job in as_completed(jobs):
                key, name = jobs[job]
                menus[name][key] = job.result()
                done += matrices[key].bytes(Type.F16)
                progress(done / total, f"{key}, {name} rounding")
        finally:
            pool.shutdown(cancel_futures=True)
    return {name: {key: menu[key] for key in matrices} for name, menu in menus.items()}


def merged_into(model: Tuned, merge_base: str) -> str:
    """The base that a planned file is merged into: the one that training saw, unless another is asked for."""
    return "16bit" if model.folder else model.into(merge_base)[0]


def menus(made: Artifact) -> dict[str, Menu]:
    """The menu of each way of rounding; ModelError when the artifact is damaged."""
    try:
        values = json.loads((made.path / _MENUS).read_text(encoding="utf-8"))
        return {rounding: size_plan.menu_of(values[rounding]) for rounding in _ROUNDINGS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{made.path.name}/{_MENUS} is damaged: {error}", "remove the folder and run the same command again") from error


def export(
    model: Tuned,
    section: recipes.Export,
    *,
    name: str,
    known: Artifact,
    rows: Sequence[Encoded],
    rows_from: Mapping[str, str],
    merge_base: str = recipes.Merge.base,
    limits: recipes.Evaluate,
    threads: int,
    out: Path,
    prefix: str = "",
    plan: Path | None = None,
    origin: beside.Origin | None = None,
    progress: Progress,
) -> Artifact:
    """Write `model` as the best GGUF file within the section's budget, and verify it.

    `known` comes from `measure`; `rows` choose between plans. With `plan`, a plan.json of an earlier export, its types
    are used and nothing is planned or compared. `origin` is for the model card. Raises Unsupported, naming what can be
    reached, when the budget cannot be met, and VerifyError as every export does.
    """
    base = merged_into(model, merge_base)
    kind = label(section) if section.planned else "plan"
    checked = rows[: limits.verify_rows]

    def make(folder: Path) -> dict[str, Any]:
        scratch = folder / ".scratch"
        scratch.mkdir()
        described = model.folder or model.describe(scratch)
        moments = curvature.Moments(known.path / _MOMENTS)
        progress(0.0, "running the model as trained")
        reference = model.as_trained(rows, threads)

        def write(rounding: str, chosen: Plan, step: Progress) -> Path:
            place = Path(tempfile.mkdtemp(dir=scratch))
            return _write(described, name, model.merged(base), moments, chosen, _ROUNDINGS[rounding], place, step, threads)

        def widest() -> Path:
            return gguf.write(described, "f16", scratch, "widest", lambda share, text: None, weights=model.merged(base), threads=threads)

        menus_ = menus(known)
        referee = Referee(write, reference, rows, _answers(described, model), threads)
        step = part(progress, 1, 3)
        if plan:
            given, compensated = size_plan.read_plan(plan)
            kept, tried = referee.best({"compensated" if compensated else "nearest": given}, step)
        elif section.min_score is not None:
            kept, tried = referee.smallest("compensated", menus_["compensated"], section.min_score, step)
        else:
            kept, tried = referee.best(_planned(menus_, section, referee, step), part(step, 0, 2))
            tried += referee.neighbours(kept, menus_[kept.rounding], part(step, 1, 2))
        chosen = kept.plan
        final = kept.file.rename(folder / f"{name}-{kind}.gguf")
        progress(0.9, f"opening {final.name} in {gguf.RUNTIME}")
        found = verify.verify(
            described, final, gguf.RUNTIME, reference, checked, limits.max_kl, threads,
            full_precision=widest, merged=lambda: Reference(described, model.merged(base), None, checked, threads),
        )  # fmt: skip
        frontier = {
            "candidates": [one.as_row() for one in sorted(tried, key=lambda one: one.plan.size_bytes)],
            "frontier": [{"size_bytes": p.size_bytes, "predicted_kl": p.kl} for p in menus_[kept.rounding].frontier()],
        }
        size_plan.write_plan(folder / PLAN, chosen, _ROUNDINGS[kept.rounding], frontier)
        weights = gguf.mixture(described, *_types(chosen, gguf.matrices(described, name, model.merged(base))[1], {}), model.merged(base))
        shutil.rmtree(scratch)
        facts = {
            "file": final.name,
            "format": "gguf",
            "type": kind,
            "runtime": gguf.RUNTIME,
            "size_bytes": final.stat().st_size,
            "predicted_bytes": chosen.size_bytes,
            **found,
            "weights": weights,
            "plan": {"kept": kept.rounding, **frontier},
            **({"labels": list(model.labels)} if model.labels else {}),
        }
        beside.write(folder, facts, origin or beside.origin(model), name, model.system)
        return facts

    return artifact.build(
        out,
        f"{prefix}gguf-{kind}",
        "export",
        make,
        made_from={
            "model": model.key,
            "curvature": known.key,
            **{f"rows.{n}": n for n in rows_from},
            "rows": merge.rows_key(rows),
            **({"plan": artifact.sha256(plan)} if plan else {}),
        },
        recipe={"format": "gguf", "type": kind, "name": name, "max_kl": limits.max_kl, "into": base},
        versions=artifact.versions_of("gguf", "llama-cpp-python"),
        rows=rows_from,
    )


def predict(model: Path, section: recipes.Export, name: str) -> tuple[int, dict[str, Any]]:
    """The bytes of a plan made from the header alone, as if every weight mattered alike, and what its matrices would be.

    The real plan knows which matter and keeps the same limit. For max_kl and min_score, which say nothing about bytes, the largest plan.
    """
    fixed, matrices = gguf.matrices(model, name)
    weights = {key: math.prod(matrix.shape) for key, matrix in matrices.items()}
    options = {
        key: tuple(
            # a bit more makes a rounding error's square a quarter
            Option(kind.name, matrix.bytes(kind), weights[key] / sum(weights.values()) * 4.0 ** -ggml.bits(kind))
            for kind in sensitivity.candidates(matrix.shape[-1])
        )
        for key, matrix in matrices.items()
    }
    menu = Menu(options, fixed, measured=False)
    plan = menu.plan(recipes.size_bytes(section.max_size) if section.max_size is not None else menu.frontier()[-1].size_bytes)
    kind, importance, tensor_types = _types(plan, matrices, {})
    return plan.size_bytes, gguf.mixture(model, kind, importance, tensor_types)


def lines(facts: Mapping[str, Any]) -> list[str]:
    """What was tried, as text."""
    found = facts["plan"]
    return [
        f"{row['size_bytes'] / 1e6:.2f} MB, {row['rounding']} rounding: KL {row['kl']:.3g} [{row['kl_low']:.3g}, {row['kl_high']:.3g}] "
        f"({row['predicted_kl']:.3g} predicted), loss {row['loss']:.3f}, score {row['score']:.3f}"
        + (", kept" if (row["rounding"], row["size_bytes"]) == (found["kept"], facts["size_bytes"]) else "")
        for row in found["candidates"]
    ] + [
        "predicted frontier (MB: KL): "
        + ", ".join(
            f"{p['size_bytes'] / 1e6:.0f}: {p['predicted_kl']:.2g}" for p in found["frontier"][:: max(1, len(found["frontier"]) // 10)]
        )
    ]


def _planned(menus: Mapping[str, Menu], section: recipes.Export, referee: Referee, progress: Progress) -> dict[str, Plan]:
    """The plan of each way of rounding; Unsupported, with the measured quality of what can be reached, when none keeps the budget."""
    if section.max_size is None:
        return {rounding: menu.plan_within(float(section.max_kl or 0.0)) for rounding, menu in menus.items()}
    most = recipes.size_bytes(section.max_size)
    if most < min(menu.smallest().size_bytes for menu in menus.values()):
        least, _ = referee.best({"compensated": menus["compensated"].smallest()}, progress)
        found = least.measured
        raise Unsupported(
            f"{most / 1e6:.1f} MB cannot be reached: the smallest file is {least.plan.size_bytes / 1e6:.1f} MB ({least.plan.size_bytes} bytes); "
            f"on {found['rows']} rows it has a KL of {found['kl']:.2g} [{found['kl_low']:.2g}, {found['kl_high']:.2g}] and a score of {found['score']:.2f}",
            menus["compensated"].ways(most),
        )
    return {rounding: menu.plan(most) for rounding, menu in menus.items()}


def _answers(described: Path, model: Tuned) -> list[list[int]]:
    """Ids of every label's answer, none when the model does not choose between labels."""
    return labels.ids(models.open_tokenizer(described), [("user", "")], model.labels)[1] if model.labels else []


def _write(
    described: Path,
    name: str,
    weights: Checkpoint,
    moments: curvature.Moments,
    plan: Plan,
    compensated: bool,
    place: Path,
    step: Progress,
    threads: int,
) -> Path:
    """The file of a plan; ModelError when the plan is one of another model."""
    _, matrices = gguf.matrices(described, name, weights)
    if strange := set(plan.types) ^ set(matrices):
        raise ModelError(f"the plan is of another model: {min(strange)} is not in both", "make a plan for this one with --max-size")
    unknown = next((kind for kind in plan.types.values() if kind not in Type.__members__), None)
    if unknown:
        raise ModelError(f"the plan holds the unknown type {unknown!r}", "make a plan with --max-size")
    kind, importance, tensor_types = _types(plan, matrices, moments.importance())
    rounding = compensate.Rounding(moments, compensated, _SHRINK)
    written = gguf.write(described, kind, place, name, step, importance, tensor_types, weights, rounding, threads)
    return written.rename(place / _file_name(name))


def _types(
    plan: Plan, matrices: Mapping[str, gguf.Matrix], importance: dict[str, np.ndarray]
) -> tuple[str, dict[str, np.ndarray], list[str]]:
    """A plan as `gguf.write` takes it: llama.cpp's name of the type that most bytes have, and every tensor's type by hand."""
    totals: dict[str, int] = {}
    for key, kind in plan.types.items():
        totals[kind] = totals.get(kind, 0) + matrices[key].bytes(Type[kind])
    main = _NAMES.get(Type[max(totals, key=lambda kind: totals[kind])], "f16")
    return main, importance, [f"^{key.replace('.', '[.]')}$={kind.lower()}" for key, kind in plan.types.items()]


def _file_name(name: str) -> str:
    return f"{name}.gguf"
