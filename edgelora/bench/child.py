"""The measuring process: `python -m edgelora.bench` holds the runtime and nothing else; one JSON object a line in, one out."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgelora import errors, machine, own_process
from edgelora.bench import cores
from edgelora.bench.rounds import Round, measure, measure_in_browser, read_bandwidth
from edgelora.errors import EdgeloraError
from edgelora.runtime import IN_BROWSER, runtime
from edgelora.runtime.timing import Timing

_LIMIT_S = 900.0  # for one round of one file
_WAITING = {"waiting": True}  # says a child in the middle of a round; whatever it is asked then, it goes on
_SPARE = 8  # tokens of context beyond those that are asked for


class Child:
    """Our end of a measuring process."""

    def __init__(self, name: str, process: subprocess.Popen[str], words: Any, limit_s: float) -> None:
        self._name = name
        self._process = process
        self._words = words
        self._limit_s = limit_s

    def round(self, request: dict[str, Any]) -> Round:
        """One round of the file that `request` names."""
        while (done := self.turn(request)) is None:
            pass
        return done

    def turn(self, request: dict[str, Any]) -> Round | None:
        """The next turn of a round that `request` asks for; None when others have theirs before it goes on."""
        reply = self.ask(request)
        if reply == _WAITING:
            return None
        timings = tuple(Timing(**{**t, "decode_ms": tuple(t["decode_ms"])}) for t in reply["timings"])
        return Round(**{**reply, "timings": timings})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises what the runtime raised, EdgeloraError when the process crashed or hung."""
        assert self._process.stdin and self._process.stdout
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            self._process.kill()

        late = threading.Timer(self._limit_s, give_up)
        late.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if not line:
            raise self._death(timed_out.is_set())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            kind = getattr(errors, reply["error"], EdgeloraError)
            raise kind(reply["message"], reply["hint"])
        return reply

    def _death(self, timed_out: bool) -> EdgeloraError:
        code = self._process.wait()
        self._words.seek(0)
        said = [line.strip() for line in self._words.read().decode("utf-8", "replace").splitlines() if line.strip()]
        how = (
            f"took longer than {self._limit_s:.0f} s"
            if timed_out
            else f"died of signal {-code}"
            if code < 0
            else f"ended with status {code}"
        )
        return EdgeloraError(
            f"the bench of {self._name} {how}: {said[-1] if said else 'it said nothing'}",
            "measure it with fewer tokens, or free some memory",
        )


@contextlib.contextmanager
def measuring(name: str, command: Sequence[str] = ("-m", "edgelora.bench"), limit_s: float = _LIMIT_S) -> Iterator[Child]:
    """A measuring process; killed when the block is left, whatever happened."""
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            env=own_process.environment(),
        )
        try:
            yield Child(name, process, words, limit_s)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()


def answer(request: dict[str, Any], others: Callable[[], None]) -> dict[str, Any]:
    """What `request` asks for. In the middle of a round with `turns` the call of `others` returns when it is this file's turn again."""
    if "file" not in request:
        return {"bandwidth_gb_per_s": read_bandwidth(request["threads"])}
    opened, path = runtime(request["runtime"]), Path(request["file"])
    count = getattr(opened, "bytes_per_token", None)  # a runtime that cannot tell leaves it out
    read = count(path) if count else None
    if request["runtime"] in IN_BROWSER.values():
        return asdict(_in_browser(opened, path, request, read))
    if request.get("cores"):
        cores.stay_on(request["cores"])
    # A library in a process of its own is imported before the clock runs, as those in this one are.
    open_file = opened.start() if hasattr(opened, "start") else opened.open
    load_ms, timings, peak_rss_bytes = measure(
        lambda: open_file(path, request["threads"]),
        request["prompt_tokens"],
        request["decode_tokens"],
        time.perf_counter,
        machine.cpu_seconds,
        others if request.get("turns") else None,
    )
    return asdict(Round(opened.version(), load_ms, timings, peak_rss_bytes, read))


def _in_browser(opened: Any, path: Path, request: dict[str, Any], bytes_per_token: int | None) -> Round:
    """A Chromium of its own for every round; starting it is no part of `load_ms`, its memory is part of the peak."""
    room = max(request["prompt_tokens"]) + request["decode_tokens"] + _SPARE
    with opened.open(path, request["threads"], context=room) as session:
        timings = measure_in_browser(session, request["prompt_tokens"], request["decode_tokens"])
        version = f"{opened.version()}, {session.page.browser}"
        return Round(version, session.load_ms, timings, session.page.tree.peak_bytes, bytes_per_token)


def _fall_silent() -> None:
    """Wait until this process's threads sleep, a tenth of a second at most: OpenMP's spin for 10 ms after their work, on cores that others want."""
    for _ in range(50):
        before = time.process_time()
        time.sleep(0.002)
        if time.process_time() - before < 0.001:
            return


def serve() -> None:
    """Answer requests until the parent closes our input. Whatever a runtime prints goes to stderr, out of the replies' way."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        _fall_silent()
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    def others() -> None:
        say(_WAITING)
        if not sys.stdin.readline():
            sys.exit()

    for line in sys.stdin:
        try:
            say(answer(json.loads(line), others))
        except EdgeloraError as error:
            say({"error": type(error).__name__, "message": error.message, "hint": error.hint})
