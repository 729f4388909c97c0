"""What is known of an artifact that is to be judged: the report of a run, or the size of a model file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgelora import artifact, report, size

Find = Callable[[str], Path | None]  # the path of an exported file by its name, None where it is not at hand


def measured(path: Path) -> tuple[dict[str, Any], Find]:
    """The report at `path` (a run's folder or a report.json), or of a model file what can be said without running it.

    ModelError when there is nothing, or it is damaged.
    """
    if path.suffix == ".json" or (path / "report.json").is_file():
        run = path if path.is_dir() else path.parent
        return report.read(path), lambda name: artifact.find(run, name)
    if path.is_dir() and not any(p.suffix.lower() in size.READERS for p in path.iterdir()):
        return report.read(path), lambda name: None  # which says that there is no report
    found = size.read(path)
    return {"name": path.name, "files": [{"file": found.name, "size_bytes": found.size_bytes}]}, lambda name: path
