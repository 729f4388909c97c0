"""Measure exported files on this machine: load, time to the first token, prefill, decode, peak memory.

Decoding one token reads every weight once, so a file of B bytes decodes no faster than bandwidth / B; every row says
what share of that ceiling was reached. Each file runs in a process of its own, which holds the runtime and nothing
else; several files take turns, so that whatever drifts (heat, clocks, other programs) hits all of them alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from edgelora import errors, machine
from edgelora.errors import EdgeloraError
from edgelora.recipe import Bench
from edgelora.runtime import Session, runtime

Progress = Callable[[float, str], None]

WORKLOAD = 1  # of the text, the order and the warm-up below: rows of another number did other work
_WARM_UP_ROUNDS = 5  # at most
_STABLE = 0.05  # two successive decode medians this near each other end the warm-up
_SPREAD = 0.15  # between the decode medians of the repeats; above it a row is called noisy
_LIMIT_S = 900.0  # for one round of one file
_BANDWIDTH_BYTES = 256 << 20  # beyond every cache of today's edge processors
_TEXT = (
    "A small model reads a prompt all at once and then writes its answer one token after the other. Reading is bound by "
    "arithmetic, since every weight that is fetched serves the whole prompt. Writing is bound by memory, since every token "
    "has to fetch all weights again. That is why a file of half the size answers almost twice as fast on the same phone. "
)


@dataclass(frozen=True)
class Timing:
    """One prompt, read and continued: milliseconds to the first token and of each later one, CPU seconds of the latter."""

    prompt_tokens: int
    ttft_ms: float
    decode_ms: tuple[float, ...]
    decode_cpu_s: float


@dataclass(frozen=True)
class Round:
    """One repeat of one file: opened, warmed, timed on every prompt, closed."""

    version: str
    load_ms: float
    timings: tuple[Timing, ...]
    peak_rss_bytes: int
    bytes_per_token: int | None  # of weights, by the runtime's own account of the file


def bench(path: Path, runtime_name: str, settings: Bench, threads: int, progress: Progress) -> list[dict[str, Any]]:
    """`bench_all` of one file."""
    return bench_all([(path, runtime_name)], settings, threads, progress)


def bench_all(files: Sequence[tuple[Path, str]], settings: Bench, threads: int, progress: Progress) -> list[dict[str, Any]]:
    """Measure files, each with the runtime named beside it; one row per file and prompt length.

    A row holds raw samples and their medians; `peak_rss_bytes` is of the whole child process, interpreter included;
    `load_average` is taken before the first round; `noisy` says in `noisy_why` what disturbed the figures.
    Raises what the runtime raised, or EdgeloraError with a child's last words when it crashed or hung.
    """
    load_average, others = machine.load_average(), []
    bandwidth = _measured_bandwidth(threads)
    rounds: list[list[Round]] = [[] for _ in files]
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_child(path.name)) for path, _ in files]
        requests = [{"file": str(path.resolve()), "runtime": name, "threads": threads, **asdict(settings)} for path, name in files]
        for (path, _), child, request in zip(files, children, requests, strict=True):
            progress(0.0, f"warming up {path.name}")
            _warm_up(partial(_round, child, request))
        for repeat in range(settings.repeats):
            for number, (path, _) in enumerate(files):
                progress(
                    (repeat * len(files) + number) / (settings.repeats * len(files)),
                    f"{path.name}, repeat {repeat + 1} of {settings.repeats}",
                )
                others.append(machine.others_running())
                rounds[number].append(_round(children[number], requests[number]))
    progress(1.0, "measured")
    why = _crowded([n for n in others if n is not None], threads, machine.cores())
    rows = []
    for (path, name), measured in zip(files, rounds, strict=True):
        about = {"file": path.name, "runtime": name, "runtime_version": measured[0].version, "threads": threads}
        for index in range(len(settings.prompt_tokens)):
            rows.append({**about, **_row(measured, index, _size(path), bandwidth, why), "load_average": load_average})
    return rows


def measure(
    open_session: Callable[[], Session],
    prompt_tokens: Sequence[int],
    decode_tokens: int,
    clock: Callable[[], float],
    cpu_clock: Callable[[], float],
) -> tuple[float, tuple[Timing, ...]]:
    """One round: (milliseconds to open, a Timing per prompt length). Both clocks tell seconds.

    Before anything is timed the longest prompt is read once: it makes the context and touches every weight.
    """
    started = clock()
    with open_session() as session:
        load_ms = 1000 * (clock() - started)
        ids = _prompt(session, max(prompt_tokens))
        deque(islice(session.generate(ids, decode_tokens + 1, ()), 2), maxlen=0)
        return load_ms, tuple(_timing(session, ids[:n], decode_tokens, clock, cpu_clock) for n in prompt_tokens)


def read_bandwidth(threads: int, n_bytes: int = _BANDWIDTH_BYTES, passes: int = 7) -> float:
    """GB/s (10^9) that `threads` threads together read from memory: the best pass, as this is a ceiling.

    The maximum of bytes is the cheapest thing numpy computes: one vector instruction for every 16 to 64 of them.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    slices = np.array_split(np.ones(n_bytes, np.uint8), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            started = time.perf_counter()
            list(pool.map(np.max, slices))  # numpy lets go of the interpreter lock meanwhile
            best = min(best, time.perf_counter() - started)
    return n_bytes / best / 1e9


def _timing(session: Session, ids: list[int], decode_tokens: int, clock: Callable[[], float], cpu_clock: Callable[[], float]) -> Timing:
    started = clock()
    tokens = session.generate(ids, decode_tokens + 1, ())
    next(tokens)
    now, cpu = clock(), cpu_clock()
    ttft_ms = 1000 * (now - started)
    decode_ms = []
    for _ in tokens:
        before, now = now, clock()
        decode_ms.append(1000 * (now - before))
    return Timing(len(ids), ttft_ms, tuple(decode_ms), cpu_clock() - cpu)


def _prompt(session: Session, n: int) -> list[int]:
    """The first n ids of our paragraph, said as often as it takes."""
    ids = session.tokenize(_TEXT)
    return (ids * (n // len(ids) + 1))[:n]


def _warm_up(one_round: Callable[[], Round]) -> int:
    """Run rounds until two in a row decode alike, at most _WARM_UP_ROUNDS; the number it took."""
    before = _decode_median(one_round())
    for count in range(2, _WARM_UP_ROUNDS + 1):
        now = _decode_median(one_round())
        if abs(now - before) <= _STABLE * before:
            return count
        before = now
    return _WARM_UP_ROUNDS


def _decode_median(measured: Round) -> float:
    return statistics.median(ms for timing in measured.timings for ms in timing.decode_ms)


def _row(rounds: Sequence[Round], index: int, size: int, bandwidth: float, crowded: str) -> dict[str, Any]:
    timings = [r.timings[index] for r in rounds]
    read = rounds[0].bytes_per_token
    load, ttft = [r.load_ms for r in rounds], [t.ttft_ms for t in timings]
    decode = [ms for t in timings for ms in t.decode_ms]
    ttft_ms, decode_ms = statistics.median(ttft), statistics.median(decode)
    medians = [statistics.median(t.decode_ms) for t in timings]
    spread = (max(medians) - min(medians)) / min(medians)
    why = [crowded] if crowded else []
    if spread > _SPREAD:
        why.append(f"the repeats' decode medians are {spread:.0%} apart")
    return {
        "prompt_tokens": timings[0].prompt_tokens,
        "decode_tokens": len(timings[0].decode_ms),
        "workload": WORKLOAD,
        "load_ms": statistics.median(load),
        "ttft_ms": ttft_ms,
        "prefill_tok_per_s": 1000 * timings[0].prompt_tokens / ttft_ms,
        "decode_tok_per_s": 1000 / decode_ms,
        "peak_rss_bytes": max(r.peak_rss_bytes for r in rounds),
        "cpu_s_per_token": statistics.median(t.decode_cpu_s / len(t.decode_ms) for t in timings),
        "size_bytes": size,
        "bandwidth_gb_per_s": bandwidth,
        "bandwidth_share": read / decode_ms / 1e6 / bandwidth if read else None,
        "samples_ms": {"load": load, "ttft": ttft, "decode": decode},
        "crowded": bool(crowded),
        "noisy": bool(why),
        "noisy_why": "; ".join(why),
    }


def _crowded(others: Sequence[int], threads: int, cores: int) -> str:
    """Why other programs make the figures doubtful: more wanted to run than there were cores left, in the middle of the samples."""
    typical = statistics.median(others) if others else 0
    return f"other programs ran beside our {threads} threads on {cores} cores ({typical:g} at a time)" if typical + threads > cores else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _measured_bandwidth(threads: int) -> float:
    with _child("the memory bandwidth") as child:
        return float(child.ask({"threads": threads})["bandwidth_gb_per_s"])


def _round(child: _Child, request: dict[str, Any]) -> Round:
    reply = child.ask(request)
    timings = tuple(Timing(**{**t, "decode_ms": tuple(t["decode_ms"])}) for t in reply["timings"])
    return Round(**{**reply, "timings": timings})


class _Child:
    """The other end of `python -m edgelora.bench`: one JSON object a line in, one out."""

    def __init__(self, name: str, process: subprocess.Popen[str], words: Any, limit_s: float) -> None:
        self._name = name
        self._process = process
        self._words = words
        self._limit_s = limit_s

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
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
def _child(name: str, command: Sequence[str] = ("-m", "edgelora.bench"), limit_s: float = _LIMIT_S) -> Iterator[_Child]:
    """A measuring process; killed when the block is left, whatever happened."""
    source = str(Path(__file__).resolve().parents[1])  # also where edgelora runs from its checkout
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            yield _Child(name, process, words, limit_s)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if "file" not in request:
        return {"bandwidth_gb_per_s": read_bandwidth(request["threads"])}
    opened, path = runtime(request["runtime"]), Path(request["file"])
    load_ms, timings = measure(
        lambda: opened.open(path, request["threads"]),
        request["prompt_tokens"],
        request["decode_tokens"],
        time.perf_counter,
        time.process_time,
    )
    count = getattr(opened, "bytes_per_token", None)  # a runtime that cannot tell leaves it out
    return asdict(Round(opened.version(), load_ms, timings, machine.peak_rss_bytes(), count(path) if count else None))


def _serve() -> None:
    """Answer requests until the parent closes our input. Whatever a runtime prints goes to stderr, out of the replies' way."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = _answer(json.loads(line))
        except EdgeloraError as error:
            reply = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        _serve()
