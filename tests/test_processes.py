"""Training in several processes (two here, on the CPU through gloo): what one would train, stopped together, continued by any number."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.numpy import load_file

from edgelora import processes
from edgelora.errors import EdgeloraError, Unsupported
from edgelora.train import shards
from tests.line import ROOT, Done, command, edgelora, start, write_recipe
from tests.test_robustness import wait_for

# Three updates of four rows an epoch, the last of fewer; rows of unequal length; no dropout, whose chances are a process's own.
OPTIONS = ("--set=train.batch=2", "--set=train.accumulate=2", "--set=train.dropout=0", "--set=train.patience=0", "--json")
LAUNCH = ("--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0")


def launched(folder: Path, *arguments: str) -> Done:
    """`edgelora finetune` in two processes, as accelerate's own command starts them."""
    line = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "-m", "edgelora.cli", "finetune", "tiny.yaml", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 51 updates, on answers of unequal length."""
    made = tmp_path_factory.mktemp("processes")
    recipe = write_recipe(made, tiny_base)
    rows = [json.loads(line) for line in (made / "rows.jsonl").read_text().splitlines()]
    rows += [{"question": f"What is part {n} for?", "answer": "For nothing."} for n in range(1)]  # 9 to train on
    for number, row in enumerate(rows):
        row["answer"] += " Ask again." * (number % 4)
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(recipe.read_text().replace("epochs: 3", "epochs: 17"))
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> Any:
    return edgelora("finetune", "tiny.yaml", *OPTIONS, "--out", "one", cwd=folder).document


def assert_same(found: Any, expected: Any, folder: Path) -> None:
    """The same curves, and an adapter of the same name, the same files and the same weights."""
    for curve in ("curve", "valid_curve"):
        assert [point["step"] for point in found[curve]] == [point["step"] for point in expected[curve]]
        assert [point["loss"] for point in found[curve]] == pytest.approx([point["loss"] for point in expected[curve]], abs=1e-5)
    paths = [folder / made["adapter"] for made in (found, expected)]
    assert paths[0].name == paths[1].name
    assert sorted(p.name for p in paths[0].iterdir()) == sorted(p.name for p in paths[1].iterdir())
    weights = [load_file(path / "adapter_model.safetensors") for path in paths]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[1].items():
        assert weights[0][name] == pytest.approx(weight, abs=1e-4), name


@pytest.mark.slow
def test_two_processes_train_what_one_trains(folder: Path, one: Any) -> None:
    assert len(one["curve"]) == one["steps"] == 51
    done = launched(folder, *OPTIONS, "--out", "two")
    made = done.document
    assert (one["processes"], made["processes"]) == (1, 2)
    assert_same(made, one, folder)


@pytest.mark.slow
def test_a_divided_base_trains_the_same(folder: Path, one: Any) -> None:
    made = launched(folder, *OPTIONS, "--set=train.shard=always", "--out", "divided").document
    assert made["divided"] == {"whole_bytes": 46_080, "held_bytes": 23_040}  # half a byte a weight of the linear layers
    assert made["notes"] == ["the base is divided among 2 processes (FSDP): train.shard: always"]
    assert_same(made, one, folder)


def test_a_part_that_is_the_whole_is_an_error() -> None:
    said = "46,080 bytes of frozen weights were divided among 1 processes, 23,040 for each, but they hold 46,080"
    with pytest.raises(EdgeloraError, match=said):
        shards.check(shards.Shards(46_080, 46_080), 23_040)
    with pytest.raises(EdgeloraError, match="but they hold 23,040"):
        shards.check(shards.Shards(46_080, 23_040), 23_040)


@pytest.mark.parametrize("changed", [False, True])
def test_a_divided_base_that_comes_back_changed_is_an_error(changed: bool) -> None:
    """On a GPU copies of bfloat16 once turned bytes 0x7f81 into 0x7fff, as both are no number."""
    layer = torch.nn.Sequential(torch.nn.Linear(256, 2, bias=False)).requires_grad_(False)
    layer[0].weight.data.view(torch.int16)[1, 3] = 0x7F81
    shards.watch(layer)
    if not changed:
        layer(torch.ones(256))
    layer[0].weight.data.view(torch.int16)[1, 3] = 0x7FFF
    with contextlib.nullcontext() if not changed else pytest.raises(EdgeloraError, match="the weight of a Linear came back changed"):
        layer(torch.ones(256))  # only the first time is looked at


def workers(command: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(command).children() if "edgelora.cli" in child.cmdline()]


@pytest.mark.slow
def test_one_that_is_killed_stops_all_and_any_number_goes_on(folder: Path, one: Any, tmp_path: Path) -> None:
    """First one of two that hold the base together is killed, then what started two that hold it each; then a single process goes on."""
    out = folder / "killed"
    line = ("finetune", "tiny.yaml", *OPTIONS, "--out", "killed", "--gpus", 2)
    for epochs, launcher, shard in ((4, False, "always"), (8, True, "never")):
        going = start(*line, f"--set=train.shard={shard}", cwd=folder, said=tmp_path, gpus=2)
        assert going.pid is not None
        wait_for(lambda epochs=epochs: list(out.glob(f".adapter-*.partial/checkpoints/checkpoint-{3 * epochs}/complete")))  # type: ignore[misc]
        working = workers(going.pid)
        assert len(working) == 2
        os.kill(going.pid if launcher else working[1].pid, signal.SIGKILL)
        going.join(30)
        psutil.wait_procs(working, 5)
        assert not any(process.is_running() for process in working)
        said = (tmp_path / "err").read_text()
        if not launcher:
            assert going.exitcode == 3
            assert said == (
                "error: process 2 of 2 was killed (SIGKILL); the others were stopped\n"
                "run the same command again, with any number of GPUs: it continues from the last checkpoint\n"
            )
    resumed = edgelora("finetune", "tiny.yaml", *OPTIONS, "--out", "killed", cwd=folder).document
    assert (resumed["processes"], resumed["resumed"]) == (1, True)
    assert_same(resumed, one, folder)


@pytest.mark.slow
def test_what_goes_wrong_in_all_is_said_once(folder: Path, tmp_path: Path) -> None:
    going = start("finetune", "tiny.yaml", *OPTIONS, "--set=train.lr=1e30", "--out", "nan", "--gpus", 2, cwd=folder, said=tmp_path, gpus=2)
    going.join(120)
    assert going.exitcode == 3
    assert (tmp_path / "out").read_text() == ""
    first, hint = (tmp_path / "err").read_text().splitlines()
    assert first.startswith(("error: the training loss is nan at step ", "error: the valid loss is nan at step "))
    assert hint == "lower train.lr (try a tenth), or use train.dtype bf16 or fp32"


def test_as_many_gpus_as_there_are(folder: Path) -> None:
    for name in ("finetune", "run"):
        done = edgelora(name, "tiny.yaml", "--gpus", 64, cwd=folder)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: --gpus 64: this machine has ")


def test_what_divides_the_model_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Unsupported, match="training under FSDP: edgelora divides the base itself"), processes.joined():
        pass


def test_only_training_is_work_for_several(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    done = command("run", "tiny.yaml", cwd=folder)
    assert (done.code, done.out, done.err) == (2, "", "error: run is no work for several processes\nstart it without accelerate launch\n")
