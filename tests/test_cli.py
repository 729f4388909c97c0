"""The command line: instant help, exact errors, exit codes, and a README that tells the truth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests import reference

ROOT = Path(__file__).parent.parent
COMMANDS = list(reference.commands())


def edgelora(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgelora.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom edgelora.cli import main\nsys.argv = ['edgelora', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "allowed = {'edgelora', 'click', 'sitecustomize'}\n"
        "tops = {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(t for t in tops - allowed if not t.startswith(('_', '__'))), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import site, sys; sys.path += {sys.path!r}\n{code}"], capture_output=True, text=True
    )
    assert "Commands:" in done.stdout
    assert done.stderr.strip() == "[]", done.stderr


@pytest.mark.parametrize("options", [("--type", "q4_k_m"), ("--max-size", "1MB")])
def test_a_dry_run_of_a_gguf_export_loads_neither_torch_nor_transformers(tiny_base: Path, options: tuple[str, str]) -> None:
    code = (
        "import sys\nfrom edgelora.cli import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code, sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, "export", tiny_base, "--format", "gguf", *options, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("file: gguf")
    assert done.stdout.endswith("0 []\n"), done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    command = reference.commands()[name]
    assert "Example:  edgelora " + name in (command.help or "").replace("\b\n", "")
    options = {option for p in command.params if isinstance(p, click.Option) for option in p.opts}
    assert {"--json", "--quiet", "--debug"} <= options
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help or parameter.name == "max_new_tokens", (
            f"{name}: {parameter.name} has no help"
        )


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["run", "none.yaml"], 2, "error: cannot read the recipe none.yaml: No such file or directory\n"),
        (["run"], 2, "Missing argument 'RECIPE'"),
        (["rnu"], 2, "No such command 'rnu'"),
        (["export", "none", "--format", "ggfu"], 2, "error: 'ggfu' is not a format\nknown formats: gguf, gguf-lora, onnx, "),
        (["export", "none", "--format", "gguf", "--type", "q4_km"], 2, "error: gguf has no type 'q4_km'; did you mean 'q4_k_m'?\n"),
        (["export", "none", "--format", "gguf"], 3, "error: none has no readable config.json"),
        (["chat", "none.gguf", "--prompt", "x"], 3, "error: model not found: none.gguf\n"),
        (["bench", "none.gguf"], 3, "error: model not found: none.gguf\n"),
        (["bench", "none.gguf", "--prompt-tokens", "a"], 2, "error: --prompt-tokens 'a' are not counts above 0\n"),
        (["predict", "none.gguf", "none.csv", "-o", "out.csv"], 3, "error: data file not found: none.csv\n"),
        (["report", "none"], 3, "error: "),
        (["check", "none"], 3, "error: model not found: none\n"),
        (["check", "none", "--baseline", "b"], 2, "error: there is no baseline at b\n"),
        (["baseline", "update", "none"], 3, "error: model not found: none\n"),
        (["init", "none.csv"], 3, "error: data file not found: none.csv\n"),
        (["merge", "none", "--recipe", "quickstart"], 3, "error: none is not an edgelora artifact"),
    ],
)
def test_errors(tmp_path: Path, arguments: list[str], code: int, text: str) -> None:
    done = edgelora(*arguments, cwd=tmp_path)
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode, done.stdout) == (code, "")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in edgelora("chat", "none.gguf", "--prompt", "x", "--debug", cwd=tmp_path).stderr


def test_init_writes_a_recipe_that_loads(tmp_path: Path, faq: Path) -> None:
    done = edgelora("init", faq, "-o", tmp_path / "sub" / "my.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 16
    from edgelora import recipe as recipes

    recipe = recipes.load(tmp_path / "sub" / "my.yaml")
    assert recipe.file(recipe.data.train).resolve() == faq
    again = edgelora("init", faq, "-o", tmp_path / "sub" / "my.yaml")
    assert (again.returncode, "exists" in again.stderr) == (2, True)


def test_init_sees_labels_and_japanese(tmp_path: Path) -> None:
    file = tmp_path / "ラベル.csv"
    file.write_text("文,分類\n" + "".join(f"{n}番の荷物が届きません,{'配送' if n % 2 else '返品'}\n" for n in range(40)), encoding="utf-8")
    done = edgelora("init", file, "--question", "文", "--answer", "分類", "-o", tmp_path / "r.yaml", "--json")
    assert json.loads(done.stdout)["task"] == "classify"
    text = (tmp_path / "r.yaml").read_text(encoding="utf-8")
    assert "Japanese" in text
    assert "task: classify" in text
    from edgelora import recipe as recipes

    assert recipes.load(tmp_path / "r.yaml").data.question == "文"


def test_doctor_answers_here() -> None:
    done = edgelora("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert all({"name", "ok", "detail", "mend"} == set(row) for row in found.values())
    assert any("optimum" in name for name in found)
