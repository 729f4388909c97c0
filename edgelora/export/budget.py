"""Export within a size or a loss: measure how much each matrix matters, plan, write the best plans, measure them, keep the best.

Predictions choose a plan for each way of rounding; the files are then written and compared with the model as trained,
in the runtime of their users, on rows that choose. Rows that report are never seen here. What a matrix may be stored as,
and how a file is written, is the format's own (PLANNERS in `edgelora.export`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from edgelora import artifact, doctor, labels, merge, models
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data.chat import Encoded
from edgelora.errors import ModelError, Unsupported
from edgelora.export import PLANNERS, beside, stage, verify
from edgelora.export.referee import Referee, Tried
from edgelora.export.reference import Reference
from edgelora.progress import Progress, part
from edgelora.quant import curvature, size_plan
from edgelora.quant.compensate import SHRINK, Rounding
from edgelora.quant.curvature import Curvature
from edgelora.quant.size_plan import Menu, Option, Plan
from edgelora.quant.workers import Workers
from edgelora.runtime import runtimes_of
from edgelora.tuned import Tuned

PLAN = "plan.json"
_MOMENTS, _MENUS = "moments.safetensors", "menus.json"
_COLLECTING = 0.5  # of the time that `measure` takes
_PLANNER = 2  # counts up when other files are chosen or measured otherwise: what was made before is not taken for the same
_ROUNDINGS = {"compensated": True, "nearest": False}


class Matrix(Protocol):
    """A matrix that has a choice: how many `weights`, and the GGUF names of the tensors it is made of, whose rounding errors are told apart."""

    @property
    def weights(self) -> int: ...

    @property
    def tensors(self) -> tuple[str, ...]: ...

    def options(self) -> dict[str, tuple[int, float]]:
        """Type -> bytes that it adds to the file, and bits a weight."""

    def costs(self, found: Curvature, rounding: Rounding, together: int) -> dict[str, float]:
        """Type -> predicted KL divergence, nats an answer token; `together` as in `Curvature.cost`."""


class Writer(Protocol):
    """`fixed_bytes` is what a file has beside its matrices: exact, or the most that it can be."""

    @property
    def fixed_bytes(self) -> int: ...

    def write(self, plan: Plan, moments: curvature.Moments, rounding: Rounding, place: Path, progress: Progress) -> Path:
        """The file of a plan, below `place`; ModelError for a type that a matrix cannot have."""

    def widest(self, place: Path) -> Path:
        """The same weights in the format's widest type."""


def label(section: recipes.Export) -> str:
    """What stands for the type in names: max-90mb, max-kl-0.1 or min-score-0.8."""
    if section.max_size is not None:
        return "max-" + section.max_size.replace(" ", "").lower()
    return f"min-score-{section.min_score:g}" if section.min_score is not None else f"max-kl-{section.max_kl:g}"


def measure(
    model: Tuned,
    base: str,
    calibration: Sequence[Encoded],
    name: str,
    threads: int,
    out: Path,
    prefix: str,
    progress: Progress,
    format: str = "gguf",
) -> Artifact:
    """The curvature of `model`, merged into `base`, on training rows, and what every type of every matrix would cost; once a model and format."""
    module, planner = stage.format_module(format), _planner(format)

    def make(folder: Path) -> dict[str, Any]:
        scratch = folder / ".scratch"
        scratch.mkdir()
        described = model.described(scratch, module.MERGES)
        weights = model.weights(base)
        learned, judged = curvature.divided(calibration)
        opened = curvature.open_model(described, weights, threads)
        found = curvature.collect(opened, learned, lambda share, text: progress(_COLLECTING * share, text), judged)
        curvature.save(found, folder / _MOMENTS)
        fixed, matrices = planner.matrices(described, name, weights)
        step = lambda share, text: progress(_COLLECTING + (1 - _COLLECTING) * share, text)  # noqa: E731
        with _roundings(folder / _MOMENTS, threads) as roundings:
            menus = _costs({way: roundings[way] for way in planner.COMPETING}, matrices, found, threads, step)
        shutil.rmtree(scratch)
        outright = frozenset(key for key, matrix in matrices.items() if found.head in matrix.tensors)
        text = {rounding: size_plan.menu_as_dict(Menu(options, fixed, outright)) for rounding, options in menus.items()}
        (folder / _MENUS).write_text(json.dumps(text), encoding="utf-8")
        return {"rows": len(calibration), "answer_tokens": found.answers, "matrices": len(matrices), "name": name}

    return artifact.build(
        out,
        f"{prefix}{planner.MEASURED}",
        planner.MEASURED,
        make,
        made_from={"model": model.key, "rows": merge.rows_key(calibration)},
        recipe={"base": base, "name": name, "shrink": SHRINK, "planner": _PLANNER},
        versions=artifact.versions_of("torch", "transformers", "llama-cpp-python"),
        rows={"train": "train"},
    )


def measured(out: Path, format: str, model_key: str) -> Artifact | None:
    """What `measure` left below `out` for the model with that key, None when there is nothing."""
    return artifact.measured_on(out, _planner(format).MEASURED, model_key)


