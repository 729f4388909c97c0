"""Other people's exporters, each in a process of its own: without network and credentials, and it dies with us."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from edgelora.own_process import ONE_THREAD


def run(command: Sequence[str], scratch: Path, environment: Mapping[str, str], hear: Callable[[str], None]) -> int:
    """The exit code of a program that works in `scratch`; `hear` is told every line of its output, errors included."""
    # Its own working folder, so that no onnx.py of the user's is imported; its own session, so that it dies whole.
    with subprocess.Popen(
        command,
        cwd=scratch,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_us(),
    ) as process:
        try:
            for line in _lines(process):
                hear(line)
            return process.wait()
        except BaseException:
            _kill(process)
            raise


def environment(scratch: Path) -> dict[str, str]:
    """For the child only: no network, no credentials, one thread, every temporary file inside `scratch`."""
    ours = {name: value for name, value in os.environ.items() if not name.endswith("_TOKEN")}
    folders = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch / "tmp")) | {"HF_HOME": str(scratch / "home")}
    fixed = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
    return ours | folders | ONE_THREAD | fixed


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Lines of the child's output; a carriage return ends one too, as progress bars use it."""
    assert process.stdout is not None
    rest = b""
    while block := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
        *whole, rest = re.split(rb"[\r\n]+", rest + block)
        yield from (line.decode("utf-8", "replace") for line in whole)
    yield rest.decode("utf-8", "replace")


def _die_with_us() -> Callable[[], object] | None:
    """On Linux the kernel ends the child when we die, however we die: else it writes into the next attempt's folder."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg") and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
