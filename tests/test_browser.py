"""Models in a real Chromium: they answer as their native runtimes do, are timed like them, and what fails is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelora import bench, environments
from edgelora.bench import agreement
from edgelora.data.row import Row
from edgelora.errors import EdgeloraError, ModelError, ToolMissing, Unsupported, UsageError
from edgelora.export import gguf
from edgelora.export import onnx as onnx_export
from edgelora.recipe import Bench
from edgelora.runtime import RUNTIMES, browser, browser_of, runtime, runtime_of
from edgelora.runtime.browser import BrowserSession
from edgelora.runtime.process_tree import ProcessTree
from tests.line import edgelora
from tests.test_bench import KEYS
from tests.test_bench_command import taught
from tests.test_onnx_export import calmed, quiet
from tests.tiny_models import tiny_model

CHROMIUM = any(map(shutil.which, browser.CHROMIUM))
there = pytest.mark.skipif(
    not (CHROMIUM and shutil.which("node") and environments.installed("web")),
    reason="install Chromium and Node (apt-get install -y chromium nodejs npm) and run edgelora doctor --install web",
)
TEXT = "<|im_start|>user\nWhat is part 3?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = 'Part 5 is "a" wheel.\n'


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tiny model as GGUF and as ONNX, by the name of the runtime that opens each in a browser."""
    root = tmp_path_factory.mktemp("browser")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is part {n}?", "answer": f"Part {n} is a wheel."}) + "\n" for n in range(6)))
    model = taught(calmed(tiny_model("llama", root / "hf")), rows, root / "taught")  # wllama has no JSON for what a random one says
    return {
        "wllama": gguf.write(model, "q8_0", root, "tiny", quiet),
        "onnxruntime-web": onnx_export.write(model, "int4", root, "tiny", quiet),
    }


