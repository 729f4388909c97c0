"""Finished folders: what a stage made, from what, with which settings, and the hash of every file.

A stage writes into a hidden folder beside its final place, the manifest last, then renames. So a folder
``<name>-<key>`` that exists is finished, and one killed half-way never looks like one.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from edgelora import __version__, processes
from edgelora.errors import DataError, DiskFull, EdgeloraError, ModelError, UsageError

MANIFEST = "manifest.json"
SCHEMA = 1
_HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class Artifact:
    """A finished folder and its manifest.

    ``files`` maps each file's relative name to its SHA-256, ``made_from`` each input's role to its key,
    ``rows`` each data set this artifact read to what it served for (``train``, ``select`` or ``report``),
    ``facts`` holds what the stage measured (JSON values; units in the names).
    """

    path: Path
    kind: str
    key: str
    bytes: int
    files: Mapping[str, str] = field(default_factory=dict)
    made_from: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def file(self, suffix: str) -> Path:
        """The one file whose name ends in `suffix`."""
        found = [name for name in self.files if name.endswith(suffix)]
        if len(found) != 1:
            raise ModelError(
                f"{self.path.name} holds {len(found)} files that end in {suffix!r}, expected one",
                "make the artifact again with the command that made it",
            )
        return self.path / found[0]


def load(path: Path) -> Artifact:
    """Read a finished folder's manifest; ModelError when there is none or it is damaged."""
    manifest = path / MANIFEST
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        if values.pop("schema") != SCHEMA:
            raise ModelError(f"{manifest} was written by another version of edgelora", "make it again")
        return Artifact(path=path, **values)
    except FileNotFoundError:
        raise ModelError(f"{path} is not an edgelora artifact: it has no {MANIFEST}", "name a folder that edgelora wrote") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{manifest} is damaged: {error}", "make the artifact again") from error


def stage_key(kind: str, made_from: Mapping[str, str], recipe: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """SHA-256 (hex) of everything that decides a stage's result."""
    text = json.dumps([SCHEMA, kind, dict(made_from), dict(recipe), dict(versions)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def versions_of(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that decide a stage's result, edgelora's own included."""
    found = {"edgelora": __version__}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def build(
    parent: Path,
    name: str,
    kind: str,
    make: Callable[[Path], Mapping[str, Any]],
    *,
    made_from: Mapping[str, str],
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
    rows: Mapping[str, str] | None = None,
    resumable: bool = False,
) -> Artifact:
    """Return the finished artifact ``parent/name-key``, making it with `make(folder) -> facts` unless it is there.

    `make` fills the folder and returns the stage's facts. With `resumable`, what an interrupted attempt left in the
    hidden folder is handed to `make` again; otherwise it is removed first. Errors leave no folder under the final name.
    """
    key = stage_key(kind, made_from, recipe, versions)
    final = place(parent, name, kind, made_from, recipe, versions)
    return _build(final, kind, key, make, made_from, recipe, versions, rows or {}, resumable)


def place(parent: Path, name: str, kind: str, made_from: Mapping[str, str], recipe: Mapping[str, Any], versions: Mapping[str, str]) -> Path:
    """Where `build` puts an artifact that is made from these."""
    return parent / f"{name}-{stage_key(kind, made_from, recipe, versions)[:8]}"


def unfinished(final: Path) -> Path:
    """The hidden folder that becomes `final`."""
    return final.parent / f".{final.name}.partial"


def build_as(
    final: Path,
    kind: str,
    make: Callable[[Path], Mapping[str, Any]],
    *,
    made_from: Mapping[str, str],
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
    rows: Mapping[str, str] | None = None,
) -> Artifact:
    """Like `build`, under a name that the user chose. UsageError when something else stands there already."""
    key = stage_key(kind, made_from, recipe, versions)
    if final.exists() and (not (final / MANIFEST).is_file() or load(final).key != key):
        raise UsageError(f"{final} exists and was made from something else", "choose another folder, or remove it first")
    return _build(final, kind, key, make, made_from, recipe, versions, rows or {}, resumable=False)


def _build(
    final: Path,
    kind: str,
    key: str,
    make: Callable[[Path], Mapping[str, Any]],
    made_from: Mapping[str, str],
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
    rows: Mapping[str, str],
    resumable: bool,
) -> Artifact:
    if (use := rows.get("sealed", "report")) != "report":
        raise DataError(f"sealed reports and was to {use}", "choose on `valid`: what selects never reports")
    if final.exists():
        return load(final)
    work = unfinished(final)
    with writing(final.parent):
        if not resumable:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        try:
            facts = make(work)
            _finish(work, final, kind, key, made_from, rows, recipe, versions, facts)
        except BaseException:
            if not resumable:
                shutil.rmtree(work, ignore_errors=True)
            raise
    return load(final)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn any way of meeting a full disk below `folder` into one clear DiskFull error.

    Libraries report it as they like (OSError, SafetensorError, RuntimeError), so the text and the
    free space are looked at too.
    """
    try:
        yield
    except EdgeloraError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "no space left" in str(error).lower() or _free_bytes(folder) < 1 << 20:
            raise DiskFull(
                f"no space left on the disk of {folder}",
                "free some space or choose another --out, then run the same command again: finished stages are kept",
            ) from error
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, so that two runs never write into it at once. Of several processes the first holds it for all."""
    if processes.index():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{folder} is not a folder", "choose another --out") from None
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EdgeloraError(f"another edgelora command is writing into {folder}", "wait for it, or choose another --out") from None
        yield


def _finish(
    work: Path,
    final: Path,
    kind: str,
    key: str,
    made_from: Mapping[str, str],
    rows: Mapping[str, str],
    recipe: Mapping[str, Any],
    versions: Mapping[str, str],
    facts: Mapping[str, Any],
) -> None:
    found = sorted(p for p in work.rglob("*") if p.is_file() and p.name != MANIFEST)
    values = asdict(
        Artifact(
            path=final,
            kind=kind,
            key=key,
            bytes=sum(p.stat().st_size for p in found),
            files={p.relative_to(work).as_posix(): sha256(p) for p in found},
            made_from=dict(made_from),
            rows=dict(rows),
            recipe=dict(recipe),
            versions=dict(versions),
            facts=dict(facts),
        )
    )
    del values["path"]  # an absolute path is nobody else's business
    with (work / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump({"schema": SCHEMA, **values}, stream, indent=1, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    work.rename(final)


def find(out: Path, name: str) -> Path | None:
    """The file or folder `name` inside a finished artifact below `out`, None when there is none."""
    if not name or Path(name).name != name:
        return None
    return next((path for path in sorted(out.glob(f"*/{glob.escape(name)}")) if (path.parent / MANIFEST).is_file()), None)


def measured_on(out: Path, kind: str, model_key: str) -> Artifact | None:
    """The artifact of a kind below `out` that was measured on the model with content `model_key`, None when there is none."""
    for manifest in sorted(out.glob(f"*{kind}-*/{MANIFEST}")):
        made = load(manifest.parent)
        if made.kind == kind and made.made_from.get("model") == model_key:
            return made
    return None


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
