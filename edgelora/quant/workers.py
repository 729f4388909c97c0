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
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import Executor
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from edgelora import own_process
from edgelora.errors import EdgeloraError, ModelError
from edgelora.quant import ggml
from edgelora.quant.compensate import KEPT, Rounding
from edgelora.quant.curvature import Moments
from edgelora.quant.ggml import Type
from edgelora.quant.grids import GRIDS

_HINT = "free some memory, or use fewer --threads"


class Workers(Rounding):
    """A compensated `Rounding` that at most `count` processes do; to be closed. They start when they are wanted.

    `quantize` may be called from several threads, each of which waits for its answer; a matrix goes to a process that knows its factors, if one is idle.
    """

    def __init__(self, moments: Path, shrink: float, count: int, pool: Executor | None = None) -> None:
        known = Moments(moments)
        super().__init__(known, True, shrink, pool)
        self._known = known.source
        self._workers = [_Worker(moments, shrink) for _ in range(count)]
        self._idle = list(self._workers)  # the one that rested longest first
        self._changed = threading.Condition()

    def stop(self) -> None:
        super().stop()
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _quantize(self, name: str, values: np.ndarray, type: Type) -> np.ndarray:
        if type not in GRIDS or name not in self._known:
            return super()._quantize(name, values, type)
        worker = self._take(name)
        try:
            return worker.quantize(name, values, type)
        finally:
            with self._changed:
                self._idle.append(worker)
                self._changed.notify()

    def _take(self, name: str) -> _Worker:
        with self._changed:
            self._changed.wait_for(lambda: self._idle)
            worker = next((worker for worker in self._idle if name in worker.latest), self._idle[0])
            self._idle.remove(worker)
            return worker


class _Worker:
    """One process, from the first request on; `latest` are the matrices whose factors it keeps."""

    def __init__(self, moments: Path, shrink: float) -> None:
        self.latest: deque[str] = deque(maxlen=KEPT)
        self._line = [sys.executable, "-m", __name__, str(moments), repr(shrink)]
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()

    def quantize(self, name: str, values: np.ndarray, kind: Type) -> np.ndarray:
        if name not in self.latest:
            self.latest.append(name)
        process = self._process = self._process or self._start(name)
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps({"name": name, "type": kind.name, "shape": values.shape}).encode() + b"\n")
            process.stdin.write(np.ascontiguousarray(values, np.float32).data.cast("B"))
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):  # it is dead, or stop closed its pipes
            line = b""
        if not line:
            raise EdgeloraError(f"rounding {name} ended with status {process.wait()}", _HINT)
        reply = json.loads(line)
        if "error" in reply:
            raise ModelError(reply["error"], reply["hint"])
        return np.frombuffer(process.stdout.read(reply["size"]), np.uint8).reshape(len(values), -1)

    def stop(self) -> None:
        self._stopped.set()
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, AttributeError):
                pipe.close()  # type: ignore[union-attr]

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        if self._stopped.is_set():
            raise EdgeloraError(f"rounding {name} was stopped", "start it again")
        environment = {**own_process.environment(), **own_process.ONE_THREAD}
        try:
            # A session of its own: Ctrl-C is ours to answer.
            return subprocess.Popen(self._line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
        except OSError as error:
            raise EdgeloraError(f"a process to round {name} cannot be started: {error.strerror}", _HINT) from error


def serve(moments: Path, shrink: float, asked: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    rounding = Rounding(Moments(moments), True, shrink)
    while line := asked.readline():
        request = json.loads(line)
        shape = request["shape"]
        data = asked.read(4 * math.prod(shape))
        if len(data) < 4 * math.prod(shape):
            return  # whoever asked is gone
        values = np.frombuffer(data, np.float32).reshape(shape)
        try:
            packed = rounding.quantize(request["name"], values, ggml.Type[request["type"]]).tobytes()
        except ModelError as error:
            answers.write(json.dumps({"error": error.message, "hint": error.hint}).encode() + b"\n")
        else:
            answers.write(json.dumps({"size": len(packed)}).encode() + b"\n" + packed)
        answers.flush()


if __name__ == "__main__":
    try:
        serve(Path(sys.argv[1]), float(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:  # nobody waits for the answer any more
        os._exit(1)
