"""What stays here: nothing is sent anywhere, and nothing that ships or is shown tells who made it, where, or from which rows."""

from __future__ import annotations

import getpass
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelora import recipe as recipes
from edgelora.data import split
from tests.line import Line, command, edgelora, watched, without_network, write_recipe


def attempts(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("ATTEMPT")]


def watched_processes(log: Path) -> str:
    return "\n".join(line for line in log.read_text().splitlines() if line.startswith("WATCHED"))


def test_a_run_opens_no_connection(finished: Line) -> None:
    assert attempts(finished.log) == []
    for process in ("-m edgelora.cli run", "-m edgelora.bench", "-m onnxruntime_genai.models.builder"):
        assert process in watched_processes(finished.log)


def test_the_watch_sees_and_stops_a_connection(tiny_base: Path, tmp_path: Path) -> None:
    """A hub id is the one thing that is fetched: the same watch, and the error a user without a network reads."""
    write_recipe(tmp_path, "no-such-organisation/no-such-model")
    env, log = watched(tmp_path / "watch")
    done = command("run", "tiny.yaml", cwd=tmp_path, env={**env, "HF_HOME": str(tmp_path / "hub")})
    assert attempts(log)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error: cannot fetch no-such-organisation/no-such-model from the hub: ")
    assert done.err.endswith("\ncheck the network and the spelling, or name a local folder\n")
    assert "Traceback" not in done.err


def test_other_commands_open_no_connection(finished: Line, tmp_path: Path) -> None:
    env, log = watched(tmp_path / "watch")
    gguf, onnx = finished.one("gguf-*/*.gguf"), finished.one("onnx-*/tiny-int8-onnx")
    for arguments in (
        ("chat", gguf, "--prompt", "Hello", "--max-new-tokens", 2, "--threads", 1),
        ("chat", onnx, "--prompt", "Hello", "--max-new-tokens", 2, "--threads", 1),
        ("predict", onnx, finished.folder / "rows.jsonl", "-o", "p.jsonl", "--max-new-tokens", 2, "--threads", 1),
        ("bench", gguf, onnx, "--threads", 1, "--prompt-tokens", 8, "--repeats", 3),
        ("report", finished.out, "-o", "pages"),
        ("check", finished.out),
    ):
        done = command(*arguments, cwd=tmp_path, env=env)
        assert done.code == 0, done.err
    assert attempts(log) == []
    assert watched_processes(log).count("-m edgelora.cli") == 6


def test_a_run_works_without_any_network(again: Line) -> None:
    if without_network() is None:
        pytest.skip("network namespaces are not allowed here")
    assert again.done.code == 0, again.done.err
    assert attempts(again.log) == []


def spelt(secret: str) -> list[bytes]:
    return [secret.encode(), secret.encode("utf-16-le"), secret.encode("utf-16-be")]


def leaks(files: Iterator[Path], secrets: list[str]) -> list[str]:
    found = []
    for file in files:
        content = file.read_bytes()
        found += [f"{file.name}: {secret}" for secret in secrets if any(form in content for form in spelt(secret))]
    return found


def about_here(line: Line) -> list[str]:
    """Names of this machine, its user, and the folders that a run was told of."""
    parts = [platform.node(), str(Path.home()), str(line.folder), str(line.folder.parent), str(Path(__file__).parents[1])]
    user = getpass.getuser()
    # Short or common names stand in any binary file by chance; a home folder or a path never does.
    return [part for part in [*parts, user if len(user) > 4 else f"/{user}/"] if len(part) > 4]


@pytest.mark.parametrize("task", ["finished", "classified"])
def test_results_tell_nothing_of_this_machine(request: pytest.FixtureRequest, task: str) -> None:
    line: Line = request.getfixturevalue(task)
    assert "/tiny-llama" in line.recipe.read_text()  # an absolute path was there to leak
    assert leaks((p for p in line.out.rglob("*") if p.is_file()), about_here(line)) == []


@pytest.mark.parametrize("task", ["finished", "classified"])
def test_results_hold_no_training_row(request: pytest.FixtureRequest, task: str) -> None:
    line: Line = request.getfixturevalue(task)
    train = split.load(recipes.load(line.recipe)).train
    assert len(train) >= 6
    secrets = [row.question for row in train] + [row.answer for row in train if task == "finished"]  # labels are no secret
    assert leaks((p for p in line.out.rglob("*") if p.is_file()), secrets) == []
    assert leaks(iter([line.folder / "rows.jsonl"]), secrets)  # the search itself finds what is there


def test_absolute_paths_of_a_recipe_stay_here(finished: Line, tmp_path: Path) -> None:
    """--out, data files and a base outside the recipe's folder: in the report only their names."""
    recipe = write_recipe(tmp_path / "deep" / "down", finished.recipe.parent / "runs" / "tiny" / finished.one("model-*").name)
    for name in ("valid", "extra"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "{name}?", "answer": "{name}!"}}\n')
    sets = ("--set", f"data.valid={tmp_path / 'valid.jsonl'}", "--set", "data.held_out.extra=../../extra.jsonl")
    out = tmp_path / "far" / "out"
    done = edgelora("run", recipe, *sets, "--set", "exports=[{format: gguf, type: f16}]", "--out", out, "--json", cwd=tmp_path)
    settings = done.document["recipe"]
    assert settings["base"] == finished.one("model-*").name
    assert settings["out"] == "out"
    assert (settings["data"]["train"], settings["data"]["valid"], settings["data"]["held_out"]) == (
        "rows.jsonl",
        "valid.jsonl",
        {"extra": "extra.jsonl"},
    )
    assert leaks((p for p in out.rglob("*") if p.is_file()), [str(tmp_path), str(finished.folder)]) == []
