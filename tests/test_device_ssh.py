"""Benches over SSH: a real sshd on loopback, the system's ssh and scp, real runners, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelora import machine, report
from edgelora.device import ssh
from edgelora.errors import DeviceError, DiskFull, Unsupported
from edgelora.export import gguf
from tests.device_tools import own_runner, script, ssh_server
from tests.test_device_adb import SHORT, bench, failing, gone
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ssh")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Any]:
    with ssh_server(folder) as running:
        yield running


@pytest.fixture
def box(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server, with a folder of its own for what is pushed."""
    base = tmp_path / "base"
    base.mkdir()
    monkeypatch.setattr(ssh.Ssh, "base", str(base))
    yield server
    assert left_over() == []


def left_over() -> list[str]:
    return [path.name for path in Path(ssh.Ssh.base).iterdir()]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("secret-place")
    return gguf.write(tiny_model("llama", root / "hf"), "q8_0", root, "tiny", lambda share, text: None)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_runner(tmp_path_factory.mktemp("runner") / "bin")


def test_push_run_parse_pull(box: Any, file: Path, runner: Path, tmp_path: Path) -> None:
    done = bench(file, "--device", f"ssh:{box.host}", "--runner", runner, *SHORT, "-o", tmp_path / "page", "--json")
    found = json.loads(done.stdout)
    assert [row["prompt_tokens"] for row in found["bench"]] == [4, 8]
    for row in found["bench"]:
        assert row["device_class"] == f"{'x86' if platform.machine() == 'x86_64' else 'arm64'}-{os.cpu_count()}core"
        assert row["decode_tok_per_s"] > 0
        assert row["peak_rss_bytes"] > row["size_bytes"]
        assert "emulated" not in row
    (about,) = found["devices"]
    assert (about["os"], about["cpu_features"]) == (machine.describe()["os"], machine.cpu_features())
    assert "machine" not in found  # nothing was measured on this one
    document = report.read(tmp_path / "page")
    assert document["commands"][0].endswith("--device ssh:USER@HOST --runner bin")
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "Speed on other devices" in page
    assert not [secret for secret in (box.host, "secret-place", str(tmp_path), platform.node()) if secret in page + json.dumps(document)]


def test_threads_are_swept(box: Any, file: Path, tmp_path: Path) -> None:
    """Without --threads: 1, 2, 4, ... and all cores. The runner is a script that says what it was asked for."""
    says = """
while [ $# -gt 0 ]; do case $1 in -t) t=$2;; -r) r=$2;; esac; shift; done
s=1000000; while [ "$r" -gt 1 ]; do s="$s, 1000000"; r=$((r - 1)); done
test() { echo "{\\"n_threads\\": $t, \\"n_prompt\\": $1, \\"n_gen\\": $2, \\"n_depth\\": $3, \\"samples_ns\\": [$s]}"; }
echo "[$(test 4 0 0), $(test 0 32 4)]"
"""
    short = ("--prompt-tokens", 4, "--repeats", 3, "--json")
    done = bench(file, "--device", f"ssh:{box.host}", "--runner", script(tmp_path / "llama-bench", says), *short)
    rows = json.loads(done.stdout)["bench"]
    cores = os.cpu_count() or 1
    assert [row["threads"] for row in rows] == [*(n for n in (1, 2, 4, 8, 16, 32, 64) if n < cores), cores]
    assert {(row["ttft_ms"], row["decode_tok_per_s"]) for row in rows} == {(1.0, 32 / 0.001)}


def test_a_line_that_breaks_in_mid_run(box: Any, file: Path, runner: Path, tmp_path: Path) -> None:
    hanging = script(tmp_path / "llama-bench", "exec sleep 300")
    found = list[int]()

    def cut() -> None:
        for _ in range(300):
            if pids := list(Path(ssh.Ssh.base).glob("*/pid")):
                time.sleep(0.3)
                found.append(int(pids[0].read_text()))
                box.cut_connections()
                return
            time.sleep(0.1)

    threading.Thread(target=cut, daemon=True).start()
    error = failing(DeviceError, file, "--device", f"ssh:{box.host}", "--runner", hanging, *SHORT)
    assert f"ssh:{box.host} went away while it ran a command" in error.message
    assert left_over() == []  # the server still answered: what was running is ended, and its folder gone
    assert gone(found[0])


