"""Compensated rounding in processes of its own: it holds Python's lock for much of its time, so threads of one process hardly add up.

    python -m edgelora.quant.workers MOMENTS SHRINK

is one of them. On stdin it takes requests, a line of JSON {name, type, shape} and then the float32 values; on stdout it answers each with
a line {size} and the packed bytes, or {error, hint}. It ends when stdin does. Its matrix products run on one thread,
so the bytes of a file are the same whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from edgelora.errors import EdgeloraError, ModelError
from edgelora.quant import ggml
from edgelora.quant.compensate import Rounding
from edgelora.quant.curvature import Moments
from edgelora.quant.ggml import Type
from edgelora.quant.grids import GRIDS

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")


class Workers(Rounding):
    """A compensated `Rounding` that at most `count` processes do; to be closed. They start when they are wanted.

    `quantize` may be called from several threads, each of which waits for its answer.
    """

    def __init__(self, moments: Path, shrink: float, count: int) -> None:
        known = Moments(moments)
        super().__init__(known, True, shrink)
        self._known = known.source
        self._line = [sys.executable, "-m", __name__, str(moments), repr(shrink)]
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        self._started: list[subprocess.Popen[bytes]] = []
        for _ in range(count):
            self._idle.put(None)

    def quantize(self, name: str, values: np.ndarray, type: Type) -> np.ndarray:
        if type not in GRIDS or name not in self._known:
            return super().quantize(name, values, type)
        process = self._idle.get() or self._start()
        try:
            return _asked(process, name, values, type)
        finally:
            self._idle.put(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe
                with contextlib.suppress(OSError):
                    pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        source = str(Path(__file__).resolve().parents[2])  # also where edgelora runs from its checkout
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": path}
        # A session of its own: Ctrl-C is ours to answer.
        process = subprocess.Popen(self._line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
        self._started.append(process)
        return process


def _asked(process: subprocess.Popen[bytes], name: str, values: np.ndarray, kind: Type) -> np.ndarray:
    assert process.stdin and process.stdout
    head = json.dumps({"name": name, "type": kind.name, "shape": values.shape})
    try:
        process.stdin.write(head.encode() + b"\n" + np.ascontiguousarray(values, np.float32).tobytes())
        process.stdin.flush()
    except BrokenPipeError:
        pass  # what it died of is told below
    line = process.stdout.readline()
    if not line:
        raise EdgeloraError(f"rounding {name} ended with status {process.wait()}", "free some memory, or use fewer --threads")
    reply = json.loads(line)
    if "error" in reply:
        raise ModelError(reply["error"], reply["hint"])
    return np.frombuffer(process.stdout.read(reply["size"]), np.uint8).reshape(len(values), -1)


def serve(moments: Path, shrink: float, asked: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    rounding = Rounding(Moments(moments), True, shrink)
    while line := asked.readline():
        request = json.loads(line)
        shape = request["shape"]
        values = np.frombuffer(asked.read(4 * math.prod(shape)), np.float32).reshape(shape)
        try:
            packed = rounding.quantize(request["name"], values, ggml.Type[request["type"]]).tobytes()
        except ModelError as error:
            answers.write(json.dumps({"error": error.message, "hint": error.hint}).encode() + b"\n")
        else:
            answers.write(json.dumps({"size": len(packed)}).encode() + b"\n" + packed)
        answers.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
