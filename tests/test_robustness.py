"""What goes wrong: killed commands, full disks, damaged and mistaken inputs. Nothing finished is lost, and one line says why."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgelora import artifact, models, report
from edgelora.train.finetune import _last_checkpoint
from edgelora.train.loop import mark_complete
from tests.line import WORDS, Done, Line, damaged, edgelora, finished_folders, kill, start, write_recipe
from tests.test_weights import adapter_for
from tests.tiny_models import tiny_model

# Where to kill: (the stage that is being made, seconds at most after it began). The ONNX builder is the slow one.
MOMENTS = (
    ("adapter", 0.3),
    ("adapter", 1.0),
    ("model", 0.3),
    ("base-gguf-q8_0", 0.05),
    ("gguf-q8_0", 0.05),
    ("base-onnx-int8", 4.0),
    ("base-onnx-int8", 4.0),
    ("onnx-int8", 4.0),
    ("evaluation", 0.5),
    ("bench", 0.5),
)


def wait_for(happened: Callable[[], object], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


def still_running(out: Path) -> list[str]:
    """Command lines of processes that work below `out`."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if f"{out}/" in line and process.status() != psutil.STATUS_ZOMBIE:
                found.append(line)
        except psutil.Error:
            continue
    return found


def test_killed_ten_times_a_run_loses_nothing(finished: Line, tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    out, kept, chance = tmp_path / "runs" / "tiny", {}, random.Random(7)
    for stage, longest in MOMENTS:
        process = start("run", "tiny.yaml", cwd=tmp_path, said=tmp_path)
        wait_for(lambda stage=stage: list(out.glob(f".{stage}-*.partial")) or list(out.glob(f"{stage}-*")))  # type: ignore[misc]
        time.sleep(chance.uniform(0, longest))
        assert process.exitcode is None, (tmp_path / "err").read_text()
        kill(process)
        now = finished_folders(out)
        assert kept.items() <= now.items()
        assert damaged(out) == []
        kept = now
        wait_for(lambda: not still_running(out))
    assert len(kept) >= 6
    document = edgelora("run", "tiny.yaml", "--json", cwd=tmp_path).document
    assert kept.items() <= finished_folders(out).items()
    assert damaged(out) == []
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == [".lock"]
    assert sorted(finished_folders(out)) == sorted(finished_folders(finished.out))
    assert report.read(out) == document
    whole = report.read(finished.out)
    assert [row["sha256"] for row in document["files"] if "sha256" in row] == [row["sha256"] for row in whole["files"] if "sha256" in row]
    assert document["losses"] == whole["losses"]


def test_nobody_goes_on_writing_for_a_killed_command(finished: Line, tmp_path: Path) -> None:
    """Else it would write into the folder that the same command, run again, is about to use."""
    line = ("export", finished.one("model-*"), "--format", "onnx", "--type", "int8", "--threads", 1, "--out", tmp_path / "made")
    process = start(*line, cwd=tmp_path, said=tmp_path)
    try:
        wait_for(lambda: any("onnxruntime_genai.models.builder" in line for line in still_running(tmp_path / "made")))
        time.sleep(0.3)
        kill(process)
        wait_for(lambda: not still_running(tmp_path / "made"), 1)
    finally:
        wait_for(lambda: not still_running(tmp_path / "made"))


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    options = ("finetune", "tiny.yaml", "--set", "train.epochs=8", "--set", "train.patience=0", "--json")
    whole = edgelora(*options, "--out", "whole", cwd=tmp_path).document
    chance, out = random.Random(3), tmp_path / "killed"
    for count in (1, 3, 5):  # after so many epochs
        process = start(*options, "--out", "killed", cwd=tmp_path, said=tmp_path)
        steps = count * whole["steps"] // 8
        wait_for(lambda steps=steps: list(out.glob(f".adapter-*.partial/checkpoints/checkpoint-{steps}/complete")))  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.1))
        kill(process)
    resumed = edgelora(*options, "--out", "killed", cwd=tmp_path).document
    assert (whole["resumed"], resumed["resumed"]) == (False, True)
    assert "seconds" not in resumed["measured"]  # a part of the time is not the time
    for curve in ("curve", "valid_curve"):
        assert [point["step"] for point in resumed[curve]] == [point["step"] for point in whole[curve]]
        assert [point["loss"] for point in resumed[curve]] == pytest.approx([point["loss"] for point in whole[curve]], abs=1e-5)
    adapters = [(tmp_path / made["adapter"] / "adapter_model.safetensors").read_bytes() for made in (whole, resumed)]
    assert adapters[0] == adapters[1]