@pytest.fixture(scope="module", params=["wllama", "onnxruntime-web"])
def session(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[BrowserSession]:
    opened = runtime(request.param).open(files[request.param], 2)
    assert isinstance(opened, BrowserSession)
    with opened:
        yield opened


@pytest.fixture
def path(session: BrowserSession, files: dict[str, Path]) -> Path:
    return files["wllama" if "wllama" in session.page.url else "onnxruntime-web"]


@there
def test_it_answers_as_the_native_runtime(session: BrowserSession, path: Path) -> None:
    with runtime(runtime_of(path)).open(path, 1) as native:
        ids, answer = native.tokenize(TEXT), native.tokenize(ANSWER)
        assert (session.tokenize(TEXT), session.detokenize(ids)) == (ids, native.detokenize(ids))
        assert (session.chat_template, session.special_tokens) == (native.chat_template, native.special_tokens)
        assert list(session.generate(ids, 6, session.stop_ids)) == list(native.generate(ids, 6, native.stop_ids))
        said = session.follow(ids, [*answer, native.stop_ids[0]])
        assert session.detokenize(said.ids) == ANSWER
        assert said.ids[-1] in native.stop_ids
        expected = native.score([*ids, *said.ids[:-1]], first=len(ids) - 1)
        own = expected[np.arange(len(said.ids)), list(said.ids)]
        assert own.std() > 0.3  # they do differ: agreement means something
        np.testing.assert_allclose(said.logprobs, own, atol=0.1 * own.std())  # kernels round otherwise
        assert np.mean(expected.argmax(-1) == said.likeliest) > 0.7


@there
def test_it_is_timed_by_its_own_clock_and_by_the_kernel(session: BrowserSession) -> None:
    ids = session.tokenize(TEXT * 3)[:40]
    started, timed = time.monotonic(), session.time(ids, 12)
    wall_ms = 1000 * (time.monotonic() - started)
    assert (timed.prompt_tokens, len(timed.decode_ms)) == (40, 12)
    assert 0 < timed.ttft_ms + sum(timed.decode_ms) < wall_ms
    assert timed.prefill_cpu_s >= 0
    assert session.load_ms > 0
    assert 50e6 < session.page.tree.peak_bytes < 5e9


@there
def test_what_a_browser_is_not_asked(session: BrowserSession) -> None:
    with pytest.raises(Unsupported, match="not of the whole vocabulary"):
        session.score([1, 2])
    with pytest.raises(Unsupported, match="empty sequence"):
        session.time([], 4)
    with pytest.raises(Unsupported, match="own stop tokens alone"):
        list(session.generate([1, 2], 4, (7,)))


@there
@pytest.mark.parametrize("name", ["wllama", "onnxruntime-web"])
def test_bench_rows_are_those_of_every_runtime(name: str, files: dict[str, Path]) -> None:
    (row,) = bench.bench(files[name], name, Bench((12,), 4, 3), 1, quiet)
    assert set(row) == KEYS
    assert (row["file"], row["runtime"], row["threads"], row["prompt_tokens"]) == (files[name].name, name, 1, 12)
    assert row["runtime_version"].startswith(name)
    assert ", Chromium 1" in row["runtime_version"]
    assert [len(row["samples_ms"][key]) for key in ("load", "ttft", "decode")] == [3, 3, 12]
    assert row["peak_rss_bytes"] > 50e6


@there
def test_agreement_with_the_native_runtime_is_measured(files: dict[str, Path]) -> None:
    rows = [Row((("user", f"What is part {n}?"), ("assistant", f"Part {n} is a wheel.")), n) for n in range(3)]
    found = agreement.measured(files["wllama"], rows, "held-out", 1)
    assert (found["set"], found["runtime"], found["against"], found["rows"], found["answers"]) == ("held-out", "wllama", "llama.cpp", 3, 3)
    assert abs(found["loss"]["loss"] - found["against_loss"]) < 0.05
    assert found["top1"] > 0.8
    assert len(found["differing"]) == 3 - found["answers_equal"]
    own = agreement.measured(files["onnxruntime-web"], [], "", 1)
    assert (own["set"], own["rows"]) == ("the bench's own text", 3)
    assert abs(own["loss"]["loss"] - own["against_loss"]) < 0.1


@there
def test_a_file_that_is_none_is_refused_in_the_runtimes_words(files: dict[str, Path], tmp_path: Path) -> None:
    """What our own look at a header cannot see, the page does: a graph with an operator that nobody knows."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no GGUF at all" * 100)
    with pytest.raises(ModelError, match="is not a GGUF file"):
        runtime("wllama").open(broken, 1)
    shutil.copytree(files["onnxruntime-web"], folder := tmp_path / "tiny-onnx")
    graph = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(graph.replace(b"MatMulNBits", b"MatMulNBitz"))
    with pytest.raises(ModelError, match=r"onnxruntime cannot run the file: .*MatMulNBitz") as caught:
        runtime("onnxruntime-web").open(folder, 1)
    assert caught.value.hint
    data = files["wllama"].read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(ModelError, match=r"wllama cannot run the file: .*blk\.1\.attn_q"):
        runtime("wllama").open(other, 1)


@there
def test_a_crash_of_the_page_is_an_error_and_leaves_nothing_behind(files: dict[str, Path]) -> None:
    session = runtime("onnxruntime-web").open(files["onnxruntime-web"], 1)
    assert isinstance(session, BrowserSession)
    pids = session.page.tree.pids()
    page = next(p for p in pids if "--type=renderer" in Path(f"/proc/{p}/cmdline").read_text().replace("\0", " ") and _holds_wasm(p))
    os.kill(page, signal.SIGKILL)
    with pytest.raises(EdgeloraError, match="onnxruntime in Chromium ended: the page crashed: it may have run out of memory") as caught:
        session.time([1, 2, 3], 200)
    assert "free some memory" in caught.value.hint
    with pytest.raises(EdgeloraError, match="is closed"):
        session.time([1, 2, 3], 2)
    _wait_until_gone(pids)


@there
def test_a_killed_bench_leaves_no_browser_behind(files: dict[str, Path]) -> None:
    program = (
        "import sys, pathlib; from edgelora.runtime import runtime\n"
        "session = runtime('onnxruntime-web').open(pathlib.Path(sys.argv[1]), 1)\n"
        "print(*session.page.tree.pids(), flush=True)\n"
        "while True: session.time([5, 6, 7], 200)"
    )
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", program, str(files["onnxruntime-web"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as bench_process:
        assert bench_process.stdout
        pids = list(map(int, bench_process.stdout.readline().split()))
        bench_process.kill()
    assert len(pids) > 3
    _wait_until_gone(pids)


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(map(_cmdline, pids)):
        assert time.monotonic() < deadline, "Chromium lives on"
        time.sleep(0.1)


def _holds_wasm(pid: int) -> bool:
    """The renderer that holds our page, and not a spare one."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) == max(
        int(Path(f"/proc/{p}/statm").read_text().split()[1])
        for p in (int(f.name) for f in Path("/proc").iterdir() if f.name.isdigit())
        if "--type=renderer" in _cmdline(p) and _parent(p) == _parent(pid)
    )


