"""Benches over adb: the real client against a device end of the protocol, with real runners, and every way in which a phone lets one down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgelora import report
from edgelora.cli import cli
from edgelora.errors import DeviceError, DiskFull, EdgeloraError, Unsupported, UsageError
from edgelora.export import gguf
from edgelora.report.schema import MEASURED
from tests.adb_device import AdbDevice
from tests.device_tools import adb_server, connect, own_runner, packaged_runner, script
from tests.line import ROOT
from tests.tiny_models import tiny_model

HERE = {"ro.product.manufacturer": "Acme", "ro.product.model": "One", "ro.build.version.release": "14", "ro.build.version.sdk": "34"}
SAME = {**HERE, "ro.product.cpu.abilist": "x86_64,arm64-v8a" if os.uname().machine == "x86_64" else "arm64-v8a"}  # this very processor
ARM = {**HERE, "ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a"}
SHORT = ("--threads", 1, "--prompt-tokens", "4,8", "--repeats", 3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with adb_server(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two exports of one tiny model."""
    root = tmp_path_factory.mktemp("secret-place")
    model = tiny_model("llama", root / "hf")
    eight, four = (gguf.write(model, kind, root, "tiny", lambda share, text: None) for kind in ("q8_0", "q4_0"))
    return eight, four


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_runner(tmp_path_factory.mktemp("runner") / "bin")


@pytest.fixture
def phone(server: None, tmp_path: Path) -> Iterator[AdbDevice]:
    yield from attached(tmp_path / "phone", SAME)


def attached(folder: Path, properties: dict[str, str], features: str = "shell_v2,cmd,stat_v2") -> Iterator[AdbDevice]:
    device = AdbDevice(folder, properties, features)
    try:
        connect(device.serial)
        yield device
    finally:
        device.close()
        subprocess.run(["adb", "disconnect", device.serial], capture_output=True, timeout=60)


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)


def failing(kind: type[EdgeloraError], *arguments: object) -> EdgeloraError:
    with pytest.raises(kind) as caught:
        bench(*arguments)
    assert caught.value.hint
    return caught.value


def left_over(device: AdbDevice) -> list[str]:
    return [path.name for path in device.root.iterdir()]


def test_push_run_parse_pull(phone: AdbDevice, files: tuple[Path, Path], runner: Path, tmp_path: Path) -> None:
    """Two files on a phone and on this machine, in one report."""
    done = bench(*files, "--device", "here", "--device", "adb", "--runner", runner, *SHORT, "-o", tmp_path / "page", "--json")
    found = json.loads(done.stdout)
    there = [row for row in found["bench"] if row.get("device")]
    assert [(row["file"], row["prompt_tokens"]) for row in there] == [(path.name, n) for path in files for n in (4, 8)]
    assert len(found["bench"]) == 2 * len(there)
    for row in there:
        assert (row["runtime"], row["device"], row["device_class"]) == ("llama-bench", "Acme One", "acme-one")
        assert [len(row["samples_ms"][key]) for key in ("ttft", "decode")] == [3, 3]
        assert row["decode_tok_per_s"] > 0
        assert row["prefill_tok_per_s"] == pytest.approx(1000 * row["prompt_tokens"] / row["ttft_ms"])
        assert row["peak_rss_bytes"] > row["size_bytes"]
        assert "emulated" not in row
    (about,) = found["devices"]
    assert (about["os"], about["before"]["thermal_status"], about["after"]["thermal_status"]) == ("Android 14 (API 34)", "none", "none")
    document = report.read(tmp_path / "page")
    assert document["bench"] == found["bench"]
    assert document["commands"][0].startswith("edgelora bench tiny-q8_0.gguf tiny-q4_0.gguf --threads 1")
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "Speed on this machine and on other devices" in page
    assert "Acme One" in page
    secrets = (phone.serial, "127.0.0.1", "secret-place", str(runner))
    assert not [secret for secret in secrets if secret in page + json.dumps(document)]
    assert left_over(phone) == []


def test_a_phone_whose_shell_tells_no_exit_code(server: None, files: tuple[Path, Path], runner: Path, tmp_path: Path) -> None:
    """Before Android 7 adb's shell ended with 0 whatever happened, and mixed both outputs."""
    for device in attached(tmp_path / "old", SAME, features="cmd"):
        done = bench(files[0], "--device", f"adb:{device.serial}", "--runner", runner, *SHORT)
        assert done.output.count("tok/s") == 4
        crashing = script(tmp_path / "llama-bench", "exit 3")
        assert "ended with status 3" in failing(DeviceError, files[0], "--device", "adb", "--runner", crashing, *SHORT).message
        assert left_over(device) == []


