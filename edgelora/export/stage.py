"""Export: a tuned model in, a file that ships out, opened again in the runtime that users will run it with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from edgelora import artifact, doctor, evaluate, merge
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data.chat import Encoded
from edgelora.errors import UsageError
from edgelora.export import FORMATS, verify
from edgelora.export.reference import Reference
from edgelora.runtime import runtime
from edgelora.tuned import Tuned
from edgelora.weights import Checkpoint

Progress = Callable[[float, str], None]


def format_module(name: str) -> ModuleType:
    """The format of that name; UsageError for an unknown one, ToolMissing when a package it needs is absent or broken."""
    if name not in FORMATS:
        raise UsageError(f"{name!r} is not a format", f"known formats: {', '.join(FORMATS)}")
    return doctor.load(FORMATS[name])


def resolve(section: recipes.Export) -> recipes.Export:
    """The section with its type filled in; UsageError for a type the format does not have."""
    import difflib

    module = format_module(section.format)
    kind = section.type or module.DEFAULT_TYPE
    if kind not in module.TYPES:
        near = difflib.get_close_matches(kind, module.TYPES, n=1)
        raise UsageError(
            f"{section.format} has no type {kind!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            f"its types: {', '.join(module.TYPES)}",
        )
    return recipes.Export(section.format, kind)


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
    progress: Progress,
) -> Artifact:
    """Write `model` in one format and verify it against the model as trained, on the first of `rows`.

    An adapter that has not been merged yet is merged on the way. Where it can go into two bases and `merge_base` is
    "auto", both files are written and measured on all `rows`, in the runtime of their users; the better one is kept.
    `rows_from` says which data set the rows are and what it served for. A file that fails its verification raises
    VerifyError and is not left under its final name.
    """
    section = resolve(section)
    module = format_module(section.format)
    kind = str(section.type)
    bases: tuple[str | None, ...] = (None,) if model.folder else model.into(merge_base)
    if not (model.folder or module.MERGES):
        raise UsageError(f"{section.format} is written from a merged model", "merge the adapter first: edgelora merge")
    checked = rows[: limits.verify_rows]

    def make(folder: Path) -> dict[str, Any]:
        scratch = folder / ".scratch"
        scratch.mkdir()
        described = model.folder or model.describe(scratch)

        def weights(base: str | None) -> dict[str, Any]:
            return {} if base is None else {"weights": model.merged(base)}

        def write(base: str | None, type: str, place: Path, step: Progress) -> Path:
            place.mkdir(exist_ok=True)
            return Path(module.write(described, type, place, name, step, **weights(base)))

        progress(0.0, "running the model as trained")
        reference = model.as_trained(rows if len(bases) > 1 else checked, threads)
        tried, files = [], {}
        for number, base in enumerate(bases):
            step = _part(progress, 0.1 + 0.7 * number / len(bases), 0.7 / len(bases))
            files[base] = write(base, kind, scratch / str(base), step)
            if len(bases) > 1:
                with runtime(module.RUNTIME).open(files[base], threads) as session:
                    tried.append(merge.Candidate(str(base), evaluate.divergence(reference, session, rows)))
        kept, facts = bases[0], {}
        if tried:
            chosen, why = merge.choose(tried, limits.max_kl)
            kept, facts = chosen.base, {"merge": {"kept": chosen.base, "why": why, "candidates": [c.as_row() for c in tried]}}
        written = files[kept].rename(folder / files[kept].name)
        progress(0.8, f"opening {written.name} in {module.RUNTIME}")
        found = verify.verify(
            described,
            written,
            module.RUNTIME,
            reference,
            checked,
            limits.max_kl,
            threads,
            full_precision=lambda: write(kept, _widest(module), scratch / "widest", lambda share, text: None),
            merged=lambda: Reference(described, weights(kept).get("weights") or Checkpoint(described), None, checked, threads),
        )
        predicted = module.predict_bytes(described, kind, name, **weights(kept))
        shutil.rmtree(scratch)
        return {
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

    return artifact.build(
        out,
        f"{prefix}{section.format}-{kind}",
        "export",
        make,
        made_from={"model": model.key, **{f"rows.{n}": n for n in rows_from}, "rows": merge.rows_key(rows if len(bases) > 1 else checked)},
        recipe={"format": section.format, "type": kind, "name": name, "max_kl": limits.max_kl, "into": list(bases)},
        versions=artifact.versions_of("gguf", "llama-cpp-python", "onnx", "onnxruntime", "onnxruntime-genai"),
        rows=rows_from,
    )


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
    return "f16" if "f16" in module.TYPES else "fp32"
