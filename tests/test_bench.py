"""The bench: rows against their samples, a real child process, and children that crash, hang or refuse."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edgelora import bench
from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.export import gguf
from edgelora.recipe import Bench
from tests.tiny_models import tiny_model

KEYS = {
    *(
        "file",
        "runtime",
        "runtime_version",
        "threads",
        "prompt_tokens",
        "decode_tokens",
        "workload",
        "load_ms",
        "ttft_ms",
        "prefill_tok_per_s",
    ),
    *("decode_tok_per_s", "peak_rss_bytes", "cpu_s_per_token", "size_bytes", "load_average", "bandwidth_gb_per_s", "bandwidth_share"),
    *("samples_ms", "crowded", "noisy", "noisy_why"),
}
SMALL = Bench(prompt_tokens=(4, 20), decode_tokens=6, repeats=3)


def quiet(share: float, text: str) -> None:
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    return gguf.write(tiny_model("llama", folder / "hf"), "f16", folder, "tiny", quiet)


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """A session whose reading takes 10 ms a token and whose writing takes 1, 2, 3, ... ms; three ids to a text."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.prompts: list[list[int]] = []
        clock.now += 0.5

    def tokenize(self, text: str) -> list[int]:
        return [7, 8, 9]

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> Iterator[int]:
        self.prompts.append(list(ids))
        self.clock.now += 0.01 * len(ids)
        for n in range(max_new_tokens):
            self.clock.now += 0.001 * n
            yield n

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def test_measure_tells_loading_reading_and_writing_apart() -> None:
    clock = Clock()
    sessions: list[Scripted] = []

    def opened() -> Scripted:
        sessions.append(Scripted(clock))
        return sessions[-1]

    load_ms, timings = bench.measure(opened, (2, 7), 4, clock, lambda: 2 * clock.now)  # type: ignore[arg-type]
    assert load_ms == pytest.approx(500)
    assert [t.ttft_ms for t in timings] == pytest.approx([20, 70])
    assert timings[1].decode_ms == pytest.approx((1, 2, 3, 4))
    assert timings[1].decode_cpu_s == pytest.approx(0.02)
    # the longest prompt once to warm up, then each; a prompt longer than the paragraph repeats it
    assert sessions[0].prompts == [[7, 8, 9, 7, 8, 9, 7], [7, 8], [7, 8, 9, 7, 8, 9, 7]]


def test_row_is_the_medians_of_its_samples() -> None:
    def one(load: float, ttft: float, decode: tuple[float, ...], rss: int) -> bench.Round:
        return bench.Round("v", load, (bench.Timing(10, ttft, decode, 0.3),), rss, 50_000_000)

    rounds = [one(5, 40, (10, 20, 30), 3), one(7, 80, (20, 20, 20), 9), one(90, 50, (21, 21, 21), 4)]
    row = bench._row(rounds, 0, 123, 10.0, "")
    assert (row["load_ms"], row["ttft_ms"], row["peak_rss_bytes"], row["size_bytes"]) == (7, 50, 9, 123)
    assert row["prefill_tok_per_s"] == pytest.approx(10 / 0.050)
    assert row["decode_tok_per_s"] == pytest.approx(1000 / 20)
    assert row["cpu_s_per_token"] == pytest.approx(0.1)
    assert row["bandwidth_share"] == pytest.approx(50 * 0.05 / 10)  # 50 MB x 50 tok/s of 10 GB/s
    assert row["samples_ms"]["decode"] == [10, 20, 30, 20, 20, 20, 21, 21, 21]
    assert (row["noisy"], row["noisy_why"]) == (False, "")


def test_row_says_what_made_it_noisy() -> None:
    rounds = [bench.Round("v", 1, (bench.Timing(1, 1, (ms, ms), 0.1),), 1, None) for ms in (10.0, 10.1, 13.0)]
    row = bench._row(rounds, 0, 1, 10.0, bench._crowded([2, 3, 2], threads=1, cores=2))
    assert row["noisy"]
    assert row["noisy_why"] == "other programs ran beside our 1 threads on 2 cores (2 at a time); the repeats' decode medians are 30% apart"
    assert row["bandwidth_share"] is None
    assert bench._crowded([0, 1, 0], threads=2, cores=2) == ""


