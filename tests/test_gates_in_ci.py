"""Gates where teams have them: in their own pytest suite, in a GitHub workflow, in an environment without torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.line import ROOT
from tests.test_check import document

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    from edgelora.export import gguf

    folder = tmp_path_factory.mktemp("gates")
    return {kind: gguf.write(tiny_base, kind, folder, "bot", lambda share, text: None) for kind in ("q8_0", "f16")}


# ---- pytest ----

SUITE = """
import pytest

@pytest.mark.edgelora_budget("bot.gguf", size=["10MB", "+1%"])
def test_marked():
    pass

@pytest.mark.parametrize("n", range(4))
def test_by_fixture(edgelora_budget, n):
    edgelora_budget("bot.gguf", size="+1%")
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """pytest in a process of its own; the plugin is named where the installed package is older than its entry point."""
    known = any(point.value == "edgelora.pytest_plugin" for point in metadata.entry_points(group="pytest11"))
    return pytester.runpytest_subprocess(*([] if known else ["-p", "edgelora.pytest_plugin"]), "-p", "no:cacheprovider", *arguments)


def test_the_package_brings_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"edgelora": "edgelora.pytest_plugin"}


@pytest.mark.parametrize("processes", [(), ("-n", "2")])
def test_a_suite_turns_red_and_says_what_grew(pytester: pytest.Pytester, files: dict[str, Path], processes: tuple[str, ...]) -> None:
    pytester.makepyfile(SUITE)
    pytester.makeini("[pytest]\naddopts = --strict-markers\n")
    shutil.copy(files["q8_0"], pytester.path / "bot.gguf")
    first = run(pytester, *processes)
    first.assert_outcomes(passed=5)
    first.stdout.fnmatch_lines(["*BudgetWarning: size of bot.gguf against the baseline: * there is no baseline*"])
    subprocess.run(
        [sys.executable, "-m", "edgelora.cli", "baseline", "update", "bot.gguf"], cwd=pytester.path, check=True, capture_output=True
    )
    shutil.copy(files["f16"], pytester.path / "bot.gguf")
    red = run(pytester, *processes)
    red.assert_outcomes(failed=5)
    red.stdout.fnmatch_lines(
        ["*1 of 2 budgets broken:*", "*size of bot.gguf against the baseline*", "*limit*+1%*", "*grew: token_embd.weight +*"]
    )
    assert "Traceback" not in red.stdout.str()
    shutil.copy(files["q8_0"], pytester.path / "bot.gguf")
    run(pytester, *processes).assert_outcomes(passed=5)


def test_a_wrong_use_fails_with_a_line(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.edgelora_budget("bot.gguf")
        def test_without_budgets(): pass

        @pytest.mark.edgelora_budget("bot.gguf", size="1MB")
        def test_without_a_file(): pass

        def test_of_nothing(edgelora_budget):
            edgelora_budget("bot.gguf", siz="1MB")
        """
    )
    done = run(pytester)
    done.assert_outcomes(failed=3)
    done.stdout.fnmatch_lines(["*takes one artifact and budgets*", "model not found*"])


# ---- GitHub ----


def steps() -> dict[str, dict[str, Any]]:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    assert action["runs"]["using"] == "composite"
    return {step["name"]: step for step in action["runs"]["steps"] if "run" in step}


def perform(name: str, repository: Path, inputs: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one step of action.yml as a runner does: bash, fail at the first error, inputs through the environment."""
    step = steps()[name]
    defaults = {k: v["default"] for k, v in yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["inputs"].items()}
    values = {**defaults, **inputs}
    own = {k: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: values[m[1]], v) for k, v in step.get("env", {}).items()}
    assert "${{" not in step["run"], "an input pasted into a script can run as one"
    runner = repository.parent / "runner"
    environment = {"PATH": "/usr/bin:/bin", "RUNNER_TEMP": str(runner), "GITHUB_STEP_SUMMARY": str(runner / "summary.md"), **own}
    script = repository.parent / "step.sh"
    script.write_text(step["run"], encoding="utf-8")
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)], cwd=repository, env=environment, capture_output=True, text=True
    )


