"""Export: a merged model in, a file that ships out, opened again in the runtime that users will run it with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from edgelora import artifact, doctor
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data.chat import Encoded
from edgelora.errors import UsageError
from edgelora.export import FORMATS, verify

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
    model: Path,
    key: str,
    section: recipes.Export,
    *,
    name: str,
    rows: Sequence[Encoded],
    rows_from: Mapping[str, str],
    limits: recipes.Evaluate,
    threads: int,
    out: Path,
    prefix: str = "",
    progress: Progress,
) -> Artifact:
    """Write `model` (a Hugging Face folder with content `key`) in one format and verify it on `rows`.

    `rows_from` says which data set the rows are and what it served for. A file that fails its verification raises
    VerifyError and is not left under its final name.
    """
    section = resolve(section)
    module = format_module(section.format)
    kind = str(section.type)

    def make(folder: Path) -> dict[str, Any]:
        progress(0.0, f"writing {section.format} {kind}")
        predicted = module.predict_bytes(model, kind, name)
        written = module.write(model, kind, folder, name, lambda share, text: progress(0.8 * share, text))
        progress(0.8, f"opening {written.name} in {module.RUNTIME}")
        scratch = folder / ".scratch"
        found = verify.verify(model, written, module.RUNTIME, rows, limits.max_kl, threads, lambda: _full_precision(module, model, scratch))
        shutil.rmtree(scratch, ignore_errors=True)
        return {
            "file": written.name,
            "format": section.format,
            "type": kind,
            "runtime": module.RUNTIME,
            "size_bytes": size_bytes(written),
            "predicted_bytes": predicted,
            **found,
            **_labels(model),
        }

    return artifact.build(
        out,
        f"{prefix}{section.format}-{kind}",
        "export",
        make,
        made_from={
            "model": key,
            **{f"rows.{n}": n for n in rows_from},
            "rows": artifact.stage_key("rows", {}, {"ids": [r.ids for r in rows]}, {}),
        },
        recipe={"format": section.format, "type": kind, "name": name, "max_kl": limits.max_kl},
        versions=artifact.versions_of("gguf", "llama-cpp-python", "onnx", "onnxruntime", "onnxruntime-genai"),
        rows=rows_from,
    )


def _labels(model: Path) -> dict[str, Any]:
    """The labels of a merged classifier, so that whoever has the exported file's folder need not name them."""
    known = (model / artifact.MANIFEST).is_file() and artifact.load(model).facts.get("labels")
    return {"labels": known} if known else {}


def exported_path(made: Artifact) -> Path:
    """What a runtime opens: the file or folder that an export artifact holds."""
    return made.path / str(made.facts["file"])


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files of a folder: what a user downloads."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _full_precision(module: ModuleType, model: Path, scratch: Path) -> Path:
    """The same model in the format's widest type, to tell rounding from a wrong conversion."""
    scratch.mkdir(exist_ok=True)
    widest = "f16" if "f16" in module.TYPES else "fp32"
    return Path(module.write(model, widest, scratch, "widest", lambda share, text: None))
