"""One repeat of one file, measured inside the process that holds the runtime; and the memory's own speed."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from edgelora import machine
from edgelora.runtime import Session
from edgelora.runtime.timing import Timing

if TYPE_CHECKING:
    from edgelora.runtime.browser import BrowserSession

_READ_S, _READINGS = 0.4, 5  # a file that takes turns reads a prompt again until it read for so long, or so often
TURN_S = 0.05  # a file that takes turns decodes for this long, or one token: other guests and clocks change a core's speed within a second
WORKLOAD = 1  # of the text, the order and the warm-up below: rows of another number did other work
_BANDWIDTH_BYTES = 256 << 20  # beyond every cache of today's edge processors
TEXT = (
    "A small model reads a prompt all at once and then writes its answer one token after the other. Reading is bound by "
    "arithmetic, since every weight that is fetched serves the whole prompt. Writing is bound by memory, since every token "
    "has to fetch all weights again. That is why a file of half the size answers almost twice as fast on the same phone. "
)


@dataclass(frozen=True)
class Round:
    """One repeat of one file: opened, warmed, timed on every prompt, closed."""

    version: str
    load_ms: float
    timings: tuple[Timing, ...]
    peak_rss_bytes: int
    bytes_per_token: int | None  # of weights, by the runtime's own account of the file


def measure(
    open_session: Callable[[], Session],
    prompt_tokens: Sequence[int],
    decode_tokens: int,
    clock: Callable[[], float],
    cpu_clock: Callable[[int], float],
    others: Callable[[], None] | None = None,
) -> tuple[float, tuple[Timing, ...], int]:
    """One round: (milliseconds to open, a Timing per prompt length, peak memory in bytes). Both clocks tell seconds.

    `others` lets the other files have their turn: before a prompt, before its first token is continued and every TURN_S from there on.
    Short prompts are then read several times, and the median reading counts: what is over in a moment is at the mercy of that moment.
    A model in a process of its own would go on meanwhile, so that its whole round is one turn.
    Memory and `cpu_clock` are of the process that runs the model: this one, or the one that the session names.
    Before anything is timed the longest prompt is read once: it makes the context and touches every weight.
    """
    started = clock()
    with open_session() as session:
        load_ms = 1000 * (clock() - started)
        process = getattr(session, "process_id", os.getpid())
        ids = prompt(session, max(prompt_tokens))
        deque(islice(session.generate(ids, decode_tokens + 1, ()), 2), maxlen=0)
        wait = others if process == os.getpid() else None
        timings = tuple(_timing(session, ids[:n], decode_tokens, clock, partial(cpu_clock, process), wait) for n in prompt_tokens)
        return load_ms, timings, machine.peak_rss_bytes(process)


def measure_in_browser(session: BrowserSession, prompt_tokens: Sequence[int], decode_tokens: int) -> tuple[Timing, ...]:
    """A Timing per prompt length, by the browser's own clocks.

    The longest prompt is read and continued once before: V8 compiles what runs often a second time, and better, while it runs.
    """
    ids = prompt(session, max(prompt_tokens))
    with session.page.tree.watched():
        session.time(ids, decode_tokens)
    timed = tuple(session.time(ids[:n], decode_tokens) for n in prompt_tokens)
    session.page.tree.resident_bytes()
    return timed


def prompt(session: Session, n: int) -> list[int]:
    """The first n ids of our paragraph, said as often as it takes."""
    ids = session.tokenize(TEXT)
    return (ids * (n // len(ids) + 1))[:n]


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


def _timing(
    session: Session,
    ids: list[int],
    decode_tokens: int,
    clock: Callable[[], float],
    cpu_clock: Callable[[], float],
    others: Callable[[], None] | None,
) -> Timing:
    ttft_s: list[float] = []
    prefill_cpu_s: list[float] = []
    while not ttft_s or (others and len(ttft_s) < _READINGS and sum(ttft_s) < _READ_S):
        if others:
            others()
        started, cpu_started = clock(), cpu_clock()
        tokens = session.generate(ids, decode_tokens + 1, ())
        next(tokens)
        now, cpu = clock(), cpu_clock()
        ttft_s.append(now - started)
        prefill_cpu_s.append(cpu - cpu_started)
    decode_ms: list[float] = []
    turn_over, cpu_between = now, 0.0
    for _ in range(decode_tokens):
        if others and now >= turn_over:
            cpu_before = cpu_clock()
            others()
            cpu_between += cpu_clock() - cpu_before
            now = clock()
            turn_over = now + TURN_S
        next(tokens)
        before, now = now, clock()
        decode_ms.append(1000 * (now - before))
    decode_cpu_s = cpu_clock() - cpu - cpu_between
    return Timing(len(ids), 1000 * statistics.median(ttft_s), tuple(decode_ms), statistics.median(prefill_cpu_s), decode_cpu_s)