@contextmanager
def _roundings(moments: Path, threads: int) -> Iterator[dict[str, Rounding]]:
    """Both ways of rounding; as many threads may round as there are `threads`. Meanwhile numpy's products take one thread each."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as ranges, Workers(moments, SHRINK, threads, ranges) as compensated:
        yield {"compensated": compensated, "nearest": Rounding(curvature.Moments(moments), False, SHRINK, ranges)}


def _costs(
    competing: Mapping[str, Rounding], matrices: Mapping[str, Matrix], found: Curvature, threads: int, progress: Progress
) -> dict[str, dict[str, tuple[Option, ...]]]:
    """What each type of each matrix costs, by way of rounding. ggml and numpy let other threads run while they compute."""
    together = sum(len(matrix.tensors) for matrix in matrices.values())

    def options(key: str, rounding: Rounding) -> tuple[Option, ...]:
        costs = matrices[key].costs(found, rounding, together)
        return tuple(Option(kind, n_bytes, costs[kind]) for kind, (n_bytes, _) in matrices[key].options().items())

    menus: dict[str, dict[str, tuple[Option, ...]]] = {name: {} for name in competing}
    largest_first = sorted(matrices, key=lambda key: -matrices[key].weights)
    total, done = len(menus) * sum(matrix.weights for matrix in matrices.values()), 0
    with ThreadPoolExecutor(threads) as pool:
        jobs = {pool.submit(options, key, rounding): (key, name) for key in largest_first for name, rounding in competing.items()}
        try:
            for job in as_completed(jobs):
                key, name = jobs[job]
                menus[name][key] = job.result()
                done += matrices[key].weights
                progress(done / total, f"{key}, {name} rounding")
        except BaseException:  # Ctrl-C too: a head takes minutes
            for rounding in competing.values():
                rounding.stop()
            raise
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
        return {rounding: size_plan.menu_of(values[rounding]) for rounding in values}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    """Write `model` as the best file of the section's format within its budget, and verify it.

    `known` comes from `measure`; `rows` choose between plans. With `plan`, a plan.json of an earlier export, its types
    are used and nothing is planned or compared. `origin` is for the model card. Raises Unsupported, naming what can be
    reached, when the budget cannot be met, and VerifyError as every export does.
    """
    module, planner = stage.format_module(section.format), _planner(section.format)
    base = merged_into(model, merge_base)
    kind = label(section) if section.planned else "plan"
    checked = rows[: limits.verify_rows]

    def make(folder: Path) -> dict[str, Any]:
        scratch = folder / ".scratch"
        scratch.mkdir()
        described = model.described(scratch, module.MERGES)
        weights = model.weights(base)
        given = size_plan.read_plan(plan) if plan else None
        if given:
            _same_model(given[0], planner.matrices(described, name, weights)[1])
        moments = curvature.Moments(known.path / _MOMENTS)
        progress(0.0, "running the model as trained")
        reference = model.as_trained(rows, threads)
        writer: Writer = planner.open(described, name, weights, scratch, threads, part(progress, 0, 3), **_settings(planner, section))

        menus_ = {rounding: replace(menu, fixed_bytes=writer.fixed_bytes) for rounding, menu in menus(known).items()}
        with _roundings(known.path / _MOMENTS, threads) as roundings:

            def write(rounding: str, chosen: Plan, step: Progress) -> Path:
                place = Path(tempfile.mkdtemp(dir=scratch))
                return Path(writer.write(chosen, moments, roundings[rounding], place, step))

            referee = Referee(write, reference, rows, _answers(described, model), module.RUNTIME, threads)
            kept, tried = _selected(referee, menus_, section, given, part(progress, 1, 3))
        chosen = kept.plan
        final = kept.file.rename(folder / f"{name}-{kind}{planner.ENDING}")
        progress(0.9, f"opening {final.name} in {module.RUNTIME}")
        found = verify.verify(
            described, final, module.RUNTIME, reference, checked, limits.max_kl, threads,
            full_precision=lambda: writer.widest(scratch),
            merged=lambda: Reference(described, weights, None, checked, threads),
        )  # fmt: skip
        if others := [other for other in module.FURTHER if other in runtimes_of(final)]:
            progress(0.95, f"opening {final.name} in {', '.join(others)}")
            found["further"] = verify.further(final, module.RUNTIME, others, checked, threads)
        if section.target == "web":
            progress(0.97, "writing the folder for browsers")
            found["web"] = stage.for_browsers(final, planner.STANDS_FOR, folder / f"{name}-{kind}-web", threads)
        frontier = {
            "candidates": [one.as_row() | {"kept": one is kept} for one in sorted(tried, key=lambda one: one.size_bytes)],
            "frontier": [{"size_bytes": p.size_bytes, "predicted_kl": p.kl} for p in _corrected(menus_, kept).frontier()],
        }
        size_plan.write_plan(folder / PLAN, chosen, _ROUNDINGS[kept.rounding], frontier)
        mixture = planner.mixture(described, name, chosen, weights)
        shutil.rmtree(scratch)
        facts = {
            "file": final.name,
            "format": section.format,
            "type": kind,
            "runtime": module.RUNTIME,
            "size_bytes": stage.size_bytes(final),
            "predicted_bytes": chosen.size_bytes,
            **found,
            "weights": mixture,
            "plan": {"kept": kept.rounding, **frontier},
            **({"labels": list(model.labels)} if model.labels else {}),
        }
        beside.write(folder, facts, origin or beside.origin(model), name, model.system)
        return facts

    return artifact.build(
        out,
        f"{prefix}{section.format}-{kind}",
        "export",
        make,
        made_from={
            "model": model.key,
            "curvature": known.key,
            **{f"rows.{n}": n for n in rows_from},
            "rows": merge.rows_key(rows),
            **({"plan": artifact.sha256(plan)} if plan else {}),
        },
        recipe={
            "format": section.format,
            "type": kind,
            "name": name,
            "max_kl": limits.max_kl,
            "into": base,
            "planner": _PLANNER,
            **{key: value for key in ("activations", "target") if (value := getattr(section, key)) is not None},
        },
        versions=artifact.versions_of(*planner.PACKAGES),
        rows=rows_from,
    )


def predict(model: Path, section: recipes.Export, name: str) -> tuple[int, dict[str, Any]]:
    """The bytes of a plan made from the header alone, as if every weight mattered alike, and what its matrices would be.

    The real plan knows which matter and keeps the same limit. For max_kl and min_score, which say nothing about bytes, the largest plan.
    """
    planner = _planner(section.format)
    fixed, matrices = planner.matrices(model, name)
    total = sum(matrix.weights for matrix in matrices.values())
    options = {
        key: tuple(
            # a bit more makes a rounding error's square a quarter
            Option(kind, n_bytes, matrix.weights / total * 4.0**-bits)
            for kind, (n_bytes, bits) in matrix.options().items()
        )
        for key, matrix in matrices.items()
    }
    menu = Menu(options, fixed, measured=False)
    plan = menu.plan(recipes.size_bytes(section.max_size) if section.max_size is not None else menu.frontier()[-1].size_bytes)
    return plan.size_bytes, planner.mixture(model, name, plan)


def lines(facts: Mapping[str, Any]) -> list[str]:
    """What was tried, as text."""
    found = facts["plan"]
    return [
        f"{row['size_bytes'] / 1e6:.2f} MB, {row['rounding']} rounding: KL {row['kl']:.3g} [{row['kl_low']:.3g}, {row['kl_high']:.3g}] "
        f"({row['predicted_kl']:.3g} predicted), loss {row['loss']:.3f}, score {row['score']:.3f}" + (", kept" if row.get("kept") else "")
        for row in found["candidates"]
    ] + [
        "predicted frontier (MB: KL): "
        + ", ".join(
            f"{p['size_bytes'] / 1e6:.0f}: {p['predicted_kl']:.2g}" for p in found["frontier"][:: max(1, len(found["frontier"]) // 10)]
        )
    ]


def _selected(
    referee: Referee, menus: Mapping[str, Menu], section: recipes.Export, given: tuple[Plan, bool] | None, progress: Progress
) -> tuple[Tried, list[Tried]]:
    """The file to keep, and all that were measured for it."""
    if given:
        return referee.best({next(r for r, c in _ROUNDINGS.items() if c == given[1]): given[0]}, progress)
    if section.min_score is not None:
        return referee.smallest("compensated", menus["compensated"], section.min_score, progress)
    if section.max_kl is not None:
        return referee.within("compensated", menus["compensated"], section.max_kl, progress)
    most = recipes.size_bytes(str(section.max_size))
    kept, tried = referee.best(_planned(menus, most, referee, progress), part(progress, 0, 3))
    kept, more = referee.challenged(kept, _corrected(menus, kept).plan(most), part(progress, 1, 3))
    return kept, tried + more + referee.neighbours(kept, _corrected(menus, kept), part(progress, 2, 3))


def _planned(menus: Mapping[str, Menu], most: int, referee: Referee, progress: Progress) -> dict[str, Plan]:
    """The plan of each way of rounding; Unsupported, with the measured quality of what can be reached, when none keeps within `most` bytes."""
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


def _planner(format: str) -> ModuleType:
    return doctor.load(PLANNERS[format])


def _settings(planner: ModuleType, section: recipes.Export) -> dict[str, Any]:
    """What of a section the format's planner takes beside the budget."""
    return {key: getattr(section, key) for key in planner.SETTINGS}


def _same_model(plan: Plan, matrices: Mapping[str, Matrix]) -> None:
    if strange := set(plan.types) ^ set(matrices):
        raise ModelError(f"the plan is of another model: {min(strange)} is not in both", "make a plan for this one with --max-size")


def _corrected(menus: Mapping[str, Menu], measured: Tried) -> Menu:
    """What other sizes would cost, now that one was measured. A plan from elsewhere may be rounded in a way that no menu was made for."""
    menu = menus.get(measured.rounding)
    return menu.corrected(measured.plan, measured.measured["kl"]) if menu else next(iter(menus.values()))
