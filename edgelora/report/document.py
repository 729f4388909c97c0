"""The document of files that were benched outside of a run: what `edgelora bench -o` writes and `edgelora report` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora import size
from edgelora.errors import ModelError
from edgelora.report.schema import SCHEMA


def parts(path: Path) -> dict[str, dict[str, int]]:
    """Bytes of each group of tensors by type, from a file's header; empty where it cannot be read that way."""
    found: dict[str, dict[str, int]] = {}
    try:
        anatomy = size.read(path)
    except ModelError:
        return {}
    for part in anatomy.parts:
        types = found.setdefault(part.group, {})
        types[part.type] = types.get(part.type, 0) + part.n_bytes
    return found


def of_files(
    name: str, files: Sequence[tuple[Path, str, str | None]], about: Mapping[str, Any], found: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """A report of `files` (path, runtime, SHA-256 where it was taken).

    `about` goes in as it is (machine, versions, created, commands, notes), and so do the rows of `found` by section;
    its section `divergence` has a file's KL and top-1 beside `file` and goes into the files' rows.
    """
    divergence = {row["file"]: {k: v for k, v in row.items() if k in _DIVERGENCE} for row in found.get("divergence", ())}
    rows = []
    for path, runtime, digest in files:
        kind = {".gguf": "gguf"}.get(path.suffix.lower(), "onnx" if (path / "model.onnx").is_file() else "")
        row: dict[str, Any] = {"file": path.name, "format": kind or None, "runtime": runtime, "size_bytes": size.read(path).size_bytes}
        rows.append({**row, "parts": parts(path), **divergence.get(path.name, {}), **({"sha256": digest} if digest else {})})
    sections = {key: list(value) for key, value in found.items() if key != "divergence" and value}
    return {"schema": SCHEMA, "name": name, **about, "files": rows, **sections}


_DIVERGENCE = ("kl", "kl_low", "kl_high", "top1", "rows", "tokens")
