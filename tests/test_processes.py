"""Training in several processes: the same losses as in one, one adapter, and nobody left behind."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.line import edgelora, finished_folders, kill, start, write_recipe

TWO = ("--set", "threads=2", "--set", "train.dropout=0", "--set", "train.method=lora", "--set", "train.dtype=fp32")
ONE = ("--set", "threads=1", *TWO[2:])
LONG = (*TWO, "--set", "train.epochs=20", "--set", "train.lr=1e-4", "--set", "train.patience=0")


def workers() -> list[psutil.Process]:
    """Processes that multiprocessing spawned here and that train."""
    found = []
    for process in psutil.process_iter():
        try:
            if "spawn_main" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_checkpoint(out: Path) -> None:
    end = time.monotonic() + 120
    while not list(out.glob(".adapter-*.partial/checkpoints/checkpoint-*/complete")):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_train_what_one_trains(tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    one, two = (edgelora("finetune", "tiny.yaml", "--json", *options, cwd=tmp_path).document for options in (ONE, TWO))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert [point["loss"] for point in two["curve"]] == pytest.approx([point["loss"] for point in one["curve"]], rel=1e-4)
    assert one["steps"] == two["steps"] == 6
    first, second = (load_file(tmp_path / made["adapter"] / "adapter_model.safetensors") for made in (one, two))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        np.testing.assert_allclose(second[name], weight, atol=2e-4, err_msg=name)
    assert workers() == []


def test_a_killed_process_stops_all_and_the_same_command_goes_on(tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    process = start("finetune", "tiny.yaml", *LONG, cwd=tmp_path, said=tmp_path)
    wait_for_checkpoint(tmp_path / "runs" / "tiny")
    workers()[-1].kill()
    process.join(60)
    assert process.exitcode == 3
    assert (tmp_path / "err").read_text().splitlines() == [
        "error: a training process was killed (SIGKILL)",
        "was there enough memory? the same command continues from the last checkpoint",
    ]
    assert workers() == []
    assert finished_folders(tmp_path / "runs" / "tiny") == {}
    made = edgelora("finetune", "tiny.yaml", "--json", *LONG, cwd=tmp_path).document
    assert made["resumed"]
    assert len(made["valid_curve"]) == 20


def test_a_killed_command_leaves_no_process_behind(tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    process = start("finetune", "tiny.yaml", *LONG, cwd=tmp_path, said=tmp_path)
    wait_for_checkpoint(tmp_path / "runs" / "tiny")
    assert len(workers()) == 2
    assert process.pid is not None
    psutil.Process(process.pid).kill()  # the command alone, not its group
    end = time.monotonic() + 20
    while workers():
        assert time.monotonic() < end
        time.sleep(0.05)
    kill(process)


def test_an_error_in_a_process_is_the_command_s_error(tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    done = edgelora("finetune", "tiny.yaml", *TWO, "--set", "train.lr=1e30", cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    head, hint, rest = done.err.split("\n")
    assert head.startswith(("error: the training loss is nan at step ", "error: the valid loss is nan at step "))
    assert (hint, rest) == ("lower train.lr (try a tenth), or use train.dtype bf16 or fp32", "")
    assert workers() == []
