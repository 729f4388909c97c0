"""Which cores a repeat runs on, where files take turns: the same for all files, and others in the next repeat.

Left to the kernel, a process that measures stays on the core it began on, and what another guest or program does to that core looks like
a property of the file: one file was 3 % faster than its copy in 17 of 18 benches. See `bench/NOTES.md`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_ALIKE = 0.9  # cores of one kind have clocks this near each other: the best ones of a chip are let run a little faster


def places(threads: int) -> list[tuple[int, ...]]:
    """Sets of `threads` cores, one for each repeat until they begin anew; empty where there is no choice or the system gives none.

    A choice that the kernel would make too: one thread of a core, and the fastest kind of cores alone.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    return choices(_CPUS, sorted(os.sched_getaffinity(0)), threads)


def choices(root: Path, allowed: Sequence[int], threads: int) -> list[tuple[int, ...]]:
    """The same of the processors that `root` (/sys/devices/system/cpu) describes."""
    first = {_number(root / f"cpu{cpu}/topology/thread_siblings_list", cpu): cpu for cpu in reversed(allowed)}  # of every core
    speed = {cpu: _speed(root / f"cpu{cpu}") for cpu in sorted(first.values())}
    fast = [cpu for cpu in speed if speed[cpu] >= _ALIKE * max(speed.values())]
    if threads >= len(fast):
        return []
    return [tuple(fast[(start + i) % len(fast)] for i in range(threads)) for start in range(len(fast))]


def stay_on(cores: Sequence[int]) -> None:
    """Keep this process, and what it starts from here on, on these cores."""
    for task in os.listdir("/proc/self/task"):  # a library's threads outlive a session
        with contextlib.suppress(ProcessLookupError):  # it may end meanwhile
            os.sched_setaffinity(int(task), cores)


def _speed(cpu: Path) -> int:
    """Of this core beside the others: arm64 and hybrid x86 tell a capacity, others a clock, virtual machines nothing."""
    return next((n for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq") if (n := _number(cpu / name, 0))), 0)


def _number(path: Path, default: int) -> int:
    """The first number in a file."""
    try:
        match = re.match(r"\d+", path.read_text(encoding="ascii"))
    except OSError:
        return default
    return int(match[0]) if match else default
