"""What both transports share: how their client programs are started, and commands wrapped so that their end is no broken connection's."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence

from edgelora.device import Done
from edgelora.errors import DeviceError, ToolMissing

_END = "edgelora-ended-with"


def closed(command: str) -> str:
    """A command whose last line of output is its exit code: adb and ssh end with codes of their own when the connection breaks.

    It is run by `sh`, whatever shell the user chose for the device.
    """
    told = f"sh -c {shlex.quote(command)}; code=$?; echo; echo {_END} $code"
    return f"sh -c {shlex.quote(told)}"


def opened(done: Done) -> Done | None:
    """The command's own result, out of what the client of the connection printed; None when it never came to its end."""
    text, found, code = done.out.replace("\r\n", "\n").rpartition(f"\n{_END} ")
    if not found or not code.strip().isdigit():
        return None
    return Done(int(code), text, done.err.replace("\r\n", "\n"))


def client(command: Sequence[str], limit_s: float, who: str, package: str) -> Done:
    """Run a transport's own program. ToolMissing when it is absent; DeviceError when it was not done within the limit."""
    if shutil.which(command[0]) is None:
        raise ToolMissing(f"{command[0]} is not installed", f"apt-get install -y {package}")
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(
            f"{who} did not answer within {limit_s:.0f} s", "look at the device: does it hang, or is the line too slow?"
        ) from error
    except OSError as error:
        raise ToolMissing(f"{command[0]} cannot be run: {error.strerror}", f"apt-get install --reinstall -y {package}") from error
    return Done(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def last_line(*texts: str) -> str:
    """The last line of the first text that has one."""
    return next((line.strip() for text in texts for line in reversed(text.splitlines()) if line.strip()), "")