def test_the_action_is_red_on_a_grown_file_and_green_after_the_fix(tmp_path: Path, files: dict[str, Path]) -> None:
    repository, binary = tmp_path / "repository", tmp_path / "runner" / "edgelora" / "bin" / "edgelora"
    repository.mkdir()
    binary.parent.mkdir(parents=True)
    binary.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m edgelora.cli "$@"\n', encoding="utf-8")
    binary.chmod(0o755)
    shutil.copy(files["q8_0"], repository / "bot.gguf")
    (repository / "budgets.yaml").write_text("size: [10MB, +1%]\n", encoding="utf-8")
    subprocess.run([binary, "baseline", "update", "bot.gguf"], cwd=repository, check=True, capture_output=True)
    inputs = {"artifacts": "bot.gguf", "budgets": "budgets.yaml"}
    assert perform("check", repository, inputs).returncode == 0
    assert perform("install", repository, inputs).returncode == 0  # what the cache brought back is not made again

    shutil.copy(files["f16"], repository / "bot.gguf")
    red = perform("check", repository, inputs)
    assert red.returncode == 1
    assert "::error title=edgelora::size of bot.gguf against the baseline: +" in red.stderr
    assert perform("summary", repository, inputs).returncode == 0
    summary = (tmp_path / "runner" / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("### edgelora: budgets, 1 of 2 broken\n")
    assert re.search(r"\| ✗ \| size of bot\.gguf against the baseline \| \+1% \| \+[\d.]+% .* -> .* \| grew: token_embd\.weight", summary)

    shutil.copy(files["q8_0"], repository / "bot.gguf")
    assert perform("check", repository, inputs).returncode == 0
    hostile = perform("check", repository, {**inputs, "artifacts": "$(touch pwned) bot.gguf;touch pwned *"})
    assert hostile.returncode == 3
    assert not (repository / "pwned").exists()


def test_the_action_runs_a_recipe(tmp_path: Path, tiny_recipe: Path) -> None:
    binary = tmp_path / "runner" / "edgelora" / "bin" / "edgelora"
    binary.parent.mkdir(parents=True)
    binary.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m edgelora.cli "$@"\n', encoding="utf-8")
    binary.chmod(0o755)
    repository = tmp_path / "repository"
    shutil.copytree(tiny_recipe.parent, repository, ignore=shutil.ignore_patterns("runner", "repository"))
    inputs = {"recipe": tiny_recipe.name}
    done = perform("run", repository, inputs)
    assert done.returncode == 0, done.stderr
    checked = perform("check", repository, inputs)
    assert checked.returncode == 0, checked.stderr
    assert "size of " in checked.stdout


# ---- without torch ----


def test_gates_run_with_click_and_pyyaml_alone(tmp_path: Path, files: dict[str, Path]) -> None:
    """What `pip install --no-deps edgelora` + click + pyyaml leaves: check, size, baseline and report work."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(
        subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True).stdout.strip()
    )
    shutil.copytree(ROOT / "edgelora", site / "edgelora", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("click", "pyyaml"):
        for file in metadata.files(package) or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), target)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text(json.dumps(document()), encoding="utf-8")

    def edgelora(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([python, "-I", "-m", "edgelora.cli", *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert "Traceback" not in done.stderr
        return done

    assert subprocess.run([python, "-I", "-c", "import torch"], capture_output=True).returncode == 1
    assert edgelora("baseline", "update", "run").returncode == 0
    assert edgelora("check", "run", "--budget", "size=+1%", "--budget", "decode=-5%").returncode == 0
    assert edgelora("check", "run", "--budget", "kl=0.01").returncode == 1
    assert "attention" in edgelora("size", str(files["q8_0"])).stdout
    assert edgelora("report", "run").returncode == 0
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
