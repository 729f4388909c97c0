"""What runners print, read back; what devices say of themselves; for whom a program was built. No device and no client is needed."""

from __future__ import annotations

import importlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgelora import check, report
from edgelora.device import RUNNERS, Done, Garbled, Work, about, elf, executorch, litert_lm, llama_bench, mnn, program_of, runner_of
from edgelora.device import bench as benches
from edgelora.device.shell import closed, opened
from edgelora.errors import ModelError, UsageError
from edgelora.report import schema
from edgelora.report.schema import MEASURED

WORK = Work(prompt_tokens=(4, 8), decode_tokens=2, repeats=2)


def test_every_runner_is_one() -> None:
    for name in RUNNERS.values():
        module = importlib.import_module(name)
        assert module.PROGRAM
        assert module.RUNTIME
        starts = module.commands(["./model0/model", "./model0/tokenizer"], 3, WORK)
        assert all("./model0/model" in " ".join(words) and "3" in " ".join(words) for words in starts)


# ---- llama-bench: a JSON list of tests ----


def row_of(prompt: int, gen: int, depth: int, **changes: Any) -> dict[str, Any]:
    row = {
        "build_commit": "0ad4a86",
        "build_number": 9,
        "backends": "CPU",
        "n_threads": 1,
        "n_prompt": prompt,
        "n_gen": gen,
        "n_depth": depth,
    }
    return {**row, "samples_ns": [4_000_000, 6_000_000], **changes}


def test_llama_bench() -> None:
    outputs = [json.dumps([row_of(4, 0, 0), row_of(8, 0, 0, samples_ns=[1, 2])]), json.dumps([row_of(0, 2, 4), row_of(0, 2, 8)])]
    first, second = llama_bench.read(outputs, 1, WORK)
    assert (first.version, first.prompt_tokens, first.decode_tokens) == ("llama.cpp 0ad4a86 (9), CPU", 4, 2)
    assert (first.load_ms, first.ttft_ms, first.decode_ms) == ((), (4.0, 6.0), (2.0, 3.0))  # two tokens a sample
    assert second.ttft_ms == (1e-6, 2e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_threads": 2}, "it ran 2 threads instead of 1"),
        ({"samples_ns": [4]}, "samples_ns of 2 repeats are"),
        ({"samples_ns": [4, -1]}, "something else than times"),
        ({"samples_ns": "fast"}, "samples_ns of 2 repeats are fast"),
        ({"n_depth": 9}, "no test of a 4-token prompt"),
    ],
)
def test_llama_bench_that_measured_something_else(change: Mapping[str, Any], words: str) -> None:
    outputs = [json.dumps([row_of(4, 0, 0)]), json.dumps([row_of(0, 2, 4, **change)])]
    with pytest.raises(Garbled, match=words):
        llama_bench.read(outputs, 1, Work((4,), 2, 2))


# ---- ExecuTorch: extension/llm/runner/stats.h ----


def stamps(**changes: int) -> str:
    found = {"prompt_tokens": 7, "generated_tokens": 20, "model_load_start_ms": 1000, "model_load_end_ms": 1250, "inference_start_ms": 1300}
    found |= {"inference_end_ms": 1600, "prompt_eval_end_ms": 1400, "first_token_ms": 1401, "SCALING_FACTOR_UNITS_PER_SECOND": 1000}
    return f"I 00:00 warmed up\nPyTorchObserver {{}}\nOnce upon a time\nPyTorchObserver {json.dumps({**found, **changes})}\n"


def test_executorch() -> None:
    first, _ = executorch.read([stamps(), stamps(inference_end_ms=1800), stamps(), stamps()], 1, WORK)
    assert (first.prompt_tokens, first.decode_tokens) == (7, 20)  # as the runner counted them
    assert (first.load_ms, first.ttft_ms, first.decode_ms) == ((250.0, 250.0), (101.0, 101.0), (10.0, 20.0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no such model", "no line with PyTorchObserver"),
        ("PyTorchObserver {oops}", "without JSON"),
        (stamps(generated_tokens=0), "generated_tokens is 0"),
        (stamps(first_token_ms=1300), "first_token_ms is not after inference_start_ms"),
    ],
)
def test_executorch_that_says_something_else(text: str, words: str) -> None:
    with pytest.raises(Garbled, match=words):
        executorch.read([text], 1, Work((4,), 2, 1))


def test_executorch_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "model.pte").touch()
    with pytest.raises(ModelError, match=r"no tokenizer lies beside model\.pte"):
        executorch.files(tmp_path / "model.pte")
    (tmp_path / "tokenizer.json").touch()
    assert [path.name for path in executorch.files(tmp_path)] == ["model.pte", "tokenizer.json"]