def test_what_an_emulator_measures_is_not_shown(server: None, files: tuple[Path, Path], tmp_path: Path) -> None:
    """llama.cpp's arm64 code, pushed and run through qemu-user: it runs there, and no time, speed or memory of it is anywhere."""
    tools = packaged_runner(tmp_path / "arm64", "arm64")
    for device in attached(tmp_path / "phone", ARM):
        done = bench(files[0], "--device", "adb", "--runner", tools, *SHORT, "-o", tmp_path / "page")
        assert done.output.count("EMULATED") == 2
        assert "tok/s" not in done.output
        assert left_over(device) == []
    rows = report.read(tmp_path / "page")["bench"]
    assert [(row["prompt_tokens"], row["emulated"]) for row in rows] == [(4, True), (8, True)]
    assert [key for row in rows for key in MEASURED if key in row] == []
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "no speed is shown" in page
    assert "tok/s" not in page


def test_an_interrupted_push(phone: AdbDevice, files: tuple[Path, Path], runner: Path) -> None:
    phone.cut_after_bytes = files[0].stat().st_size // 2
    error = failing(DeviceError, files[0], "--device", f"adb:{phone.serial}", "--runner", runner, *SHORT)
    assert f"adb:{phone.serial} went away while {files[0].name} was pushed" in error.message
    (folder,) = left_over(phone)
    assert f"{folder} stays on the device until the next bench removes it" in error.hint
    assert "is offline" in failing(DeviceError, files[0], "--device", "adb", "--runner", runner, *SHORT).message
    plug_in(phone)
    bench(files[0], "--device", "adb", "--runner", runner, *SHORT)
    assert left_over(phone) == []


def plug_in(device: AdbDevice) -> None:
    subprocess.run(["adb", "disconnect", device.serial], capture_output=True, timeout=60)
    device.plug_in()
    connect(device.serial)


def test_a_phone_that_goes_away_in_mid_run(phone: AdbDevice, files: tuple[Path, Path], runner: Path, tmp_path: Path) -> None:
    hanging = script(tmp_path / "llama-bench", "echo started; exec sleep 300")
    phone.cut_when = "exec"
    error = failing(DeviceError, files[0], "--device", "adb", "--runner", hanging, *SHORT)
    assert f"adb:{phone.serial} went away while it ran a command" in error.message
    (folder,) = phone.root.iterdir()
    sleeping = int((folder / "pid").read_text())
    assert Path(f"/proc/{sleeping}/comm").read_text().strip() == "sleep"  # it goes on there, as on a phone
    plug_in(phone)
    bench(files[0], "--device", "adb", "--runner", runner, *SHORT)
    assert left_over(phone) == []
    assert gone(sleeping)


