"""Our folder on a device: made for one bench, and removed with whatever still runs in it, however the bench ends.

Its name holds this computer's tag and our process, so that the next bench knows a folder whose bench was killed, or whose
cable was pulled, and removes it first. Folders of other computers, and of benches that still run, are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from edgelora.artifact import sha256
from edgelora.device import Done, Transport
from edgelora.device.shell import last_line
from edgelora.errors import DeviceError, DiskFull, EdgeloraError

_ASK_S, _SUM_S = 60.0, 600.0
_SPARE = 16 << 20  # bytes that stay free: the runner's output, and what the system needs meanwhile
_MOST_TEXT = 8 << 20  # of a runner's output
# Ends what was started in the folder $1, if it is still that program, and removes the folder.
_REMOVE = 'd=$1; p=$(cat "$d/pid" 2>/dev/null); [ -n "$p" ] && [ "$(readlink "/proc/$p/cwd")" = "$(cd "$d" && pwd -P)" ] && kill -9 "$p"; rm -rf "$d"'


@dataclass(frozen=True)
class Ran:
    """What a runner printed to stdout, to stderr where it failed or said nothing else, and the most memory it had resident, in bytes, where that was watched."""

    out: str
    err: str
    peak_rss_bytes: int | None = None


class Place:
    """Use it as a context: the folder is there inside and gone afterwards."""

    def __init__(self, device: Transport) -> None:
        self._device = device
        self._tag = f"edgelora-{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}"
        self.folder = f"{device.base}/{self._tag}-{os.getpid()}"

    def __enter__(self) -> Self:
        self._sweep()
        made = self.ask(f"mkdir -p {self.folder} && chmod 700 {self.folder}")
        if made.code:
            raise DeviceError(f"{self._device.name}: no folder can be made in {self._device.base}: {made.err.strip()}", "is it writable?")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._remove(self.folder)
        except EdgeloraError as away:
            if error is None:
                raise
            if isinstance(error, EdgeloraError):
                error.hint = f"{error.hint}; {self.folder} stays on the device until the next bench removes it"
            else:
                error.add_note(f"{self.folder} stays on {self._device.name}: {away.message}")

    def ask(self, command: str) -> Done:
        """A short command on the device."""
        return self._device.run(command, _ASK_S)

    def prepare(self, folders: Sequence[str], n_bytes: int) -> None:
        """Folders inside ours; DiskFull when the device has less free space than that. One that does not tell is believed to have it."""
        asked = self.ask(f"cd {self.folder} && mkdir -p {shlex.join(folders)} && df -k {self._device.base}")
        found = re.search(r"\s(\d+)\s+\d+%", asked.out)
        if found and int(found[1]) * 1024 < n_bytes + _SPARE:
            raise DiskFull(
                f"{self._device.name} has {int(found[1]) * 1024 / 1e6:,.0f} MB free, {(n_bytes + _SPARE) / 1e6:,.0f} MB are needed",
                "free some space on it, or bench fewer files at once",
            )

    def push(self, sources: Sequence[Path], folder: str, links: Mapping[str, str] = MappingProxyType({})) -> None:
        """Send files into one of the folders, and symbolic links (name -> what it points to); programs may be run there.

        Checksums are compared on the device: DeviceError when a file did not arrive as it is.
        """
        self._device.push(sources, f"{self.folder}/{folder}")
        steps = [f"cd {self.folder}/{folder}", shlex.join(["sha256sum", "--", *(source.name for source in sources)])]
        steps += [
            shlex.join(["chmod", "700", "--", *(source.name for source in sources)]),
            *(shlex.join(["ln", "-sf", links[n], n]) for n in links),
        ]
        asked = self._device.run(" && ".join(steps), _SUM_S)
        there = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})\s+\*?(.+)$", asked.out, re.M)}
        if asked.code or len(there) < len(sources):
            raise DeviceError(
                f"{self._device.name} cannot check what arrived: {last_line(asked.err) or 'it said nothing'}", "its system needs sha256sum"
            )
        if damaged := [source.name for source in sources if there.get(source.name) != sha256(source)]:
            raise DeviceError(f"{damaged[0]} arrived damaged on {self._device.name}", "check cable and storage, then bench again")

    def start(self, program: str, arguments: Sequence[str], limit_s: float, watch_memory: bool = False) -> tuple[int, Ran]:
        """Run a program of the folder to its end: its exit code, and what it printed, which is pulled as files.

        Its libraries are looked for beside it first. DeviceError when it took longer than the limit or the device went away.
        """
        beside = f"{self.folder}/{program}".rpartition("/")[0]
        words = shlex.join([f"./{program}", *arguments])
        script = f"echo $$ > pid; export LD_LIBRARY_PATH={beside}:$LD_LIBRARY_PATH; exec {words} > out 2> err < /dev/null"
        run = f"sh -c {shlex.quote(script)}"
        if watch_memory:  # VmHWM only grows: its last reading is the peak
            run = f"{run} & p=$!; while grep VmHWM /proc/$p/status; do sleep 0.2; done 2>/dev/null; wait $p"
        done = self._device.run(f"cd {self.folder} && {{ {run}; }}; code=$?; rm -f pid; exit $code", limit_s)
        peaks = [int(kib) * 1024 for kib in re.findall(r"^VmHWM:\s+(\d+) kB", done.out, re.M)]
        out = self._pulled("out")
        return done.code, Ran(out, self._pulled("err") if done.code or not out.strip() else "", max(peaks, default=None))

    def _pulled(self, name: str) -> str:
        with tempfile.TemporaryDirectory() as here:
            target = Path(here) / name
            self._device.pull(f"{self.folder}/{name}", target)
            with target.open("rb") as stream:
                return stream.read(_MOST_TEXT).decode("utf-8", "replace")

    def _sweep(self) -> None:
        """Remove what earlier benches of this computer left when they were killed or cut off."""
        listed = self.ask(f'for d in {self._device.base}/{self._tag}-*; do [ -d "$d" ] && echo "$d"; done; true')
        for folder in listed.out.split():
            pid = folder.rpartition("-")[2]
            if folder.startswith(f"{self._device.base}/{self._tag}-") and pid.isdigit() and not _alive(int(pid)):
                self._remove(folder)

    def _remove(self, folder: str) -> None:
        self.ask(f"sh -c {shlex.quote(_REMOVE)} remove {shlex.quote(folder)}")


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a folder of that name is older than this bench
    with contextlib.suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True
