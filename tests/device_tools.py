"""What tests of devices need from the system: the real adb client with a server of its own, a real sshd, and runners that are compiled here."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelora import environments
from edgelora.errors import ToolMissing

DRIVER = Path(__file__).with_name("llama_driver.c")
_SSHD = "/usr/sbin/sshd"


def need(package: str, *programs: str) -> None:
    """Skip unless the programs are here; `package` brings them."""
    if absent := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"{absent[0]} is absent: apt-get install -y {package}")


def own_runner(folder: Path) -> Path:
    """A folder with `llama-bench` for this machine and its libraries, links and all: the driver over llama-cpp-python's libllama."""
    need("gcc", "gcc")
    llama = pytest.importorskip("llama_cpp")
    libraries = Path(llama.__file__).parent / "lib"
    folder.mkdir()
    for pattern in ("libllama.so*", "libggml.so*", "libggml-base.so*", "libggml-cpu.so*"):
        for library in libraries.glob(pattern):
            shutil.copy2(library, folder / library.name, follow_symlinks=False)
    _compile("gcc", folder, "libllama.so", "libggml.so", "libggml-base.so")
    return folder


def packaged_libraries(processor: str) -> Path:
    """llama.cpp for arm64 or x64, built by others from one release; skips where it is not installed."""
    try:
        return environments.require("arm64") / f"node_modules/@node-llama-cpp/linux-{processor}/bins/linux-{processor}"
    except ToolMissing as error:
        pytest.skip(f"{error.message}: {error.hint}")


def packaged_runner(folder: Path, processor: str) -> Path:
    """The same over those libraries. One for arm64 is run by `qemu-aarch64-static -L /usr/aarch64-linux-gnu`."""
    if processor == "arm64":
        need("gcc-aarch64-linux-gnu", "aarch64-linux-gnu-gcc")
        need("qemu-user-static", "qemu-aarch64-static")
    libraries = packaged_libraries(processor)
    folder.mkdir()
    for library in libraries.glob("*.so"):
        if "libllama-common" not in library.name:
            shutil.copy2(library, folder)
    (llama,), (ggml,) = folder.glob("libllama.*so"), folder.glob("libggml.*so")
    _compile("aarch64-linux-gnu-gcc" if processor == "arm64" else "gcc", folder, llama.name, ggml.name, "libggml-base.so")
    return folder


def _compile(compiler: str, folder: Path, *libraries: str) -> None:
    linked = [f"-l:{name}" for name in libraries]
    command = [compiler, "-O1", str(DRIVER), "-o", str(folder / "llama-bench"), "-L", str(folder), *linked, "-Wl,--allow-shlib-undefined"]
    subprocess.run(command, check=True, capture_output=True)


def script(path: Path, text: str) -> Path:
    """A runner that is a script of the shell: it does what its text says."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@contextlib.contextmanager
def adb_server(folder: Path) -> Iterator[None]:
    """adb with a server and keys of its own: devices of whoever runs the tests are not touched."""
    need("adb", "adb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(_free_port()))
        patch.setenv("XDG_DATA_HOME", str(environments.folder("arm64").parents[1]))  # found as before, whatever HOME is
        patch.setenv("HOME", str(folder))
        try:
            yield
        finally:
            subprocess.run(["adb", "kill-server"], capture_output=True, timeout=60)


def connect(serial: str) -> None:
    """Attach a device; adb says when it failed, with exit code 0."""
    done = subprocess.run(["adb", "connect", serial], capture_output=True, text=True, timeout=60)
    assert "connected to" in done.stdout, done


class SshServer:
    """A real sshd on loopback, with keys made for it; faults are methods."""

    host = "127.0.0.1"

    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, _free_port()
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        kind, key, *_ = (folder / "host.pub").read_text().split()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")
        (folder / "remote").mkdir()
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nPidFile none\nSubsystem sftp internal-sftp\n"
            f"SetEnv PATH={folder}/remote:/usr/bin:/bin\n"
        )
        (folder / "ssh_config").write_text(
            f"Host *\n  Port {self.port}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
        )
        self.start()

    def start(self, largest_file: int = resource.RLIM_INFINITY) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))

        log = self._folder / "sshd.log"
        self._process = subprocess.Popen([_SSHD, "-D", "-E", str(log), "-f", str(self._folder / "sshd_config")], preexec_fn=limit)
        for _ in range(100):
            if self._process.poll() is not None:
                pytest.skip(f"sshd does not run here: {log.read_text().strip()}")
            with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 1):
                return
            time.sleep(0.1)
        pytest.fail("sshd did not listen")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def cut_connections(self) -> None:
        """End the processes that serve a connection; the server itself goes on."""
        for pid in _children(self._process.pid):
            os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def largest_file(self, n_bytes: int) -> Iterator[None]:
        """Whoever writes a larger file is ended by the kernel: a push breaks off in the middle."""
        self.stop()
        self.start(n_bytes)
        yield
        self.stop()
        self.start()

    @contextlib.contextmanager
    def room(self, free_kib: int) -> Iterator[None]:
        """What `df` says there."""
        header = "Filesystem 1K-blocks Used Available Use% Mounted on"
        shown = script(self._folder / "remote" / "df", f"echo '{header}'\necho '/dev/root 9000000 1 {free_kib} 99% /'")
        yield
        shown.unlink()


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[SshServer]:
    """An sshd, and `ssh` and `scp` first in PATH that know it. Nothing of the system's or the user's own configuration is read or written."""
    need("openssh-server", _SSHD)
    need("openssh-client", "ssh", "scp", "ssh-keygen")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself in when root starts it
    server = SshServer(folder)
    (folder / "bin").mkdir()
    for name in ("ssh", "scp"):
        script(folder / "bin" / name, f'exec {shutil.which(name)} -F {folder}/ssh_config "$@"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}/bin{os.pathsep}{os.environ['PATH']}")
        try:
            yield server
        finally:
            server.stop()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