@pytest.mark.parametrize(("medians", "rounds"), [((10, 10.1), 2), ((40, 20, 20.5), 3), ((1, 2, 4, 8, 16, 32), 5)])
def test_warm_up_ends_when_two_rounds_agree(medians: tuple[float, ...], rounds: int) -> None:
    left = iter(medians)
    assert bench._warm_up(lambda: bench.Round("v", 1, (bench.Timing(1, 1, (next(left),), 0),), 1, None)) == rounds


def test_two_real_files_side_by_side(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny.read_bytes())
    seen: list[str] = []
    rows = bench.bench_all([(tiny, "llama.cpp"), (other, "llama.cpp")], SMALL, 1, lambda share, text: seen.append(text))
    assert [(r["file"], r["prompt_tokens"]) for r in rows] == [(tiny.name, 4), (tiny.name, 20), ("other.gguf", 4), ("other.gguf", 20)]
    for row in rows:
        assert set(row) == KEYS
        samples = row["samples_ms"]
        assert (len(samples["load"]), len(samples["ttft"]), len(samples["decode"])) == (3, 3, 18)
        assert row["ttft_ms"] == statistics.median(samples["ttft"])
        assert row["decode_tok_per_s"] == pytest.approx(1000 / statistics.median(samples["decode"]))
        assert row["size_bytes"] == tiny.stat().st_size
        assert 10e6 < row["peak_rss_bytes"] < 200e6  # a child without torch, whatever this process holds
        assert 0 < row["bandwidth_share"] < 1
        assert 0.5 < row["bandwidth_gb_per_s"] < 2000
        assert "llama.cpp" in row["runtime_version"]
    turns = [text.split(",")[0] for text in seen if "repeat" in text]
    assert turns == [tiny.name, "other.gguf"] * 3


def test_error_of_the_runtime_arrives_as_itself(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"broken\.gguf is no usable GGUF file"):
        bench.bench(broken, "llama.cpp", SMALL, 1, quiet)
    with pytest.raises(Unsupported, match="306 tokens do not fit the model's context of 256"):
        bench.bench(tiny, "llama.cpp", Bench((300,), 6, 3), 1, quiet)


@pytest.mark.parametrize(
    ("program", "limit", "words"),
    [
        (
            "import os; print('last words', file=__import__('sys').stderr, flush=True); os.abort()",
            60,
            "the bench of x died of signal 6: last words",
        ),
        ("raise ImportError('no such library')", 60, "the bench of x ended with status 1: ImportError: no such library"),
        ("import time; time.sleep(60)", 0.3, "the bench of x took longer than 0 s: it said nothing"),
    ],
)
def test_death_of_a_child_is_reported(program: str, limit: float, words: str) -> None:
    with pytest.raises(EdgeloraError) as caught, bench._child("x", ("-c", program), limit) as child:
        child.ask({"threads": 1})
    assert caught.value.message == words


def test_child_is_killed_when_the_bench_is_interrupted() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), bench._child("x", ("-c", "import time; time.sleep(60)")) as child:
        raise KeyboardInterrupt
    assert child._process.returncode == -9
    assert time.monotonic() - started < 30


def test_child_prints_do_not_spoil_the_answer() -> None:
    program = "from edgelora import bench\nbench._answer = lambda request: print('noise') or {'it': 'works'}\nbench._serve()"
    with bench._child("x", ("-c", program)) as child:
        assert child.ask({}) == {"it": "works"}


def test_bandwidth_of_two_threads_is_a_number_of_gigabytes() -> None:
    assert 0.2 < bench.read_bandwidth(2, n_bytes=16 << 20, passes=2) < 5000


def test_bench_loads_no_runtime_itself() -> None:
    import subprocess

    program = "import sys, edgelora.bench; print([m for m in ('torch', 'numpy', 'llama_cpp', 'onnxruntime') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert found.stdout.strip() == "[]"
