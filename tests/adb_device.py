"""The device end of adb's protocol on loopback, for tests: the real `adb` client pushes, runs and pulls, and nothing on this side is a phone.

It speaks what a bench uses: CNXN, OPEN, OKAY, WRTE and CLSE; the services shell and shell,v2; and sync's STAT, STA2, SEND and
RECV. Its /data/local/tmp is a folder here, and programs for arm64 run through qemu-user, as a kernel with
binfmt_misc would run them. Where mksh and toybox are installed its shell and its commands are those, as Android's are.
It can be unplugged at a chosen moment, and it can be full.

The protocol is described in packages/modules/adb of the Android Open Source Project: protocol.txt and SYNC.TXT.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import shutil
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path

BASE = "/data/local/tmp"
_VERSION, _MAX_DATA = 0x01000001, 256 << 10
_NO_SPACE = b"couldn't write: No space left on device"
# arm64 is machine 0xb7 in an ELF file's header; what it is dynamically linked with lies where Debian's cross compiler put it.
_RUN = """#!/bin/sh
[ "$(od -An -tx1 -j18 -N1 "$1" 2>/dev/null | tr -d ' ')" = b7 ] && exec qemu-aarch64-static -L /usr/aarch64-linux-gnu "$@"
exec "$@"
"""


class AdbDevice:
    """A device that listens on loopback. `properties` are what its getprop prints; faults are set on the object while it runs."""

    def __init__(self, folder: Path, properties: Mapping[str, str], features: str = "shell_v2,cmd,stat_v2") -> None:
        self.root, self._tools, self._features = folder / "tmp", folder / "tools", features
        self.cut_after_bytes: int | None = None  # of files that are pushed: then the cable is pulled
        self.cut_when: str | None = None  # the cable is pulled half a second after a command with these words was started
        self.full_after_bytes: int | None = None
        self.flip_a_bit_of: str | None = None  # a file of that name
        self._pushed, self._children, self._links = 0, list[subprocess.Popen[bytes]](), list[socket.socket]()
        self.root.mkdir(parents=True)
        self._tools.mkdir()
        if (shell := shutil.which("mksh")) and (toybox := shutil.which("toybox")):
            (self._tools / "sh").symlink_to(shell)
            for name in subprocess.run([toybox], capture_output=True, text=True).stdout.split():
                (self._tools / name).symlink_to(toybox)
        self._tool("run", _RUN)
        self._tool("getprop", "#!/bin/sh\ncat <<'END'\n" + "".join(f"[{k}]: [{v}]\n" for k, v in properties.items()) + "END\n")
        self._tool("dumpsys", "#!/bin/sh\necho Thermal Status: 0\n")
        self._port = 0
        self.plug_in()

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self._port}"

    def plug_in(self) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._listener.listen()
        self.cut_after_bytes = self.cut_when = None
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def unplug(self) -> None:
        """The cable is out: nothing is said any more, and what runs on the device goes on."""
        for link in [self._listener, *self._links]:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        self._links.clear()

    def close(self) -> None:
        self.unplug()
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
            child.wait()

    def has_room(self, free_kib: int) -> None:
        """What `df` says from now on."""
        self._tool(
            "df", f"#!/bin/sh\necho 'Filesystem 1K-blocks Used Available Use% Mounted on'\necho 'dm-1 9000000 1 {free_kib} 99% /data'\n"
        )

    def path(self, name: str) -> Path:
        """A path on the device -> here."""
        return Path(name.replace(BASE, str(self.root), 1))

    def received(self, n_bytes: int) -> bool:
        """Count bytes of pushed files; whether there is room for them."""
        self._pushed += n_bytes
        if self.cut_after_bytes is not None and self._pushed > self.cut_after_bytes:
            self.unplug()
            raise EOFError
        return self.full_after_bytes is None or self._pushed <= self.full_after_bytes

    def shell(self, command: str, merged: bool) -> subprocess.Popen[bytes]:
        # `exec ./program` is what binfmt_misc would catch in a kernel
        here = command.replace(BASE, str(self.root)).replace("exec ./", f"exec {shlex.quote(str(self._tools / 'run'))} ./")
        child = subprocess.Popen(
            [str(own) if (own := self._tools / "sh").exists() else "/bin/sh", "-c", here],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merged else subprocess.PIPE,
            cwd=self.root,
            env={**os.environ, "PATH": f"{self._tools}:{os.environ['PATH']}"},
            start_new_session=True,
        )
        self._children.append(child)
        if self.cut_when is not None and self.cut_when in command:
            threading.Timer(0.5, self.unplug).start()
        return child

    def said(self, text: bytes) -> bytes:
        return text.replace(str(self.root).encode(), BASE.encode())

    def greeting(self) -> bytes:
        return f"device::ro.product.name=test;ro.product.model=Test;ro.product.device=test;features={self._features}".encode()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                self._links.append(link)
                threading.Thread(target=_Link(self, link).serve, daemon=True).start()

    def _tool(self, name: str, text: str) -> None:
        path = self._tools / name
        path.unlink(missing_ok=True)  # never through a link to a program of the system
        path.write_text(text)
        path.chmod(0o755)


class _Link:
    """One connection: packets of 24 bytes (command, two ids, length, checksum, magic) and data, shared by its streams."""

    def __init__(self, device: AdbDevice, link: socket.socket) -> None:
        self.device, self._link, self._lock, self._streams = device, link, threading.Lock(), dict[int, _Stream]()

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        (word,) = struct.unpack("<I", command)
        with self._lock:
            self._link.sendall(struct.pack("<4s5I", command, first, second, len(data), 0, word ^ 0xFFFFFFFF) + data)

    def serve(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                command, theirs, ours, length, _, _ = struct.unpack("<4s5I", self._exactly(24))
                data = self._exactly(length)
                if command == b"CNXN":
                    self.send(b"CNXN", _VERSION, _MAX_DATA, self.device.greeting())
                elif command == b"OPEN":
                    number = len(self._streams) + 1
                    self._streams[number] = _Stream(self, number, theirs, data.rstrip(b"\0").decode())
                elif command == b"WRTE" and ours in self._streams:
                    self._streams[ours].incoming.put(data)
                    self.send(b"OKAY", ours, theirs)
                elif command == b"OKAY" and ours in self._streams:
                    self._streams[ours].ready.release()
                elif command == b"CLSE" and ours in self._streams:
                    self._streams[ours].end()
        for stream in self._streams.values():
            stream.end()

    def _exactly(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            if not (more := self._link.recv(n - len(data))):
                raise EOFError
            data += more
        return data


class _Stream:
    """One service that the client opened. After each WRTE of ours its OKAY is waited for."""

    def __init__(self, link: _Link, ours: int, theirs: int, service: str) -> None:
        self._link, self._ours, self._theirs = link, ours, theirs
        self.incoming, self.ready, self._rest, self._open = queue.Queue[bytes](), threading.Semaphore(0), b"", True
        threading.Thread(target=self._serve, args=(service,), daemon=True).start()

    def end(self) -> None:
        self._open = False
        self.incoming.put(b"")
        self.ready.release()

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), _MAX_DATA):
            if not self._open:
                raise EOFError
            self._link.send(b"WRTE", self._ours, self._theirs, data[start : start + _MAX_DATA])
            self.ready.acquire()

    def exactly(self, n: int) -> bytes:
        while len(self._rest) < n:
            if not (more := self.incoming.get()):
                raise EOFError
            self._rest += more
        data, self._rest = self._rest[:n], self._rest[n:]
        return data

    def _serve(self, service: str) -> None:
        with contextlib.suppress(EOFError, OSError):
            if match := re.fullmatch(r"shell(,[^:]*)?:(.*)", service, re.S):
                self._link.send(b"OKAY", self._ours, self._theirs)
                _shell(self, self._link.device, match[2], framed=",v2" in (match[1] or ""))
            elif service == "sync:":
                self._link.send(b"OKAY", self._ours, self._theirs)
                _sync(self, self._link.device)
            self._link.send(b"CLSE", self._ours, self._theirs)


def _shell(stream: _Stream, device: AdbDevice, command: str, framed: bool) -> None:
    """Run a command; of shell,v2 every piece is framed by what it is: 1 stdout, 2 stderr, 3 the exit code."""
    child = device.shell(command, merged=not framed)

    def frame(kind: int, data: bytes) -> bytes:
        return struct.pack("<BI", kind, len(data)) + data if framed else data

    def pump(kind: int, pipe: object) -> None:
        with contextlib.suppress(EOFError, OSError):
            for line in pipe:  # type: ignore[attr-defined]
                stream.write(frame(kind, device.said(line)))

    pumps = [threading.Thread(target=pump, args=item, daemon=True) for item in ((1, child.stdout), (2, child.stderr)) if item[1]]
    for one in pumps:
        one.start()
    for one in pumps:
        one.join()
    code = child.wait()
    if framed:
        stream.write(frame(3, bytes([code if code >= 0 else 128 - code])))


def _sync(stream: _Stream, device: AdbDevice) -> None:
    """Requests of 8 bytes (name, length or number) and what they speak of, until QUIT."""
    while True:
        name, length = struct.unpack("<4sI", stream.exactly(8))
        if name == b"QUIT":
            return
        argument = stream.exactly(length).decode()
        if name in (b"STAT", b"STA2", b"LST2"):
            stream.write(_stat(name, device.path(argument)))
        elif name == b"SEND":
            path, _, mode = argument.rpartition(",")
            _receive(stream, device, device.path(path), int(mode))
        elif name == b"RECV":
            _send(stream, device.path(argument))
        else:
            stream.write(_failure(f"unknown request {name!r}".encode()))


def _stat(name: bytes, path: Path) -> bytes:
    try:
        found = path.stat()
    except OSError as error:
        return struct.pack("<4s3I", name, 0, 0, 0) if name == b"STAT" else struct.pack("<4sI64x", name, error.errno or 5)
    if name == b"STAT":
        return struct.pack("<4s3I", name, found.st_mode, found.st_size, int(found.st_mtime))
    inode, times = (found.st_dev, found.st_ino), (int(found.st_atime), int(found.st_mtime), int(found.st_ctime))
    return struct.pack("<4sI2Q4IQ3q", name, 0, *inode, found.st_mode, found.st_nlink, 0, 0, found.st_size, *times)


def _receive(stream: _Stream, device: AdbDevice, path: Path, mode: int) -> None:
    room = True
    with path.open("wb") as file:
        while (head := struct.unpack("<4sI", stream.exactly(8)))[0] == b"DATA":
            data = stream.exactly(head[1])
            room = device.received(len(data)) and room
            file.write(data if room else b"")
    if path.name == device.flip_a_bit_of:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    path.chmod(stat.S_IMODE(mode) | 0o600)
    os.utime(path, (time.time(), head[1]))
    stream.write(struct.pack("<4sI", b"OKAY", 0) if room else _failure(_NO_SPACE))


def _send(stream: _Stream, path: Path) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        stream.write(_failure(str(error.strerror).encode()))
        return
    for start in range(0, len(data), 64 << 10):
        piece = data[start : start + (64 << 10)]
        stream.write(struct.pack("<4sI", b"DATA", len(piece)) + piece)
    stream.write(struct.pack("<4sI", b"DONE", 0))


def _failure(words: bytes) -> bytes:
    return struct.pack("<4sI", b"FAIL", len(words)) + words
