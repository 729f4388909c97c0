"""The bench: rows against their samples, a real child process, and children that crash, hang or refuse."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgelora import bench, machine
from edgelora.bench import child, disturbance, rounds
from edgelora.bench.child import Child, measuring
from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.export import gguf
from edgelora.recipe import Bench
from edgelora.runtime.timing import Timing
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
    *(
        "decode_tok_per_s",
        "peak_rss_bytes",
        "prefill_cpu_s",
        "cpu_s_per_token",
        "size_bytes",
        "bytes_per_token",
        "load_average",
        "bandwidth_gb_per_s",
        "bandwidth_share",
    ),
    *("processor", "turns", "samples_ms", "crowded", "noisy", "noisy_why"),
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

    load_ms, timings, _ = rounds.measure(opened, (2, 7), 4, clock, lambda process: 2 * clock.now)  # type: ignore[arg-type]
    assert load_ms == pytest.approx(500)
    assert [t.ttft_ms for t in timings] == pytest.approx([20, 70])
    assert timings[1].decode_ms == pytest.approx((1, 2, 3, 4))
    assert timings[1].decode_cpu_s == pytest.approx(0.02)
    assert timings[1].prefill_cpu_s == pytest.approx(0.14)
    # the longest prompt once to warm up, then each; a prompt longer than the paragraph repeats it
    assert sessions[0].prompts == [[7, 8, 9, 7, 8, 9, 7], [7, 8], [7, 8, 9, 7, 8, 9, 7]]


def test_measure_lets_the_others_have_their_turn() -> None:
    clock, turns = Clock(), []

    def others() -> None:
        turns.append(clock.now)
        clock.now += 7

    class Slow(Scripted):
        def generate(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> Iterator[int]:
            for n in super().generate(ids, max_new_tokens, stop):
                clock.now += 0.02
                yield n

    _, (timing,), _ = rounds.measure(lambda: Slow(clock), (2,), 5, clock, lambda process: 2 * clock.now, others)  # type: ignore[arg-type, return-value]
    assert timing.ttft_ms == pytest.approx(40)
    assert timing.prefill_cpu_s == pytest.approx(0.08)
    assert timing.decode_ms == pytest.approx((21, 22, 23, 24, 25))
    assert timing.decode_cpu_s == pytest.approx(2 * 0.115)  # what is used between the turns is none of the file's
    # before each of five readings, before the first token is continued, and when 50 ms are over: after three tokens
    opened = 100.5 + 0.02 + 0.02 + 0.021
    assert turns == pytest.approx([*(opened + n * 7.04 for n in range(6)), opened + 6 * 7 + 5 * 0.04 + 0.066])
    turns.clear()
    rounds.measure(lambda: Slow(clock), (30,), 1, clock, lambda process: 0.0, others)  # type: ignore[arg-type, return-value]
    assert len(turns) == 3  # two readings of 320 ms

    class Elsewhere(Slow):
        process_id = os.getppid()

    turns.clear()
    rounds.measure(lambda: Elsewhere(clock), (2,), 5, clock, lambda process: 0.0, others)  # type: ignore[arg-type, return-value]
    assert turns == []


@pytest.mark.parametrize("memory", [1 << 40, 0])
def test_files_are_open_at_once_where_memory_has_room(tiny: Path, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    other = tiny.with_name("other.gguf")
    other.write_bytes(tiny.read_bytes())
    seen: list[tuple[str, bool, Any]] = []
    turn = Child.turn

    def watched(self: Child, request: dict[str, Any]) -> rounds.Round | None:
        done = turn(self, request)
        if "turns" in request:  # warming up is nobody's turn
            seen.append((Path(request["file"]).name, done is not None, request["cores"]))
        return done

    monkeypatch.setattr(Child, "turn", watched)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: memory)
    rows = bench.bench_all([(tiny, "llama.cpp"), (other, "llama.cpp")], SMALL, 1, quiet)
    assert len(rows[0]["samples_ms"]["decode"]) == 18
    assert [name for name, _, _ in seen[:2]] == [tiny.name, other.name]
    finished = [done for _, done, _ in seen]
    assert finished[:2] == [False, False] if memory else finished == [True] * 6
    repeats = [cores for _, done, cores in seen if done]
    assert repeats[::2] == repeats[1::2]  # both on the same


def test_row_is_the_medians_of_its_samples() -> None:
    def one(load: float, ttft: float, decode: tuple[float, ...], rss: int) -> rounds.Round:
        return rounds.Round("v", load, (Timing(10, ttft, decode, 0.2, 0.3),), rss, 50_000_000)

    repeats = [one(5, 40, (10, 20, 30), 3), one(7, 80, (20, 20, 20), 9), one(90, 50, (21, 21, 21), 4)]
    row = bench._row(repeats, 0, 123, 10.0, (), True)
    assert (row["load_ms"], row["ttft_ms"], row["peak_rss_bytes"], row["size_bytes"]) == (7, 50, 9, 123)
    assert row["prefill_tok_per_s"] == pytest.approx(10 / 0.050)
    assert row["decode_tok_per_s"] == pytest.approx(1000 / 20)
    assert row["cpu_s_per_token"] == pytest.approx(0.1)
    assert row["bandwidth_share"] == pytest.approx(50 * 0.05 / 10)  # 50 MB x 50 tok/s of 10 GB/s
    assert row["samples_ms"]["decode"] == [10, 20, 30, 20, 20, 20, 21, 21, 21]
    assert (row["noisy"], row["noisy_why"]) == (False, "")


def test_row_says_what_made_it_noisy() -> None:
    repeats = [rounds.Round("v", 1, (Timing(1, 1, (ms, ms), 0.1, 0.1),), 1, None) for ms in (10.0, 13.0, 10.1)]
    crowded = disturbance.from_outside(CALM, CALM, 10, [2, 3, 2], [], threads=1, cores=2)
    row = bench._row(repeats, 0, 1, 10.0, crowded, True)
    assert row["noisy"]
    assert row["crowded"]
    assert row["noisy_why"] == "other programs ran beside our 1 thread on 2 cores (2 at a time); the repeats' decode medians are 30% apart"
    assert row["bandwidth_share"] is None
    assert disturbance.from_outside(CALM, CALM, 10, [0, 1, 0], [False] * 3, threads=2, cores=2) == []


CALM = disturbance.Snapshot(ticks=1000, stolen=10, heat=3, waited_s=1.0)


@pytest.mark.parametrize(
    ("after", "hot", "words"),
    [
        (disturbance.Snapshot(2000, 70, 3, 1.0), [], "the hypervisor took 6% of the processor's time"),
        (disturbance.Snapshot(2000, 10, 5, 1.0), [], "the processor throttled itself 2 times because of heat"),
        (disturbance.Snapshot(2000, 10, 3, 3.5), [], "a quota stopped us for 2.5 of 10 s"),
        (CALM, [True, False, True], "the kernel held the clock down because of heat"),
        (CALM, [True, False, False], None),
        (disturbance.Snapshot(2000, 25, 3, 1.1), [], None),
    ],
)
def test_what_comes_from_outside(after: disturbance.Snapshot, hot: list[bool], words: str | None) -> None:
    assert disturbance.from_outside(CALM, after, 10.0, [0, 0, 0], hot, 1, 2) == ([words] if words else [])


@pytest.mark.parametrize(
    ("medians", "settled", "words"),
    [
        ([10, 10.1, 10.2, 10.1, 10], True, []),
        ([10, 10.1, 10.5, 11.8, 12.0], True, ["later repeats were 18% slower than the first: heat, or other programs"]),
        ([12, 10, 10, 10, 10], True, ["the repeats' decode medians are 20% apart"]),
        ([10, 10, 10], False, ["the speed did not settle while warming up"]),
    ],
)
def test_what_samples_show(medians: list[float], settled: bool, words: list[str]) -> None:
    assert disturbance.in_samples(medians, settled) == words


def test_kernel_counters_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        ("system/cpu/cpu0/thermal_throttle/core_throttle_count", "4\n"),
        ("system/cpu/cpu1/thermal_throttle/core_throttle_count", "5\n"),
        ("cooling_device0/type", "Processor\n"),
        ("cooling_device0/cur_state", "0\n"),
        ("cooling_device1/type", "cpufreq-cpu0\n"),
        ("cooling_device1/cur_state", "2\n"),
        ("cpu.stat", "nr_throttled 7\nthrottled_usec 2500000\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("_DEVICES", "_THERMAL", "_CGROUPS"):
        monkeypatch.setattr(machine, name, tmp_path)
    assert machine.heat_events() == 9
    assert machine.clock_held_down()
    (tmp_path / "cooling_device1/cur_state").write_text("0")
    assert not machine.clock_held_down()
    assert machine.quota_waits_s() == pytest.approx(2.5)
    before = machine.cpu_ticks()
    assert 0 <= before[1] < before[0]


@pytest.mark.parametrize(
    ("medians", "count", "settled"), [((10, 10.1), 2, True), ((40, 20, 20.5), 3, True), ((1, 2, 4, 8, 16, 32), 5, False)]
)
def test_warm_up_ends_when_two_rounds_agree(medians: tuple[float, ...], count: int, settled: bool) -> None:
    asked: list[float] = []

    def one() -> rounds.Round:
        asked.append(medians[len(asked)])
        return rounds.Round("v", 1, (Timing(1, 1, (asked[-1],), 0, 0),), 1, None)

    assert bench._warm_up(one) is settled
    assert len(asked) == count


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
        assert row["bandwidth_share"] > 0  # a file as small as this one lives in a cache, which may be faster than the memory
        assert 0.5 < row["bandwidth_gb_per_s"] < 2000
        assert "llama.cpp" in row["runtime_version"]
    assert len({row["turns"] for row in rows}) == 1
    turns = [text.split(",")[0] for text in seen if "repeat" in text]
    assert turns == [tiny.name, "other.gguf", "other.gguf", tiny.name, tiny.name, "other.gguf"]


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
    with pytest.raises(EdgeloraError) as caught, measuring("x", ("-c", program), limit) as child:
        child.ask({"threads": 1})
    assert caught.value.message == words


def test_child_is_killed_when_the_bench_is_interrupted() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), measuring("x", ("-c", "import time; time.sleep(60)")) as child:
        raise KeyboardInterrupt
    assert child._process.returncode == -9
    assert time.monotonic() - started < 30


def test_child_prints_do_not_spoil_the_answer() -> None:
    program = "from edgelora.bench import child\nchild.answer = lambda request, others: print('noise') or {'it': 'works'}\nchild.serve()"
    with measuring("x", ("-c", program)) as child:
        assert child.ask({}) == {"it": "works"}


def test_child_waits_in_the_middle_of_a_round() -> None:
    program = "from edgelora.bench import child\nchild.answer = lambda request, others: others() or others() or request\nchild.serve()"
    with measuring("x", ("-c", program)) as child:
        assert [child.ask({"n": n}) for n in range(4)] == [{"waiting": True}, {"waiting": True}, {"n": 0}, {"waiting": True}]
        assert child.turn({"n": 4}) is None


@pytest.mark.parametrize(("used_ms", "sleeps"), [([4, 4, 2, 0], 4), ([0], 1), ([4] * 60, 50)])
def test_child_waits_until_its_threads_sleep(monkeypatch: pytest.MonkeyPatch, used_ms: list[int], sleeps: int) -> None:
    used: list[float] = [0.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        used[0] += used_ms[len(slept)] / 1000
        slept.append(seconds)

    monkeypatch.setattr(child, "time", SimpleNamespace(process_time=lambda: used[0], sleep=sleep))
    child._fall_silent()
    assert len(slept) == sleeps


def test_bandwidth_of_two_threads_is_a_number_of_gigabytes() -> None:
    assert 0.2 < rounds.read_bandwidth(2, n_bytes=16 << 20, passes=2) < 5000


def test_bench_loads_no_runtime_itself() -> None:
    import subprocess

    program = "import sys, edgelora.bench; print([m for m in ('torch', 'numpy', 'llama_cpp', 'onnxruntime') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert found.stdout.strip() == "[]"
