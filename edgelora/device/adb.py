"""Android devices, through the system's `adb`. Which server it speaks to is adb's own affair (ANDROID_ADB_SERVER_PORT)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgelora.device import Done
from edgelora.device.shell import client, closed, last_line, opened
from edgelora.errors import DeviceError, DiskFull

_ASK_S = 60.0  # the first question starts adb's server
_COPY_S = 1800.0
_STATES = {  # what `adb devices` says of a device that cannot be used -> what to do
    "unauthorized": "unlock it and accept the question whether this computer may debug it",
    "offline": "unplug it and plug it in again, or try `adb reconnect offline`",
    "no": "this user may not open it: see the udev rules of your distribution (android-sdk-platform-tools-common)",
}


class Adb:
    """One device by its serial."""

    base = "/data/local/tmp"  # where adb's shell may write and run programs

    def __init__(self, serial: str, state: str = "device") -> None:
        self.name = f"adb:{serial}"
        self._serial, self._state = serial, state

    def run(self, command: str, limit_s: float) -> Done:
        if self._state != "device":
            raise DeviceError(f"{self.name} is {self._state}", _STATES.get(self._state, "see `adb devices`"))
        done = _adb(["-s", self._serial, "shell", closed(command)], limit_s, self.name)
        if (result := opened(done)) is None:
            raise self._away("while it ran a command", done.err or done.out)
        return result

    def push(self, sources: Sequence[Path], folder: str) -> None:
        done = _adb(["-s", self._serial, "push", *map(str, sources), f"{folder}/"], _COPY_S, self.name)
        self._copied(done, f"while {' and '.join(source.name for source in sources[:2])} {'was' if len(sources) == 1 else 'were'} pushed")

    def pull(self, source: str, target: Path) -> None:
        done = _adb(["-s", self._serial, "pull", source, str(target)], _COPY_S, self.name)
        self._copied(done, f"while {source.rpartition('/')[2]} was pulled")

    def _copied(self, done: Done, when: str) -> None:
        if done.code == 0:
            return
        said = _cause(done)
        if "No space left" in said:
            raise DiskFull(f"{self.name} is full: {said}", "free some space on it, or bench fewer files at once")
        attached = dict(_attached())
        if attached.get(self._serial) != "device":
            raise self._away(when, said)
        raise DeviceError(f"{self.name} failed {when}: {said}", "see `adb shell` whether the device still answers")

    def _away(self, when: str, said: str) -> DeviceError:
        return DeviceError(f"{self.name} went away {when}: {last_line(said) or 'adb said nothing'}", "check the cable, then bench again")


def find(which: str) -> Sequence[Adb]:
    """The device of that serial, or every attached one. DeviceError when there is none; one that is offline or locked says so when used."""
    attached = _attached()
    if not attached:
        raise DeviceError(
            "no device is attached over adb", "switch on USB debugging in its developer options, plug it in, and see `adb devices`"
        )
    if which and which not in dict(attached):
        raise DeviceError(f"no device {which!r} is attached over adb", f"attached: {', '.join(serial for serial, _ in attached)}")
    return [Adb(serial, state) for serial, state in attached if which in ("", serial)]


def _attached() -> list[tuple[str, str]]:
    """(serial, state) of every device that adb's server knows."""
    done = _adb(["devices"], _ASK_S, "adb")
    if done.code:
        raise DeviceError(f"adb does not work: {_cause(done)}", "try `adb kill-server`")
    rows = (line.split() for line in done.out.partition("List of devices attached")[2].splitlines())
    return [(row[0], row[1]) for row in rows if len(row) > 1]


def _cause(done: Done) -> str:
    """What adb says went wrong: statistics of what was copied may follow it."""
    lines = [line.strip() for text in (done.err, done.out) for line in text.splitlines()]
    return next((line for line in lines if line.startswith(("adb: error:", "error:"))), last_line(done.err, done.out))


def _adb(arguments: Sequence[str], limit_s: float, who: str) -> Done:
    return client(["adb", *arguments], limit_s, who, "adb")
