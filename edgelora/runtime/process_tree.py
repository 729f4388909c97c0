"""A program and all that it started, as one: what a browser's processes hold in memory and have computed (proc(5))."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_EVERY_S = 0.1


class ProcessTree:
    """The descendants of process `root`, itself left out. `peak_bytes` is the most memory that was seen while `watched`."""

    def __init__(self, root: int) -> None:
        self._root = root
        self.peak_bytes = 0

    def pids(self) -> list[int]:
        """Children and their children, those that live now."""
        children: dict[int, list[int]] = {}
        for folder in _PROC.iterdir():
            if folder.name.isdigit() and (fields := _stat(int(folder.name))):
                children.setdefault(int(fields[1]), []).append(int(folder.name))
        found, left = [], [self._root]
        while left:
            left += (own := children.get(left.pop(), []))
            found += own
        return found

    def cpu_s(self) -> float:
        """Processor time of all of them and of those that ended, seconds; the kernel counts in hundredths."""
        ticks = sum(sum(map(int, fields[11:15])) for pid in self.pids() if (fields := _stat(pid)))  # utime stime cutime cstime
        return ticks / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Memory that is resident for them; a page that several share is counted once (proportional set size)."""
        found = 0
        for pid in self.pids():
            if match := re.search(r"^Pss:\s+(\d+) kB", _read(_PROC / str(pid) / "smaps_rollup"), re.M):
                found += int(match[1]) * 1024
        self.peak_bytes = max(self.peak_bytes, found)
        return found

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look at the memory again and again while the block runs. Looking disturbs: never around what is timed."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(_EVERY_S):
                self.resident_bytes()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.resident_bytes()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the program's name, which may hold anything: state, parent, ..."""
    return _read(_PROC / str(pid) / "stat").rpartition(")")[2].split()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # it ended meanwhile
        return ""