def _cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@there
def test_too_many_threads_for_the_page_are_no_quiet_downgrade(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the isolating headers a page gets one thread."""
    from edgelora.runtime import page_server

    monkeypatch.setattr(page_server, "_HEADERS", {})
    with pytest.raises(EdgeloraError, match=r"Chromium gives 1 threads and not 2|SharedArrayBuffer|isolated"):
        runtime("wllama").open(files["wllama"], 2)


def test_what_is_missing_is_named_with_its_command(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nothing"))
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "chromium").write_text("#!/bin/sh\n")
    (bin_ / "chromium").chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_))
    with pytest.raises(ToolMissing, match="the environment 'web' is not installed") as caught:
        browser.modules()
    assert caught.value.hint == "edgelora doctor --install web"
    assert browser.chromium() == str(bin_ / "chromium")
    (bin_ / "chromium").unlink()
    with pytest.raises(ToolMissing, match="Chromium is not installed") as caught:
        runtime("wllama").open(files["wllama"], 1)
    assert caught.value.hint == "apt-get install -y chromium"


def test_the_command_asks_for_its_tools_first(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv("PATH", str(tmp_path))
    done = edgelora("bench", files["wllama"], "--browser", cwd=tmp_path)
    assert (done.code, done.err) == (3, "error: Chromium is not installed\napt-get install -y chromium\n")
    done = edgelora("bench", files["wllama"], "--browser", "--estimate", "all", cwd=tmp_path)
    assert (done.code, done.err) == (2, "error: --estimate runs no file\nleave --estimate or --browser away\n")


def test_which_runtime_opens_a_file_in_a_browser(files: dict[str, Path], tmp_path: Path) -> None:
    for name, file in files.items():
        assert browser_of(file) == name
        assert name in RUNTIMES
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Unsupported, match="is run by torch, and no browser has that"):
        browser_of(tmp_path)
    from edgelora.cli.bench import _runtimes

    gguf_file = files["wllama"]
    assert _runtimes(gguf_file, (), True) == ("llama.cpp", "wllama")
    assert _runtimes(gguf_file, ("wllama",), True) == ("wllama",)
    assert _runtimes(gguf_file, ("all",), False) == ("llama.cpp",)
    with pytest.raises(UsageError, match="is not opened by 'onnxruntime-web'"):
        _runtimes(gguf_file, ("onnxruntime-web",), False)


def test_a_tree_of_processes_is_told_as_one(tmp_path: Path) -> None:
    grown = "x = bytearray(60 << 20); x[::4096] = b'1' * len(x[::4096])\nwhile True: sum(range(10000))"
    started = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grown!r}]); time.sleep(60)"
    shell = subprocess.Popen(["sh", "-c", f"{sys.executable} -c {json.dumps(started)} & wait"], start_new_session=True)
    try:
        tree = ProcessTree(shell.pid)
        with tree.watched():
            deadline = time.monotonic() + 60
            while (len(tree.pids()) < 2 or tree.peak_bytes < 60e6 or tree.cpu_s() < 0.3) and time.monotonic() < deadline:
                time.sleep(0.05)
        assert len(tree.pids()) == 2  # both below the shell, and not the shell
        assert tree.peak_bytes > 60e6
        before = tree.cpu_s()
        time.sleep(0.5)
        assert tree.cpu_s() > before
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
