"""Export: a tuned model in, a file that ships out, opened again in the runtime that users will run it with."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from edgelora import artifact, doctor, environments, evaluate, merge, models
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data.chat import Encoded
from edgelora.errors import UsageError
from edgelora.export import FORMATS, PLANNERS, beside, phone_readme, survival, verify
from edgelora.export.reference import Reference
from edgelora.progress import Progress
from edgelora.runtime import runtime, runtime_of, runtimes_of
from edgelora.runtime.text import FolderText
from edgelora.tuned import Tuned

# Keys of recipe.Export that only some formats take -> one that does.
_OPTIONS = {"importance": "gguf", "tensor_types": "gguf", "block": "onnx", "activations": "onnx", "exporter": "onnx", "target": "onnx"}


def format_module(name: str) -> ModuleType:
    """The format of that name; UsageError for an unknown one, ToolMissing when a package it needs is absent or broken."""
    if name not in FORMATS:
        raise UsageError(f"{name!r} is not a format", f"known formats: {', '.join(FORMATS)}")
    return doctor.load(FORMATS[name])


def require_environments(section: recipes.Export) -> None:
    """ToolMissing, with the command that makes it, for an environment that writing or running the format needs and that is not there."""
    own = getattr(format_module(section.format), "ENVIRONMENT", None)
    for name in (own, "optimum" if section.exporter == "optimum" else None, "web" if section.target == "web" else None):
        if name:
            environments.require(name)


def resolve(section: recipes.Export) -> recipes.Export:
    """The section with its type filled in; UsageError for a type or a key that the format does not have."""
    import difflib

    module = format_module(section.format)
    if problem := recipes.budget_problem(section):
        raise UsageError(problem, "see `edgelora export --help`")
    unknown = [key for key in _OPTIONS if getattr(section, key) and key not in module.OPTIONS]
    if section.planned and not unknown:
        return section
    kind = section.type or module.DEFAULT_TYPE
    if kind not in module.TYPES:
        near = difflib.get_close_matches(kind, module.TYPES, n=1)
        raise UsageError(
            f"{section.format} has no type {kind!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            f"its types: {', '.join(module.TYPES)}",
        )
    if unknown:
        raise UsageError(f"{section.format} has no {unknown[0]}", f"leave it out, or export to {_OPTIONS[unknown[0]]}")
    return dataclasses.replace(section, type=kind)


def weighed(model: Path, section: recipes.Export) -> bool:
    """Whether `model` (a Hugging Face folder) is exported with an importance matrix: unless told not to, where a type gains from one.

    UsageError when one is asked for that nothing would look at.
    """
    section = resolve(section)
    module = format_module(section.format)
    if "importance" not in module.OPTIONS or section.importance is False or section.planned:
        return False
    gains = bool(module.gains_from_importance(model, str(section.type), **_mixing(module, section)))
    if section.importance and not gains:
        raise UsageError(f"importance: true changes nothing: {section.type} is rounded the same with and without", "leave it out")
    return gains


def predict(model: Path, section: recipes.Export, name: str, measured: bool = True) -> tuple[int, dict[str, Any]]:
    """The size in bytes that `model` will have, and what its matrices will be (empty where a format has no mixture).

    `measured`: whether an importance matrix is at hand or will be, for a type that gains from one.
    """
    section = resolve(section)
    module = format_module(section.format)
    if section.planned:
        from edgelora.export import budget

        return budget.predict(model, section, name)
    options = _options(module, section, {} if measured and weighed(model, section) else None)
    mixture = module.mixture(model, str(section.type), **options) if "tensor_types" in module.OPTIONS else {}
    return module.predict_bytes(model, str(section.type), name, **options), mixture


def estimate(model: Path, section: recipes.Export) -> dict[str, float]:
    """`peak_bytes` of memory and `seconds` of CPU time that writing the file will take, estimates; empty where a format takes little."""
    section = resolve(section)
    module = format_module(section.format)
    if section.exporter == "optimum" or not hasattr(module, "estimate_of"):
        return {}
    shape = models.config(model), models.shapes(model)
    if section.planned:  # how long depends on the rows it is planned on
        return {"peak_bytes": module.estimate_of(*shape, doctor.load(PLANNERS[section.format]).STANDS_FOR, True)["peak_bytes"]}
    return dict(module.estimate_of(*shape, str(section.type), weighed(model, section)))


def _options(module: ModuleType, section: recipes.Export, measured: Any) -> dict[str, Any]:
    """What of a section `predict_bytes`, `mixture` and `write` of the format take beside the type; `measured` is its calibration."""
    return {key: measured if key == "importance" else getattr(section, key) for key in _OPTIONS if key in module.OPTIONS - {"target"}}


def _mixing(module: ModuleType, section: recipes.Export) -> dict[str, Any]:
    """What of a section says whether a type gains from importance."""
    return {key: getattr(section, key) for key in ("tensor_types", "exporter") if key in module.OPTIONS}


def export(
    model: Tuned,
    section: recipes.Export,
    *,
    name: str,
    rows: Sequence[Encoded],
    rows_from: Mapping[str, str],
    merge_base: str = recipes.Merge.base,
    limits: recipes.Evaluate,
    threads: int,
    out: Path,
    prefix: str = "",
    importance: Path | None = None,
    origin: beside.Origin | None = None,
    progress: Progress,
) -> Artifact:
    """Write `model` in one format and verify it against the model as trained, on the first of `rows`.

    An adapter that has not been merged yet is merged on the way. Where it can go into two bases and `merge_base` is
    "auto", both files are written and measured on all `rows`, in the runtime of their users; the better one is kept.
    `rows_from` says which data set the rows are and what it served for, `importance` is the file of what
    was measured on training rows, `origin` what the model card says about base and data. A file that fails its verification raises
    VerifyError and is not left under its final name.
    """
    section = resolve(section)
    module = format_module(section.format)
    kind = str(section.type)
    bases: tuple[str | None, ...] = (None,) if model.folder else model.into(merge_base)
    if not (model.folder or module.MERGES):
        raise UsageError(f"{section.format} is written from a merged model", "merge the adapter first: edgelora merge")
    checked = rows[: limits.verify_rows]
    options = _options(module, section, module.calibration(importance) if importance else None)
    exporter = {key: options[key] for key in ("exporter",) if key in options}
    if model.folder and not module.MERGES:
        module.predict_bytes(model.folder, kind, name, **options)  # what cannot be written is refused before anything runs

    def make(folder: Path) -> dict[str, Any]:
        scratch = folder / ".scratch"
        scratch.mkdir()
        told = dataclasses.replace(model, system=None) if module.APART else model  # a shared base says nothing of one adapter
        described = told.described(scratch, module.MERGES)
        streamed = {"threads": threads} if module.MERGES else {}

        def source(base: str | None) -> dict[str, Any]:
            return {"weights": model.weights(base)} if module.MERGES else {}

        def write(base: str | None, type: str, place: Path, step: Progress) -> Path:
            place.mkdir(exist_ok=True)
            settings = options if type == kind else exporter
            return Path(module.write(described, type, place, name, step, **settings, **streamed, **source(base)))

        if module.MERGES:
            module.predict_bytes(described, kind, name, **options, **source(bases[0]))  # refused likewise
        progress(0.0, "running the model as trained")
        reference = model.as_trained(rows if len(bases) > 1 else checked, threads)
        tried, files = [], {}
        for number, base in enumerate(bases):
            step = _part(progress, 0.1 + 0.7 * number / len(bases), 0.7 / len(bases))
            files[base] = write(base, kind, scratch / str(base), step)
            if len(bases) > 1:
                with runtime(module.RUNTIME).open(files[base], threads) as session:
                    tried.append(merge.Candidate(str(base), evaluate.divergence(reference, session, rows)))
        kept = bases[0]
        facts: dict[str, Any] = {}
        if tried:
            chosen, why = merge.choose(tried, limits.max_kl)
            kept = chosen.base
            facts["merge"] = {"kept": chosen.base, "why": why, "candidates": [c.as_row() for c in tried]}
        for item in files[kept].parent.iterdir():
            item.rename(folder / item.name)
            if module.APART and item.name != files[kept].name:
                facts |= {"base_file": item.name, "base_bytes": size_bytes(folder / item.name)}
        written = folder / files[kept].name
        progress(0.8, f"opening {written.name} in {module.RUNTIME}")
        unrounded = module.CALIBRATION == "moments" and not importance and weighed(described, section)
        found = verify.verify(
            described,
            written,
            module.RUNTIME,
            reference,
            checked,
            limits.max_kl,
            threads,
            full_precision=lambda: write(kept, _widest(module), scratch / "widest", lambda share, text: None),
            merged=lambda: Reference(described, model.weights(kept), None, checked, threads),
            **({"finer": "name rows that say how to round it, or choose a larger one"} if unrounded else {}),
        )
        if others := [name for name in module.FURTHER if name in runtimes_of(written)]:
            progress(0.95, f"opening {written.name} in {', '.join(others)}")
            found["further"] = verify.further(written, module.RUNTIME, others, checked, threads)
        if section.target == "web":
            progress(0.97, "writing the folder for browsers")
            facts["web"] = for_browsers(written, kind, folder / f"{name}-{kind}-web", threads)
        predicted = module.predict_bytes(described, kind, name, **options, **source(kept))
        if "importance" in module.OPTIONS:
            # None: nothing in this file would look at one
            gains = module.gains_from_importance(described, kind, **_mixing(module, section), **source(kept))
            facts["importance"] = bool(importance) if gains else None
        if "tensor_types" in module.OPTIONS:
            facts["weights"] = module.mixture(described, kind, **options, **source(kept))
            if model.adapter and kept and not module.APART:
                facts["change"] = survival.survey(described, model.unmerged(kept), model.merged(kept), kind)
        facts = {
            "file": written.name,
            "format": section.format,
            "type": kind,
            "runtime": module.RUNTIME,
            "size_bytes": size_bytes(written),
            "predicted_bytes": predicted,
            **found,
            **facts,
            **({"labels": list(model.labels)} if model.labels else {}),
        }
        if hasattr(module, "PHONE"):
            phone_readme.write(folder, facts, module.PHONE, FolderText(described), module.context(described))
        shutil.rmtree(scratch)
        beside.write(folder, facts, origin or beside.origin(model), name, model.system)
        return facts

    return artifact.build(
        out,
        f"{prefix}{section.format}-{kind}",
        "export",
        make,
        made_from={
            "model": model.key,
            **{f"rows.{n}": n for n in rows_from},
            "rows": merge.rows_key(rows if len(bases) > 1 else checked),
            **({"importance": artifact.sha256(importance)} if importance else {}),
        },
        recipe={
            "format": section.format,
            "type": kind,
            "tensor_types": list(section.tensor_types),
            **{key: value for key in ("block", "activations", "exporter", "target") if (value := getattr(section, key)) is not None},
            "name": name,
            "max_kl": limits.max_kl,
            "into": list(bases),
            "origin": dataclasses.asdict(origin) if origin else None,
        },
        versions={
            **artifact.versions_of("gguf", "llama-cpp-python", "onnx", "onnxruntime", "onnxruntime-genai"),
            **(environments.versions(module.ENVIRONMENT) if hasattr(module, "ENVIRONMENT") else {}),
        },
        rows=rows_from,
    )


def for_browsers(written: Path, kind: str, target: Path, threads: int) -> dict[str, Any]:
    """Write the folder that browsers load, beside the ONNX folder it is made of, and hold transformers.js against ONNX Runtime."""
    from edgelora.export import onnx_web

    onnx_web.write(written, kind, target)
    texts, prompts, rendered = verify.expected(written, runtime_of(written), threads)
    found = onnx_web.check(target, texts, prompts, rendered)
    return {"file": target.name, "size_bytes": size_bytes(target), **({"transformers.js": found} if found else {})}


def _part(progress: Progress, done: float, part: float) -> Progress:
    """Progress of one step as a part of all of them."""
    return lambda share, text: progress(done + part * share, text)


def exported_path(made: Artifact) -> Path:
    """What a runtime opens: the file or folder that an export artifact holds."""
    return made.path / str(made.facts["file"])


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files of a folder: what a user downloads."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _widest(module: ModuleType) -> str:
    """The format's widest type, to tell rounding from a wrong conversion."""
    return next(type for type in ("f16", "fp32", "fp16") if type in module.TYPES)