# ---- LiteRT-LM: runtime/engine/io_types.cc ----


def block(prefill: str = "Processed 128 tokens in 250ms duration.", decode: str = "Processed 32 tokens in 1m2.4s duration.") -> str:
    return f"""I0000 00:00 BenchmarkInfo:
  Init Phases (2):
    - Executor initialization: 120.50 ms
    - Tokenizer initialization: 9.50 ms
--------------------------------------------------
  Time to first token: 0.26 s
--------------------------------------------------
  Prefill Turns (Total 1 turns):
    Prefill Turn 1: {prefill}
      Prefill Speed: 512.00 tokens/sec.
--------------------------------------------------
  Decode Turns (Total 1 turns):
    Decode Turn 1: {decode}
      Decode Speed: 0.51 tokens/sec.
"""


def test_litert_lm() -> None:
    first, _ = litert_lm.read([block()] * 4, 1, WORK)
    assert (first.prompt_tokens, first.decode_tokens) == (128, 32)
    assert (first.load_ms, first.decode_ms) == ((130.0, 130.0), (1950.0, 1950.0))
    assert first.ttft_ms == (2200.0, 2200.0)  # the prompt, and the first token after it


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Segmentation fault", "no BenchmarkInfo"),
        (block(decode="none"), "no decode turn"),
        (block(prefill="Processed 0 tokens in 0 duration."), "'0' is no duration"),
        (block(prefill="Processed 128 tokens in 3parsec duration."), "'3parsec' is no duration"),
    ],
)
def test_litert_lm_that_says_something_else(text: str, words: str) -> None:
    with pytest.raises(Garbled, match=words):
        litert_lm.read([text], 1, Work((128,), 32, 1))


# ---- MNN: transformers/llm/engine/tools/llm_bench.cpp ----


def table(prefill: str = "400.00", load: str = " | 0.35 ± 0.01 |") -> str:
    return f"""CPU Group: [ 0 1 ]
| model      |  modelSize | backend | threads | precision | llm_demo               | speed(tok/s)                     | loadingTime(s) |
| ---------- | ---------: | ------- | ------: | --------- | ---------------------- | -------------------------------: | -------------: |
| smol       |  80.00 MiB | CPU     |       1 | Low       | prompt=4<br>decode=2   | {prefill} ± 0.00<br>50.00 ± 0.00{load}
| smol       |  80.00 MiB | CPU     |       1 | Low       | prompt=8<br>decode=2   | 800.00 ± 0.00<br>25.00 ± 0.00{load}
"""


def test_mnn() -> None:
    first, second = mnn.read([table(), table("200.00")], 1, WORK)
    assert (first.load_ms, first.ttft_ms, first.decode_ms) == ((350.0, 350.0), (10.0, 20.0), (20.0, 20.0))
    assert (second.ttft_ms, second.decode_ms) == ((10.0, 10.0), (40.0, 40.0))
    assert mnn.read([table(load=" |")] * 2, 1, WORK)[0].load_ms == ()


@pytest.mark.parametrize(("text", "words"), [("Killed", "no row of a 4-token prompt"), (table("0.00"), "a speed of 0.00")])
def test_mnn_that_says_something_else(text: str, words: str) -> None:
    with pytest.raises(Garbled, match=words):
        mnn.read([text, text], 1, WORK)


# ---- which runner, which program ----


