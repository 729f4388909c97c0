"""An exporter that runs in an environment of its own: a process of it runs `there/write_ENVIRONMENT.py` with a job.

The process has no network and no credentials, one thread, every temporary file inside its scratch folder, and dies with us.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgelora import environments
from edgelora.errors import ModelError, Unsupported, VerifyError
from edgelora.export import child, configuration
from edgelora.progress import Progress
from edgelora.weights import Checkpoint

CONTEXT = 2048  # tokens of cache that a file for phones reserves; as much as MNN does by itself
THERE = Path(__file__).with_name("there")


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder below `folder` that is empty now and gone afterwards."""
    place = folder / ".elsewhere"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def context(model: Path) -> int:
    """Tokens that a file holds: `CONTEXT`, or what the model knows if that is less."""
    return int(min(CONTEXT, configuration.of(model).max_position_embeddings))


def tried(model: Path, architectures: Sequence[str], what: str) -> tuple[Any, Mapping[str, Sequence[int]]]:
    """A model's configuration and shapes; Unsupported unless its architecture was held against the model itself in this format."""
    config, shapes = configuration.of(model), Checkpoint(model).shapes
    if config.model_type not in architectures:
        raise Unsupported(
            f"{what} of {config.model_type} models were not tried", f"tried: {', '.join(architectures)}; or export it as gguf"
        )
    return config, shapes


def run(environment: str, job: Mapping[str, Any], place: Path, model: Path, progress: Progress) -> None:
    """Do `job`, working in `place`; its program prints ``edgelora SHARE TEXT`` on the way.

    ToolMissing without the environment; OSError on a full disk. ModelError with the exporter's last words when it fails, VerifyError when it says
    ``edgelora refused TEXT``: what it wrote is not what was asked for.
    """
    python = environments.python(environment)
    (place / "tmp").mkdir(exist_ok=True)
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    tail: collections.deque[str] = collections.deque(maxlen=50)
    refused = ""

    def hear(line: str) -> None:
        nonlocal refused
        word, _, rest = line.strip().partition(" ")
        share, _, text = rest.partition(" ")
        if word == "edgelora" and share == "refused":
            refused = text
        elif word == "edgelora":
            progress(float(share), text)
        elif line.strip():
            tail.append(line.strip())

    ours = {key: value for key, value in child.environment(place).items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    code = child.run([str(python), str(THERE / f"write_{environment}.py"), str(place / "job.json")], place, ours, hear)
    if refused:
        raise VerifyError(f"{model.name}: {refused}", f"the culprit is {environment}: export it as gguf instead")
    if code and any("no space left" in line.lower() for line in tail):
        raise OSError(errno.ENOSPC, f"the {environment} exporter: {tail[-1][:200]}")
    if code < 0:
        raise ModelError(
            f"the {environment} exporter was ended by {signal.Signals(-code).name} on {model.name}",
            "this is usually too little memory: close other programs",
        )
    if code:
        raise ModelError(
            f"the {environment} exporter cannot write {model.name}: {tail[-1][:400] if tail else 'it printed nothing'}",
            "export it as gguf instead",
        )
