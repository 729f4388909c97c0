"""An exporter that runs in an environment of its own: a process of it runs `there/write_ENVIRONMENT.py` with a job.

The process has no network and no credentials, one thread, every temporary file inside `scratch`, and dies with us.
"""

from __future__ import annotations

import collections
import errno
import json
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgelora import environments
from edgelora.errors import ModelError, VerifyError
from edgelora.export import onnx_builder

Progress = Callable[[float, str], None]

THERE = Path(__file__).with_name("there")


def run(environment: str, job: Mapping[str, Any], scratch: Path, model: Path, progress: Progress) -> None:
    """Do `job`; its program prints ``edgelora SHARE TEXT`` on the way.

    ToolMissing without the environment; OSError on a full disk. ModelError with the exporter's last words when it fails, VerifyError when it says
    ``edgelora refused TEXT``: what it wrote is not what was asked for.
    """
    python = environments.python(environment)
    (scratch / "tmp").mkdir(exist_ok=True)
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    tail: collections.deque[str] = collections.deque(maxlen=50)
    refused = ""
    with subprocess.Popen(
        [str(python), str(THERE / f"write_{environment}.py"), str(scratch / "job.json")],
        cwd=scratch,
        env={key: value for key, value in onnx_builder.environment(scratch).items() if key not in ("PYTHONPATH", "PYTHONHOME")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=onnx_builder.die_with_us(),
    ) as process:
        try:
            assert process.stdout
            for line in process.stdout:
                word, _, rest = line.strip().partition(" ")
                share, _, text = rest.partition(" ")
                if word == "edgelora" and share == "refused":
                    refused = text
                elif word == "edgelora":
                    progress(float(share), text)
                elif line.strip():
                    tail.append(line.strip())
            code = process.wait()
        except BaseException:
            process.kill()
            raise
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
