"""Baselines: what a run measured, small enough to commit, one JSON file a machine class.

    {"schema": 1, "kind": "baseline", "name", "commit", "created", "machine": {"class"}, "files", "losses", "accuracy", "bench"}

Rows are the report's own, cut to what `check` compares; a file's row has `parts`: name -> [type, bytes] of each tensor and
each long piece of metadata. Pretty-printed with sorted keys, so that a commit shows what moved.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgelora import size as sizes
from edgelora.artifact import writing
from edgelora.errors import ModelError

SCHEMA = 1
FOLDER = Path("baselines")
_MAX_BYTES = 16 << 20
_SECTIONS = ("files", "losses", "accuracy", "bench")
_KEPT = {
    "files": ("file", "format", "type", "runtime", "size_bytes", "kl", "top1", "rows", "tokens"),
    "losses": ("set", "file", "rows", "tokens", "after", "change_high"),
    "accuracy": ("set", "file", "rows", "after"),
    "bench": (
        *("file", "runtime", "device_class", "threads", "prompt_tokens", "decode_tokens", "workload", "processor", "turns"),
        *("ttft_ms", "decode_tok_per_s", "peak_rss_bytes", "samples_ms", "crowded", "noisy"),
    ),
}
_AGAIN = "make it again with `edgelora baseline update`"


def make(document: Mapping[str, Any], find: Callable[[str], Path | None]) -> dict[str, Any]:
    """A baseline of a report; `find` gives the path of an exported file by its name, None where it is not at hand."""
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "baseline",
        "name": document.get("name"),
        "commit": document.get("commit"),
        "created": document.get("created"),
        "machine": {"class": (document.get("machine") or {}).get("class")},
    }
    for section in _SECTIONS:
        found[section] = [{key: row[key] for key in _KEPT[section] if key in row} for row in document.get(section) or []]
    for row in found["files"]:
        path = find(str(row.get("file", "")))
        if path is not None:
            row["parts"] = {part.name: [part.type, part.n_bytes] for part in sizes.read(path).parts}
    for row in found["bench"]:
        row["samples_ms"] = {
            k: [round(v, 4) for v in values] for k, values in (row.get("samples_ms") or {}).items() if k in ("ttft", "decode")
        }
    return found


def write(baseline: Mapping[str, Any], folder: Path) -> Path:
    """Write ``folder/<machine class>.json``, whole or not at all, and return its path."""
    path = folder / f"{baseline['machine']['class'] or 'unknown'}.json"
    partial = path.with_name(f".{path.name}.partial")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as stream:
                json.dump(baseline, stream, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
                stream.write("\n")
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def read(path: Path, machine_class: str | None) -> dict[str, Any] | None:
    """The baseline at `path`; of a folder that of `machine_class`, else any (sizes hold everywhere); None when there is none.

    ModelError when it is damaged, too large or something else.
    """
    if path.is_dir():
        own = path / f"{machine_class}.json"
        path = own if own.is_file() else next(iter(sorted(path.glob("*.json"))), own)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            return _parsed(stream.read(_MAX_BYTES + 1), str(path))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", _AGAIN) from error


def history(path: Path, most: int = 50) -> list[dict[str, Any]]:
    """The last versions of a committed baseline, oldest first; `commit` of each is the one that brought it.

    Versions of another schema are left out. ModelError when git knows no version of the file.
    """

    def git(*arguments: str) -> bytes | None:
        try:
            done = subprocess.run(["git", "-C", str(path.parent), *arguments], capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    versions = []
    for commit in (git("log", f"-n{most}", "--format=%h", "--", path.name) or b"").decode().split():
        data = git("show", f"{commit}:./{path.name}")
        with contextlib.suppress(ModelError):
            if data:
                versions.append({**_parsed(data, f"{path} of {commit}"), "commit": commit})
    if not versions:
        raise ModelError(f"git knows no version of {path}", "commit the baseline that `edgelora baseline update` writes, then ask again")
    return versions[::-1]


def _parsed(data: bytes, path: str) -> dict[str, Any]:
    if len(data) > _MAX_BYTES:
        raise ModelError(f"{path} is larger than {_MAX_BYTES >> 20} MiB: no baseline", _AGAIN)
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not a baseline: {str(error)[:200]}", _AGAIN) from error
    if not isinstance(found, dict) or found.get("kind") != "baseline" or found.get("schema") != SCHEMA:
        raise ModelError(f"{path} is not a baseline of schema {SCHEMA}", _AGAIN)
    for section in (*_SECTIONS, "machine"):
        value = found.get(section)
        fits = isinstance(value, dict) if section == "machine" else isinstance(value, list) and all(isinstance(row, dict) for row in value)
        if not fits:
            raise ModelError(f"{path} is damaged: {section} is no {'object' if section == 'machine' else 'list of rows'}", _AGAIN)
    return found
