"""Environments of their own for what clashes with edgelora: made by one command, pinned, and named when they are missing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgelora import environments
from edgelora.errors import ToolMissing, UsageError
from tests.line import edgelora
from tests.test_onnx_export import quiet
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("name", "options"),
    [("web", ("--type", "int4", "--target", "web")), ("optimum", ("--type", "fp32", "--exporter", "optimum"))],
)
def test_without_the_environment_the_command_that_makes_it(
    name: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nothing"))
    model = tiny_model("llama", tmp_path / "llama")
    done = edgelora("export", model, "--format", "onnx", *options, cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    assert done.err == f"error: the environment {name!r} is not installed\nedgelora doctor --install {name}\n"


def test_an_environment_is_made_once_and_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an installer that only writes down what it was asked for."""
    asked: list[Any] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    assert not environments.installed("optimum")
    with pytest.raises(ToolMissing):
        environments.python("optimum")
    place = environments.install("optimum", quiet)
    assert place == tmp_path / "edgelora" / "optimum"
    assert all("==" in word for command in asked[1:] for word in command[command.index("--disable-pip-version-check") + 1 :])
    environments.install("optimum", quiet)
    assert len(asked) == 3
    assert environments.python("optimum") == place / "bin" / "python"
    stamp = place / "edgelora.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"packages": [["torch==2.0.0"]]}))
    assert not environments.installed("optimum")  # another edgelora made it
    with pytest.raises(UsageError, match="there is no environment 'optimun'"):
        environments.install("optimun", quiet)
