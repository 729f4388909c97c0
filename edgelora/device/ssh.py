"""A Raspberry Pi or any Linux box, through the system's `ssh` and `scp`: keys, ports and aliases come from the user's own ~/.ssh/config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgelora.device import Done
from edgelora.device.shell import client, closed, last_line, opened
from edgelora.errors import DeviceError, DiskFull, UsageError

_COPY_S = 1800.0
_PACKAGE = "openssh-client"
# Never a question that nobody answers; a line that is dead for 20 s is an error.
_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4")
_HOST = re.compile(r"(?:[\w.][\w.-]*@)?[\w.][\w.-]*")  # no spaces, and no dash in front, that ssh would take for an option
_UNREACHABLE = 255  # ssh's own exit code


class Ssh:
    """One host as ssh knows it: USER@HOST, or an alias of ~/.ssh/config."""

    base = "/var/tmp"  # on a disk: /tmp often lies in memory, where a model would take what it needs to run

    def __init__(self, host: str, port: str) -> None:
        self.name = f"ssh:{host}{':' if port else ''}{port}"
        self._host, self._port = host, port

    def run(self, command: str, limit_s: float) -> Done:
        port = ["-p", self._port] if self._port else []
        done = client(["ssh", "-T", *_OPTIONS, *port, "--", self._host, closed(command)], limit_s, self.name, _PACKAGE)
        if (result := opened(done)) is None:
            raise self._away(done)
        return result

    def push(self, sources: Sequence[Path], folder: str) -> None:
        when = f"while {' and '.join(source.name for source in sources[:2])} {'was' if len(sources) == 1 else 'were'} pushed"
        self._copy([str(source.absolute()) for source in sources], f"{self._host}:{folder}/", when)

    def pull(self, source: str, target: Path) -> None:
        self._copy([f"{self._host}:{source}"], str(target.absolute()), f"while {source.rpartition('/')[2]} was pulled")

    def _copy(self, sources: Sequence[str], target: str, when: str) -> None:
        port = ["-P", self._port] if self._port else []
        done = client(["scp", "-q", "-B", *_OPTIONS, *port, "--", *sources, target], _COPY_S, self.name, _PACKAGE)
        if done.code == 0:
            return
        said = last_line(done.err)
        if "No space left" in done.err or self._full(target):
            raise DiskFull(f"{self.name} is full: {said}", "free some space on it, or bench fewer files at once")
        raise DeviceError(f"{self.name} failed {when}: {said or 'scp said nothing'}", f"try `ssh {self._host} true` and scp by hand")

    def _full(self, target: str) -> bool:
        """scp's protocol (sftp) reports a full disk as nothing but 'Failure': whether the folder has room left tells."""
        host, _, path = target.partition(":")
        if host != self._host:
            return False
        try:
            done = self.run(f"df -k {path.rpartition('/')[0]} | tail -n 1", 30.0)
        except DeviceError:
            return False
        left = re.search(r"\s(\d+)\s+\d+%", done.out)
        return bool(left and int(left[1]) < 64)  # KiB

    def _away(self, done: Done) -> DeviceError:
        said = last_line(done.err) or "ssh said nothing"
        if "Permission denied" in said:
            return DeviceError(f"{self.name} lets nobody in: {said}", f"a key is needed, no password: ssh-copy-id {self._host}")
        if "Host key verification failed" in done.err:
            return DeviceError(f"{self.name} is not known to this computer: {said}", f"look at its key once: ssh {self._host} true")
        how = "cannot be reached" if done.code == _UNREACHABLE and not done.out else "went away while it ran a command"
        return DeviceError(f"{self.name} {how}: {said}", f"try `ssh {self._host} true` by hand")


def find(which: str) -> Sequence[Ssh]:
    """The host that `which` names, with a port if it ends in one. UsageError for what is no host."""
    host, colon, port = which.partition(":")
    if not _HOST.fullmatch(host) or (colon and not port.isdigit()):
        raise UsageError(
            f"--device ssh:{which} names no host", "for instance ssh:pi@raspberrypi.local, with a port ssh:pi@raspberrypi.local:2222"
        )
    return [Ssh(host, port)]