def test_which_runner_opens_what(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.litertlm", "c.pte"):
        (tmp_path / name).touch()
    (tmp_path / "mnn").mkdir()
    for name in ("llm.mnn", "config.json", "llm.mnn.weight"):
        (tmp_path / "mnn" / name).touch()
    found = [runner_of(tmp_path / name).RUNTIME for name in ("a.gguf", "b.litertlm", "c.pte", "mnn")]
    assert found == ["llama-bench", "litert-lm", "executorch", "mnn"]
    assert mnn.files(tmp_path / "mnn")[0].name == "config.json"
    with pytest.raises(UsageError, match="nothing that a runner on a device opens"):
        runner_of(tmp_path / "mnn" / "config.json")
    with pytest.raises(UsageError, match="does not exist"):
        runner_of(tmp_path / "nothing.gguf")


def test_which_program_is_taken(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("llama-bench", "llm_bench"):
        (tmp_path / "bin" / name).touch()
    other = tmp_path / "my-own-build"
    other.touch()
    assert program_of(mnn, [tmp_path / "bin"]).name == "llm_bench"
    assert program_of(llama_bench, [other]) == other  # a single file is what the user says it is
    with pytest.raises(UsageError, match="no llama_main among"):
        program_of(executorch, [tmp_path / "bin", other])


# ---- what a device says ----

PIXEL = """@uname
aarch64
Linux 5.10.177
@props
[ro.build.version.release]: [14]
[ro.build.version.sdk]: [34]
[ro.product.cpu.abilist]: [arm64-v8a,armeabi-v7a,armeabi]
[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 8]
[ro.serialno]: [37SECRET]
[ro.soc.manufacturer]: [Google]
[ro.soc.model]: [Tensor G3]
@cpuinfo
processor\t: 0
Features\t: fp asimd asimdhp asimddp i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd46
processor\t: 1
@meminfo
MemTotal:        7800000 kB
@os
@board
"""
PI = """@uname
aarch64
Linux 6.6.51
@props
@cpuinfo
processor\t: 0
Features\t: fp asimd asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b
@meminfo
MemTotal: 4000000 kB
@os
PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"
@board
Raspberry Pi 5 Model B Rev 1.0
"""


def says(text: str) -> Callable[[str], Done]:
    return lambda command: Done(0, text, "")


def test_a_phone() -> None:
    seen = about.look(says(PIXEL))
    assert (seen.name, seen.kind, seen.cpu, seen.cores, seen.os) == (
        "Google Pixel 8",
        "google-pixel-8",
        "Google Tensor G3",
        2,
        "Android 14 (API 34)",
    )
    assert seen.memory_bytes == 7800000 * 1024
    assert seen.runs[:2] == ("arm64", "arm")
    assert "i8mm" in seen.cpu_features
    assert (seen.android, seen.emulated) == (True, "")
    assert "SECRET" not in json.dumps(seen.as_row())


def test_a_board() -> None:
    seen = about.look(says(PI))
    assert (seen.name, seen.kind) == ("Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5-model-b-rev-1-0")
    assert (seen.cpu, seen.os) == ("arm64 implementer 0x41 part 0xd0b", "Debian GNU/Linux 12 (bookworm)")
    assert (seen.runs, seen.android, seen.emulated) == (("arm64", "arm"), False, "")
    plain = about.look(says(PI.replace("Raspberry Pi 5 Model B Rev 1.0", "")))
    assert plain.kind == "arm64-1core"  # as this program would name it if it ran there


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (PIXEL.replace("[ro.serialno]: [37SECRET]", "[ro.boot.qemu]: [1]"), "it is an Android emulator"),
        (PIXEL.replace("[ro.serialno]: [37SECRET]", "[ro.hardware]: [ranchu]"), "it is an Android emulator"),
        (PIXEL.replace("@uname\naarch64", "@uname\nx86_64"), "it says arm64 and its kernel is x86_64"),
        (
            PI.replace("CPU implementer\t: 0x41", "vendor_id\t: AuthenticAMD"),
            "it says arm64 on another processor",
        ),  # qemu-user in a container
    ],
)
def test_what_is_no_real_device_is_seen(text: str, why: str) -> None:
    assert about.look(says(text)).emulated == why


def test_a_32_bit_phone_system_on_a_64_bit_kernel_is_no_emulator() -> None:
    assert about.look(says(PIXEL.replace("arm64-v8a,armeabi-v7a", "armeabi-v7a"))).emulated == ""


STATE = """governor schedutil
clock 1803000 1803000
governor performance
clock 1000000 2000000
zone 41200 battery
zone 55600 cpu-1-0
zone 72 soc_thermal
zone 0 wlan
Thermal Status: 2
load 1.25 1.00 0.90 2/300 1234
"""


def test_the_state_of_a_device() -> None:
    now = about.state(says(STATE))
    assert now == about.State("performance, schedutil", 72.0, "moderate", 1.25, 1, 0.5)
    assert about.state(says("governor \nclock \nload \n")) == about.State(None, None, None, None, None, None)


def test_heat_a_lower_clock_and_company_make_a_figure_doubtful() -> None:
    cool = about.State("schedutil", 40.0, "none", 0.1, 0, 1.0)
    assert about.doubts(cool, cool, 4, 8) == []
    hot = about.State("schedutil", 80.0, "severe", 4.0, 0, 0.6)
    assert about.doubts(cool, hot, 4, 8) == [
        "the device calls its heat severe",
        "the device held its clock down to 60% of its maximum",
    ]
    busy = about.State("schedutil", 40.0, "none", 0.5, 7, 1.0)
    assert about.doubts(busy, busy, 4, 8) == ["other programs ran beside our 4 threads on 8 cores (7 at a time)"]