@pytest.fixture(scope="module")
def slow_to_write(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter of it whose IQ4_XS file takes about a second to quantize."""
    folder = tmp_path_factory.mktemp("slow")
    base = tiny_model("llama", folder / "base", hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 0.1  # the head too: calm enough to stand that type
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    made = artifact.build(
        folder, "adapter", "adapter", lambda place: {"method": "qlora", "files": adapter_for(base, place).name},
        made_from={"base": models.open_base(str(base), Path(), folder).key}, recipe={}, versions={},
    )  # fmt: skip
    return base, made.path


# A file that shows where an export is, and how long after it came the kill is due (seconds at most).
EXPORT_MOMENTS = {
    ".scratch/nf4/.*.partial": 0.2,  # writing the first merge
    ".scratch/16bit/.*.partial": 0.2,  # and the second
    ".scratch/16bit/*.gguf": 0.05,  # measuring both
    "*.gguf": 0.1,  # verifying the one that is kept
}


def test_a_killed_export_leaves_no_file(slow_to_write: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = slow_to_write
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"part {i} " * 20, "answer": f"a {WORDS[i % 16]}"}) + "\n" for i in range(32)))
    line = ("export", base, "--adapter", adapter, "--format", "gguf", "--type", "iq4_xs", "--rows", rows, "--threads", 1, "--out", "made")
    chance = random.Random(7)
    for pattern, longest in EXPORT_MOMENTS.items():
        process = start(*line, cwd=tmp_path, said=tmp_path)
        wait_for(lambda pattern=pattern: list(tmp_path.glob(f"made/.gguf-*.partial/{pattern}")))  # type: ignore[misc]
        time.sleep(chance.uniform(0, longest))
        assert process.exitcode is None, (tmp_path / "err").read_text()
        kill(process)
        assert finished_folders(tmp_path / "made") == {}
    file = tmp_path / edgelora(*line, "--json", cwd=tmp_path).document["path"]
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [".lock", file.parent.name]
    assert damaged(tmp_path / "made") == []


def test_only_whole_checkpoints_are_used(tmp_path: Path) -> None:
    for step in (4, 8, 12, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("optimizer.pt", "trainer_state.json"):
            (tmp_path / f"checkpoint-{step}" / name).touch()
        if step != 100:  # killed before the mark
            mark_complete(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-12" / "optimizer.pt").unlink()  # killed while it was being deleted
    assert _last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]


class Disk:
    """A file system in memory, as large as a test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, options: str) -> bool:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)], capture_output=True).returncode == 0

    def leave(self, n_bytes: int) -> None:
        """Make the disk so large that `n_bytes` are free."""
        used = shutil.disk_usage(self.folder).used
        assert self.mount(f"remount,size={used + n_bytes}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    made = Disk(tmp_path / "disk")
    if os.geteuid() != 0 or not made.mount("size=64k"):
        pytest.skip("mounting a small file system needs root")
    yield made
    subprocess.run(["umount", "--lazy", str(made.folder)], check=True)


FULL = Done(
    3,
    "",
    "error: no space left on the disk of disk/out\nfree some space or choose another --out, then run the same command again: finished stages are kept\n",
)


def test_a_full_disk_stops_every_stage_cleanly(disk: Disk, tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    out = disk.folder / "out"
    adapted = ("export", tiny_base, "--adapter", "disk/out/{adapter}", "--format", "gguf", "--rows", "rows.jsonl", "--threads", 1)
    stages: list[tuple[int, tuple[object, ...]]] = [
        (64 << 10, ("finetune", "tiny.yaml", "--out", "disk/out")),
        (100 << 10, ("merge", "disk/out/{adapter}", "--recipe", "tiny.yaml")),
        (64 << 10, ("export", "disk/out/{model}", "--format", "gguf", "--type", "q8_0", "--threads", 1)),
        (64 << 10, (*adapted, "--type", "q8_0")),  # full while the first of two files is written
        (200 << 10, (*adapted, "--type", "q8_0", "--name", "other")),  # the second
        (200 << 10, ("export", "disk/out/{model}", "--format", "onnx", "--type", "int8", "--threads", 1)),
    ]
    for room, line in stages:
        kept = finished_folders(out) if out.exists() else {}
        names = {name.partition("-")[0]: name for name in kept}
        arguments = [str(part).format(**names) for part in line]
        disk.leave(room)
        done = edgelora(*arguments, cwd=tmp_path)
        assert done == Done(3, "", FULL.err.replace("disk/out", str(out)) if line[0] == "export" else FULL.err)
        assert finished_folders(out) == kept
        disk.leave(32 << 20)
        done = edgelora(*arguments, cwd=tmp_path)
        assert done.code == 0, done.err
        assert kept.items() < finished_folders(out).items()
    assert damaged(out) == []


def test_a_full_disk_in_the_middle_of_a_run(disk: Disk, tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    out = disk.folder / "out"
    command = ("run", "tiny.yaml", "--out", "disk/out")
    disk.leave(300 << 10)  # said before anything is trained
    done = edgelora(*command, cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith(
        "error: the run writes about 985.6 kB (an estimate), 307.2 kB are free\nfree some space, or choose another --out\n"
    )
    assert finished_folders(out) == {}
    disk.leave(1 << 20)  # enough by the estimate, which knows nothing of the builder's scratch files
    assert edgelora(*command, cwd=tmp_path) == FULL
    kept = finished_folders(out)
    assert any(name.startswith("gguf") for name in kept)
    disk.leave(32 << 20)
    assert edgelora(*command, cwd=tmp_path).code == 0
    assert kept.items() < finished_folders(out).items()
    assert damaged(out) == []


def test_a_gguf_base_works_from_end_to_end(finished: Line, tmp_path: Path) -> None:
    shutil.copy(finished.one("gguf-*/*.gguf"), tmp_path / "born.gguf")
    write_recipe(tmp_path, "born.gguf")
    only = ("--set", "exports=[{format: gguf, type: f16}]", "--set", "merge.base=nf4")  # the other merge is another model
    plan = edgelora("run", "tiny.yaml", *only, "--dry-run", "--json", cwd=tmp_path).document
    before = finished_folders(tmp_path / "runs" / "tiny")
    assert [name.partition("-")[0] for name in before] == ["base"]
    document = edgelora("run", "tiny.yaml", *only, "--json", cwd=tmp_path).document
    assert before.items() < finished_folders(tmp_path / "runs" / "tiny").items()
    assert document["training"]["total_parameters"] == plan["total_parameters"]
    (file,) = document["files"]
    assert file["kl"] < 1e-2
    assert "The base was a quantized GGUF file; 'the model it was made from' is that file written out in 16 bits." in document["notes"]
    assert damaged(tmp_path / "runs" / "tiny") == []


def _rows(text: str | bytes) -> Callable[[Path, Line], None]:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder, line: (folder / "rows.jsonl").write_bytes(content) and None


def _recipe(old: str, new: str) -> Callable[[Path, Line], None]:
    def change(folder: Path, line: Line) -> None:
        file = folder / "tiny.yaml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return change


def _base(name: str) -> Callable[[Path, Line], None]:
    def change(folder: Path, line: Line) -> None:
        base = folder / "my-base"
        shutil.copytree(folder.parent / "base", base)
        weights = base / "model.safetensors"
        if name == "pickle":
            torch.save(load_file(weights), base / "pytorch_model.bin")
            weights.unlink()
        elif name == "nan":
            tensors = load_file(weights)
            tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
            save_file(tensors, weights, metadata={"format": "pt"})
        elif name == "foreign":
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "vocab_size": config["vocab_size"]}))
        elif name == "short":
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif name == "adapter":
            shutil.rmtree(base)
            shutil.copytree(line.one("adapter-*"), base)
        elif name == "gguf":
            data = line.one("gguf-*/*.gguf").read_bytes()
            (folder / "cut.gguf").write_bytes(data[: len(data) // 2])
        _recipe("base: ../base", "base: cut.gguf" if name == "gguf" else "base: my-base")(folder, line)

    return change


MISTAKES: dict[str, tuple[Callable[[Path, Line], None], int, str]] = {
    "no data": (
        _recipe("rows.jsonl", "rowz.jsonl"),
        3,
        "error: data file not found: rowz.jsonl\ncheck `data:` in the recipe; paths are relative to the recipe\n",
    ),
    "no rows": (_rows(""), 3, "error: rows.jsonl holds no rows\n"),
    "one row": (_rows('{"question": "a", "answer": "b"}'), 3, "error: rows.jsonl has 1 usable row; fine-tuning needs at least 4\n"),
    "encoding": (
        _rows(b'{"question": "a", "answer": "\xff\x81\x8d"}'),
        3,
        "error: rows.jsonl line 1: byte 0xff is not utf-8, and no other encoding fits the file\nset data.encoding, for instance cp932 ",
    ),
    "no json": (_rows('{"question": "a"\n'), 3, "error: rows.jsonl line 1: not JSON"),
    "wrong columns": (
        _rows('{"frage": "a", "antwort": "b"}\n'),
        3,
        "error: rows.jsonl: no column looks like the question\nits columns: frage, antwort; set data.question\n",
    ),
    "misspelt key": (
        _recipe("epochs: 3", "epoch: 3"),
        2,
        "error: tiny.yaml has 1 problem:\n  train.epoch: unknown key; did you mean 'epochs'?\nmend each line above and run again\n",
    ),
    "unknown type": (_recipe("type: int8", "type: int88"), 2, "error: onnx has no type 'int88'; did you mean 'int8'?\nits types: "),
    "unknown format": (
        _recipe("format: onnx", "format: onx"),
        2,
        "error: 'onx' is not a format\nknown formats: gguf, gguf-lora, onnx, executorch, litert, mnn\n",
    ),
    "unknown budget": (_recipe("size: 5MB", "siz: 5MB"), 2, "error: budgets:\n  siz: not a budget; known: size, "),
    "unknown layer": (
        _recipe("r: 4", "targets: [q_proj, w_proj]"),
        3,
        "error: train.targets: the base has no w_proj\nits linear layers: down_proj, ",
    ),
    "long rows": (
        _recipe("max_tokens: 128", "max_tokens: 8"),
        3,
        "error: nearly every row is longer than train.max_tokens = 8\nraise train.max_tokens\n",
    ),
    "no base": (
        _recipe("../base", "basse"),
        3,
        "error: base 'basse' is neither a file, a folder nor a hub id\nwrite a path, package:NAME/FILE.gguf or org/name@revision\n",
    ),
    "pickled base": (
        _base("pickle"),
        3,
        "error: my-base holds only pytorch_model.bin, which can run code when it is read\nsave the model as safetensors\n",
    ),
    "base with NaN": (_base("nan"), 3, "error: my-base: model.layers.1.mlp.up_proj.weight holds values that are no numbers\n"),
    "base cut short": (_base("short"), 3, "error: my-base/model.safetensors is damaged: "),
    "unknown architecture": (_base("foreign"), 3, "error: GGUF export does not know the architecture 'gpt2'\nknown: llama, "),
    "adapter as base": (
        _base("adapter"),
        3,
        "error: my-base is a LoRA adapter, not a model\nexport its base with --adapter, or merge the two first: edgelora merge\n",
    ),
    "GGUF cut short": (_base("gguf"), 3, "was it cut short?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(finished: Line, tiny_base: Path, tmp_path: Path, mistake: str) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    folder = tmp_path / "here"
    write_recipe(folder, "../base")
    make, code, text = MISTAKES[mistake]
    make(folder, finished)
    done = edgelora("run", "tiny.yaml", cwd=folder)
    assert text in done.err
    assert (done.code, done.out, "Traceback" in done.err) == (code, "", False)
    assert done.err.startswith("error: ")
    assert 2 <= done.err.count("\n") <= 3
    assert str(tmp_path) not in done.err
    out = folder / "runs" / "tiny"
    assert not out.exists() or finished_folders(out) == {}


def test_a_damaged_adapter_is_not_merged(finished: Line, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder, ignore=shutil.ignore_patterns("model-*"))
    (adapter,) = (folder / "runs" / "tiny").glob("adapter-*")
    weights = adapter / "adapter_model.safetensors"
    data = weights.read_bytes()
    before = finished_folders(folder / "runs" / "tiny")
    for wrong in (data[:-100], bytes([data[0] ^ 0xFF]) + data[1:], data[:-1] + bytes([data[-1] ^ 1])):
        weights.write_bytes(wrong)
        done = edgelora("merge", adapter.relative_to(folder), "--recipe", "tiny.yaml", cwd=folder)
        assert done == Done(
            3,
            "",
            f"error: {adapter.name}/adapter_model.safetensors is damaged: it is not the file that was written\nremove the folder and train again\n",
        )
    done = edgelora("run", "tiny.yaml", cwd=folder)
    assert done.err.startswith(f"error: {adapter.name}")
    assert done.code == 3
    weights.unlink()
    done = edgelora("merge", adapter.relative_to(folder), "--recipe", "tiny.yaml", cwd=folder)
    assert done == Done(3, "", f"error: {adapter.name} lacks adapter_model.safetensors\nremove the folder and train again\n")
    assert finished_folders(folder / "runs" / "tiny").keys() == before.keys()


def test_commands_say_what_they_were_given_instead(finished: Line, tmp_path: Path) -> None:
    adapter, model, gguf = finished.one("adapter-*"), finished.one("model-*"), finished.one("gguf-*/*.gguf")
    export = edgelora("export", adapter, "--format", "gguf", cwd=tmp_path)
    assert export == Done(
        3,
        "",
        f"error: {adapter.name} is a LoRA adapter, not a model\nexport its base with --adapter, or merge the two first: edgelora merge\n",
    )
    merge = edgelora("merge", model, "--recipe", finished.recipe, cwd=tmp_path)
    assert merge == Done(2, "", f"error: {model}: expected an artifact of kind adapter, found model\nname a folder adapter-...\n")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:-5000])
    for command in (("chat", cut, "--prompt", "x"), ("bench", cut), ("eval", cut, finished.folder / "rows.jsonl")):
        done = edgelora(*command, cwd=tmp_path)
        assert (done.code, done.out) == (3, "")
        assert "was it cut short?" in done.err
        assert "Traceback" not in done.err
    done = edgelora("chat", gguf, cwd=tmp_path, stdin="質問です\n".encode("cp932"))
    assert done == Done(3, "", "error: the input is not utf-8 text\nconvert the piped file, or set the locale it was written in\n")
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"question": "word " * 400, "answer": "x"}) + "\n")
    done = edgelora("predict", gguf, rows, "-o", "p.csv", cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    assert "do not fit the model's context of 256" in done.err
    assert not (tmp_path / "p.csv").exists()


def test_two_runs_do_not_share_a_folder(finished: Line, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder)
    with artifact.locked(folder / "runs" / "tiny"):
        done = edgelora("run", "tiny.yaml", cwd=folder)
    assert done == Done(3, "", "error: another edgelora command is writing into runs/tiny\nwait for it, or choose another --out\n")