def gone(pid: int) -> bool:
    """Whether a process ended, at once or within five seconds; a dead one whom nobody has buried counts."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_full_phone_says_so_before_anything_is_pushed(phone: AdbDevice, files: tuple[Path, Path], runner: Path) -> None:
    phone.has_room(free_kib=12_000)
    error = failing(DiskFull, files[0], "--device", "adb", "--runner", runner, *SHORT)
    assert error.message.startswith(f"adb:{phone.serial} has 12 MB free, ")
    assert left_over(phone) == []


def test_a_phone_that_becomes_full(phone: AdbDevice, files: tuple[Path, Path], runner: Path) -> None:
    phone.full_after_bytes = files[0].stat().st_size + 1000
    error = failing(DiskFull, files[0], "--device", "adb", "--runner", runner, *SHORT)
    assert "No space left on device" in error.message
    assert left_over(phone) == []


def test_a_file_that_arrives_damaged(phone: AdbDevice, files: tuple[Path, Path], runner: Path) -> None:
    phone.flip_a_bit_of = files[0].name
    error = failing(DeviceError, files[0], "--device", "adb", "--runner", runner, *SHORT)
    assert error.message == f"{files[0].name} arrived damaged on adb:{phone.serial}"
    assert left_over(phone) == []


def test_a_runner_for_another_processor(server: None, files: tuple[Path, Path], runner: Path, tmp_path: Path) -> None:
    for device in attached(tmp_path / "phone", {**HERE, "ro.product.cpu.abilist": "armeabi-v7a"}):
        error = failing(Unsupported, files[0], "--device", "adb", "--runner", runner, *SHORT)
        own = "x86_64" if os.uname().machine == "x86_64" else "arm64"
        assert error.message == f"llama-bench is built for {own}, adb:{device.serial} runs arm"
        assert left_over(device) == []


@pytest.mark.parametrize(
    ("does", "message", "hint"),
    [
        ("kill -SEGV $$", "llama-bench died of signal 11 on adb:", "memory that is not its own"),
        ("kill -KILL $$", "llama-bench died of signal 9 on adb:", "want of memory"),
        ("echo error: no such model >&2; exit 7", "ended with status 7 on adb:", "by hand"),
        ("echo Segmentation", "printed no figures of tiny-q8_0.gguf: no JSON: 'Segmentation'", "llama-bench of today"),
        ("echo '{\"n_prompt\": 4}'", "no list of tests", "llama-bench of today"),
        ("echo '[{\"n_prompt\": 4}]'", "no test of a 8-token prompt", "llama-bench of today"),
        ("true", "no JSON: ''", "llama-bench of today"),
    ],
)
def test_a_runner_that_fails(phone: AdbDevice, files: tuple[Path, Path], tmp_path: Path, does: str, message: str, hint: str) -> None:
    error = failing(DeviceError, files[0], "--device", "adb", "--runner", script(tmp_path / "llama-bench", does), *SHORT)
    assert message in error.message
    assert hint in error.hint
    assert left_over(phone) == []


def test_two_phones_in_a_row(phone: AdbDevice, files: tuple[Path, Path], runner: Path, tmp_path: Path) -> None:
    for second in attached(tmp_path / "second", SAME):
        rows = json.loads(bench(files[0], "--device", "adb", "--runner", runner, *SHORT, "--json").stdout)["bench"]
        assert [(row["device"], row["prompt_tokens"]) for row in rows] == [
            (name, n) for name in ("Acme One", "Acme One #2") for n in (4, 8)
        ]
        assert {row["device_class"] for row in rows} == {"acme-one"}
        assert left_over(phone) == left_over(second) == []


def test_what_one_phone_measured_survives_the_other(
    phone: AdbDevice, files: tuple[Path, Path], runner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for second in attached(tmp_path / "second", SAME):
        second.has_room(free_kib=1)
        names = ("--device", f"adb:{phone.serial}", "--device", f"adb:{second.serial}")
        done = CliRunner().invoke(cli, ["bench", *map(str, (files[0], *names, "--runner", runner, *SHORT, "-o", tmp_path / "page"))])
        assert isinstance(done.exception, DiskFull)
        assert second.serial in done.exception.message
        assert done.output.count("tok/s") == 4  # two rows, prefill and decode
        assert len(report.read(tmp_path / "page")["bench"]) == 2
        assert left_over(phone) == left_over(second) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_bench_that_is_stopped(
    phone: AdbDevice, files: tuple[Path, Path], runner: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Ctrl-C takes the folder away, and what runs in it; after a kill the next bench does."""
    hanging = script(tmp_path / "llama-bench", "exec sleep 300")
    words = [sys.executable, "-m", "edgelora.cli", "bench", files[0], "--device", "adb", "--runner", hanging, *SHORT]
    process = subprocess.Popen(list(map(str, words)), env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    sleeping = started(phone)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    if number == signal.SIGKILL:
        assert len(left_over(phone)) == 1
        bench(files[0], "--device", "adb", "--runner", runner, *SHORT)
    assert left_over(phone) == []
    assert gone(sleeping)


def started(device: AdbDevice) -> int:
    """The process that a runner on the device is, once it is."""
    for _ in range(600):
        for found in device.root.glob("*/pid"):
            if (text := found.read_text().strip()) and Path(f"/proc/{text}/comm").read_text().strip() == "sleep":
                return int(text)
        time.sleep(0.1)
    pytest.fail("the runner was not started")


def test_folders_of_others_are_left_alone(phone: AdbDevice, files: tuple[Path, Path], runner: Path) -> None:
    others = [phone.root / name for name in ("edgelora-0123abcd-1", "mine", f"edgelora-{os.getpid()}")]
    for folder in others:
        folder.mkdir()
    bench(files[0], "--device", "adb", "--runner", runner, *SHORT)
    assert sorted(left_over(phone)) == sorted(folder.name for folder in others)


def test_devices_that_are_not_there(server: None, files: tuple[Path, Path], runner: Path, phone: AdbDevice) -> None:
    error = failing(DeviceError, files[0], "--device", "adb:R58M123", "--runner", runner)
    assert (error.message, error.hint) == ("no device 'R58M123' is attached over adb", f"attached: {phone.serial}")
    subprocess.run(["adb", "disconnect"], capture_output=True, timeout=60)
    assert "no device is attached" in failing(DeviceError, files[0], "--device", "adb", "--runner", runner).message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "adb"), "--device adb needs the program"),
        (("--runner", "x"), "--runner is a program for another device"),
        (("--device", "usb:1", "--runner", "x"), "--device 'usb:1' is no device"),
        (("--device", "ssh:-oProxyCommand=x", "--runner", "x"), "names no host"),
        (("--device", "ssh:pi@host:port", "--runner", "x"), "names no host"),
        (("--device", "ssh:pi@host", "--runner", "x"), "no llama-bench among x"),
        (("--device", "ssh:pi@host", "--runner", "x", "--estimate", "all"), "--estimate runs no file"),
        (("--threads", "0"), "--threads '0' are not counts above 0"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(files: tuple[Path, Path], arguments: tuple[str, ...], words: str) -> None:
    assert words in failing(UsageError, files[0], *arguments).message


def test_a_runtime_of_this_machine_is_no_runner(files: tuple[Path, Path], runner: Path) -> None:
    error = failing(UsageError, files[0], "--device", "ssh:pi@host", "--runner", runner, "--runtime", "llama.cpp")
    assert error.message == "--runtime chooses among the runtimes of this machine"