def test_thread_counts_that_are_tried() -> None:
    assert [benches.sweep(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


# ---- programs and shells ----


def test_for_whom_a_program_is_built(tmp_path: Path) -> None:
    own = elf.read(Path(sys.executable).resolve())
    assert own is not None
    assert own.machine in ("x86_64", "arm64")
    assert own.loader.startswith("/lib")
    assert not own.for_android
    assert elf.read(Path(__file__)) is None
    for name, head in (("empty", b""), ("short", b"\x7fELF\x02\x01"), ("cut", Path(sys.executable).read_bytes()[:80])):
        (tmp_path / name).write_bytes(head)
        found = elf.read(tmp_path / name)
        assert found is None or found.loader == ""
    android = struct.pack("<4s5B7x2HI3Q", b"\x7fELF", 2, 1, 1, 0, 0, 3, 183, 1, 0, 64, 0) + struct.pack("<I6H", 0, 64, 56, 1, 0, 0, 0)
    android += struct.pack("<2I6Q", 3, 4, 120, 0, 0, 21, 21, 1) + b"/system/bin/linker64\0"
    (tmp_path / "android").write_bytes(android)
    assert elf.read(tmp_path / "android") == elf.Program("arm64", "/system/bin/linker64")


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell here")
@pytest.mark.parametrize(
    ("command", "code", "out"), [("echo a; exit 3", 3, "a\n"), ("true", 0, ""), ("printf 'x y'", 0, "x y"), ("kill -9 $$", 137, "")]
)
def test_a_command_tells_how_it_ended(command: str, code: int, out: str) -> None:
    done = subprocess.run(closed(command), shell=True, capture_output=True, text=True)
    found = opened(Done(0, done.stdout.replace("\n", "\r\n"), done.stderr))
    assert found is not None
    assert (found.code, found.out) == (code, out)


def test_a_command_that_was_cut_off_has_not_ended() -> None:
    assert opened(Done(0, "half a li", "")) is None
    assert opened(Done(255, "", "Connection reset")) is None


# ---- the report ----


def emulated(**more: Any) -> dict[str, Any]:
    row = {"file": "a.gguf", "device": "Phone", "device_class": "phone", "emulated": True, "prompt_tokens": 4}
    return {"schema": report.SCHEMA, "name": "x", "bench": [{**row, **more}]}


@pytest.mark.parametrize("key", MEASURED)
def test_a_report_cannot_hold_what_an_emulator_measured(key: str) -> None:
    report.validate(emulated(), "it")
    with pytest.raises(ModelError, match=f"bench\\[0\\].{key}: an emulator's"):
        report.validate(emulated(**{key: {"decode": [1.0]} if key == "samples_ms" else 1}), "it")


def test_every_measured_key_is_known_to_the_schema() -> None:
    assert set(MEASURED) <= set(schema.REPORT["bench"][0])


def bench_document(kind: str | None, ms: float) -> dict[str, Any]:
    row = {"file": "a.gguf", "runtime": "llama-bench", "threads": 4, "prompt_tokens": 4, "decode_tokens": 2, "decode_tok_per_s": 1000 / ms}
    row |= {"samples_ms": {"ttft": [1.0] * 6, "decode": [ms + i / 1000 for i in range(6)]}, "noisy": False, "crowded": False}
    row |= {"device": f"The {kind}", "device_class": kind} if kind else {}
    return {"schema": report.SCHEMA, "name": "x", "machine": {"class": "x86-2core"}, "bench": [row]}


def test_a_budget_compares_one_kind_of_device_only() -> None:
    before = bench_document("pixel-8", 10.0)
    (same,) = check.check(bench_document("pixel-8", 20.0), {"decode": "-5%"}, before)
    assert same.ok is False
    (other,) = check.check(bench_document("pixel-9", 20.0), {"decode": "-5%"}, before)
    assert (other.ok, "another machine (pixel-8, this is pixel-9)" in other.why) == (None, True)
    (native,) = check.check(bench_document(None, 20.0), {"decode": "-5%"}, before)
    assert native.ok is None


def test_two_reports_of_devices_are_compared_device_by_device() -> None:
    files = [{"file": "a.gguf", "format": "gguf", "type": "q4_0", "size_bytes": 1}]
    both = report.compare([{**bench_document("pixel-8", ms), "files": files} for ms in (10.0, 20.0)])
    rows = {row["what"]: row for row in both["rows"]}
    assert rows["decode (The pixel-8, llama-bench, 4 threads, 4-token prompt)"]["verdicts"][1]["word"] == "real"