def test_a_push_that_is_cut_off(box: Any, file: Path, runner: Path) -> None:
    with box.largest_file(50_000):
        error = failing(DeviceError, file, "--device", f"ssh:{box.host}", "--runner", runner, *SHORT)
    assert f"ssh:{box.host} failed while {file.name} was pushed" in error.message


def test_a_full_disk(box: Any, file: Path, runner: Path) -> None:
    with box.room(12_000):
        error = failing(DiskFull, file, "--device", f"ssh:{box.host}", "--runner", runner, *SHORT)
    assert error.message.startswith(f"ssh:{box.host} has 12 MB free, ")


def test_a_disk_that_becomes_full(box: Any, file: Path, runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of 64 KiB, whose df is not believed in time."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ssh.Ssh, "base", str(small))
            patch.setattr("edgelora.device.place._SPARE", -(1 << 40))
            error = failing(DiskFull, file, "--device", f"ssh:{box.host}", "--runner", runner, *SHORT)
            assert error.message.startswith(f"ssh:{box.host} is full: ")
            assert left_over() == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_runner_for_another_processor(box: Any, file: Path, runner: Path, tmp_path: Path) -> None:
    program = bytearray((runner / "llama-bench").read_bytes())
    program[18:20] = (8).to_bytes(2, "little")  # MIPS
    (tmp_path / "llama-bench").write_bytes(program)
    error = failing(Unsupported, file, "--device", f"ssh:{box.host}", "--runner", tmp_path / "llama-bench", *SHORT)
    assert error.message.startswith(f"llama-bench is built for machine 8, ssh:{box.host} runs ")


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("kill -SEGV $$", "llama-bench died of signal 11 on ssh:"),
        ("echo error: no such model >&2; exit 255", "with tiny-q8_0.gguf: error: no such model"),  # 255 is also what ssh ends with
        ("echo '[1, 2'", "printed no figures of tiny-q8_0.gguf: no JSON: '[1, 2'"),
    ],
)
def test_a_runner_that_fails(box: Any, file: Path, tmp_path: Path, does: str, message: str) -> None:
    error = failing(DeviceError, file, "--device", f"ssh:{box.host}", "--runner", script(tmp_path / "llama-bench", does), *SHORT)
    assert message in error.message


def test_two_boxes_in_a_row(box: Any, file: Path, runner: Path) -> None:
    """The same one under two names: each is measured, and told apart."""
    names = ("--device", f"ssh:{box.host}", "--device", f"ssh:{box.host}:{box.port}")
    rows = json.loads(bench(file, *names, "--runner", runner, *SHORT, "--json").stdout)["bench"]
    assert [row["device"].partition(" #")[2] for row in rows] == ["", "", "2", "2"]


def test_a_box_that_is_not_there(box: Any, file: Path, runner: Path) -> None:
    error = failing(DeviceError, file, "--device", f"ssh:{box.host}:1", "--runner", runner, *SHORT)
    assert error.message.startswith(f"ssh:{box.host}:1 cannot be reached: ssh: connect to host 127.0.0.1 port 1: Connection refused")


def test_a_box_that_lets_nobody_in(box: Any, folder: Path, file: Path, runner: Path) -> None:
    keys = folder / "authorized_keys"
    allowed = keys.read_text()
    keys.write_text("")
    try:
        error = failing(DeviceError, file, "--device", f"ssh:{box.host}", "--runner", runner, *SHORT)
    finally:
        keys.write_text(allowed)
    assert f"ssh:{box.host} lets nobody in: " in error.message
    assert error.hint == f"a key is needed, no password: ssh-copy-id {box.host}"


def test_a_box_that_is_not_known(box: Any, folder: Path, file: Path, runner: Path) -> None:
    """Its key was never seen: nobody is there to say yes, and nothing is sent."""
    known = folder / "known_hosts"
    keys = known.read_text()
    known.write_text("")
    try:
        error = failing(DeviceError, file, "--device", f"ssh:{box.host}", "--runner", runner, *SHORT)
    finally:
        known.write_text(keys)
    assert f"ssh:{box.host} is not known to this computer" in error.message
