"""Rounding in processes: the same bytes as in this one, several at once, and errors that arrive."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgelora.errors import EdgeloraError, ModelError
from edgelora.quant import compensate, ggml
from edgelora.quant.compensate import Rounding
from edgelora.quant.curvature import Curvature, Moments, save
from edgelora.quant.ggml import Type
from edgelora.quant.workers import Workers

COLUMNS = 256


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random, file = np.random.default_rng(0), tmp_path_factory.mktemp("moments") / "moments.safetensors"
    inputs = (random.standard_normal((500, 16)) @ random.standard_normal((16, COLUMNS))).astype(np.float32)
    none = np.zeros((0, COLUMNS), np.float32)
    save(Curvature({"a": inputs.T @ inputs / 500}, {}, {"a": "a", "b": "a"}, {}, none, none, "a", 500), file)
    return file


def values(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, COLUMNS)).astype(np.float32)


def test_several_threads_get_the_bytes_of_a_single_one(moments: Path) -> None:
    here = Rounding(Moments(moments), True, 0.2)
    wanted = [
        (name, values(40, seed), kind) for seed, (name, kind) in enumerate([("a", Type.Q4_0), ("b", Type.Q6_K), ("a", Type.IQ4_NL)] * 4)
    ]
    with Workers(moments, 0.2, 2) as workers, ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda asked: workers.quantize(*asked), wanted))
        assert len(started(workers)) == 2
    assert all(process.poll() is not None for process in started(workers))
    with Workers(moments, 0.2, 1) as alone:
        assert all(np.array_equal(packed, alone.quantize(*asked)) for asked, packed in zip(wanted, found, strict=True))
    for asked, packed in zip(wanted, found, strict=True):
        close = ggml.dequantize(packed, asked[2]), ggml.dequantize(here.quantize(*asked), asked[2])
        assert (close[0] == close[1]).mean() > 0.99  # sums of other threads end in other digits, and few values lie between two levels


def test_many_rows_go_a_part_at_a_time_and_a_matrix_stays_with_one_worker(moments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Workers(moments, 0.2, 3) as workers:
        whole = workers.quantize("a", values(40, 3), Type.Q5_0)
        monkeypatch.setattr(compensate, "values_at_once", lambda columns: 7 * columns)
        assert np.array_equal(workers.quantize("a", values(40, 3), Type.Q5_0), whole)
        assert len(started(workers)) == 1
        workers.quantize("b", values(4, 3), Type.Q5_0)
        workers.quantize("a", values(4, 3), Type.Q5_0)
        assert len(started(workers)) == 2


def test_a_pool_shares_many_rows_out_until_it_is_stopped(moments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nearest, few = Rounding(Moments(moments), False, 0.2), values(40, 3)
    with ThreadPoolExecutor(3) as pool, Workers(moments, 0.2, 3, pool) as workers:
        wanted = workers.quantize("a", few, Type.Q5_0), nearest.quantize("a", few, Type.Q5_0)
        monkeypatch.setattr(compensate, "values_at_once", lambda columns: 7 * columns)
        shared = Rounding(Moments(moments), False, 0.2, pool)
        assert all(map(np.array_equal, (workers.quantize("a", few, Type.Q5_0), shared.quantize("a", few, Type.Q5_0)), wanted))
        assert len(started(workers)) > 1
        shared.stop()
        with pytest.raises(RuntimeError, match="after shutdown"):
            shared.quantize("a", few, Type.Q5_0)


def test_a_worker_that_cannot_be_started_is_an_error_each_time_and_no_wait(moments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: object, **kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", none_left)
    with Workers(moments, 0.2, 1) as workers:
        for _ in range(2):
            with pytest.raises(EdgeloraError, match="cannot be started: Cannot allocate memory"):
                workers.quantize("a", values(2, 1), Type.Q4_0)


def test_stopping_ends_what_others_wait_for(moments: Path) -> None:
    with Workers(moments, 0.2, 1) as workers, ThreadPoolExecutor(1) as pool:
        workers.quantize("a", values(2, 1), Type.Q4_0)
        started(workers)[0].send_signal(signal.SIGSTOP)  # it answers nobody
        waiting = pool.submit(workers.quantize, "a", values(2, 1), Type.Q4_0)
        time.sleep(0.2)
        workers.stop()
        with pytest.raises(EdgeloraError, match="rounding a ended with status -9"):
            waiting.result(30)


def started(workers: Workers) -> list[subprocess.Popen[bytes]]:
    return [worker._process for worker in workers._workers if worker._process]


def test_a_matrix_without_moments_and_a_type_without_codes_are_rounded_here(moments: Path) -> None:
    with Workers(moments, 0.2, 1) as workers:
        assert np.array_equal(workers.quantize("unknown", values(3, 0), Type.Q4_0), ggml.quantize(values(3, 0), Type.Q4_0))
        assert ggml.dequantize(workers.quantize("a", values(3, 0), Type.F16), Type.F16) == pytest.approx(values(3, 0), abs=1e-2)
        assert not started(workers)


def test_what_does_not_fit_a_type_is_said_and_the_next_one_is_served(moments: Path) -> None:
    with Workers(moments, 0.2, 1) as workers:
        with pytest.raises(ModelError, match=re.escape("do not fit Q4_0")):
            workers.quantize("a", np.full((2, COLUMNS), 1e7, np.float32), Type.Q4_0)
        assert workers.quantize("a", values(2, 1), Type.Q4_0).shape == (2, ggml.row_bytes(Type.Q4_0, COLUMNS))


def test_a_worker_that_died_is_an_error_and_no_wait(moments: Path) -> None:
    with Workers(moments, 0.2, 1) as workers:
        workers.quantize("a", values(2, 1), Type.Q4_0)
        started(workers)[0].kill()
        with pytest.raises(EdgeloraError, match="rounding a ended with status -9"):
            workers.quantize("a", values(2, 1), Type.Q4_0)
