"""A baseline made of a file or run that is at hand, measured in turns with what is checked.

A committed baseline is a record of other minutes, and the speed of a machine drifts between them. Where the old file is there
too, both run side by side, and a file that is a tenth slower is told from chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelora import baseline as baselines
from edgelora import machine, speeds
from edgelora.errors import UsageError
from edgelora.measured import Find, measured
from edgelora.progress import Progress, part
from edgelora.recipe import Bench

Document = Mapping[str, Any]
_OF_FILES = ("files", "losses", "accuracy", "bench")


def against(document: Document, find: Find, old: Path, timed: bool, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the document, a baseline) to give to `check.check`: `document` and `find` are of what is checked, `old` of what it is held against.

    Files are joined by name, two single ones whatever their names. With `timed` both are run in turns, and these are the rows of both
    `bench`: in the runtime and with the threads and prompts of `document`, or where it has none in the first runtime on all cores.
    UsageError when no file has a counterpart, or one that is to be run is not at hand; ModelError when `old` cannot be read.
    """
    before, find_old = measured(old)
    pairs = _pairs(_names(document), _names(before))
    if not pairs:
        raise UsageError(f"{old} holds no file of those that are checked", "name two files, or two runs with the same exports")
    renamed = {theirs: ours for ours, theirs in pairs.items()}
    before = {**before, **{key: [_called(row, renamed) for row in before.get(key) or ()] for key in _OF_FILES}}
    document = dict(document)
    if timed:
        rows, old_rows = [], []
        for number, (ours, theirs) in enumerate(pairs.items()):
            files = [_at_hand(find(ours), ours), _at_hand(find_old(theirs), theirs)]
            both = _in_turns(document, ours, files, part(progress, number, len(pairs)))
            rows += both[0]
            old_rows += [{**row, "file": ours} for row in both[1]]
        here = {"machine": machine.describe()}
        document |= {**here, "bench": rows}
        before |= {**here, "bench": old_rows}
    return document, baselines.make(before, lambda name: find_old(pairs.get(name, name)))


def _in_turns(document: Document, name: str, files: list[Path], progress: Progress) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Bench rows of the two files."""
    from edgelora import bench

    ways = _ways(document, name, files[0])
    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for number, ((runtime, threads, decode_tokens), prompts) in enumerate(ways.items()):
        settings = Bench(tuple(prompts), decode_tokens, speeds.REPEATS)
        named = [(path, runtime) for path in files]
        found = bench.bench_all(named, settings, threads, part(progress, number, len(ways)))
        rows[0].extend(found[: len(found) // 2])
        rows[1].extend(found[len(found) // 2 :])
    return rows


def _ways(document: Document, name: str, path: Path) -> dict[tuple[str, int, int], list[int]]:
    """(runtime, threads, decoded tokens) -> prompt lengths, as a report says that the file was measured on this machine."""
    from edgelora.runtime import runtime_of

    ways: dict[tuple[str, int, int], list[int]] = {}
    for row in document.get("bench") or ():
        way = (row.get("runtime"), row.get("threads"), row.get("decode_tokens"))
        if row.get("file") == name and not row.get("device") and all(way) and row.get("prompt_tokens"):
            ways.setdefault(way, []).append(row["prompt_tokens"])
    return ways or {(runtime_of(path), machine.cores(), Bench.decode_tokens): list(Bench.prompt_tokens)}


def _pairs(ours: list[str], theirs: list[str]) -> dict[str, str]:
    if len(ours) == len(theirs) == 1:
        return {ours[0]: theirs[0]}
    return {name: name for name in ours if name in theirs}


def _names(document: Document) -> list[str]:
    return [str(row["file"]) for row in document.get("files") or () if row.get("file")]


def _called(row: Document, names: Mapping[str, str]) -> dict[str, Any]:
    return {**row, "file": names.get(str(row.get("file")), row.get("file"))}


def _at_hand(path: Path | None, name: str) -> Path:
    if path is None:
        raise UsageError(
            f"{name} is not at hand, so that it cannot be measured", "name the file itself, or the folder of the run that made it"
        )
    return path
