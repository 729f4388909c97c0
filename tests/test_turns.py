"""Files that take turns: what `bench A B` says of them, and `check --against`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgelora import bench, machine, report, speeds
from edgelora.cli import cli
from edgelora.errors import CheckFailed, UsageError
from edgelora.export import gguf
from edgelora.recipe import Bench
from edgelora.report import turns
from tests.tiny_models import tiny_model


def row(file: str, ms: Sequence[float], prompt: int = 32, **changed: Any) -> dict[str, Any]:
    """A row of a bench whose repeats decoded at so many ms a token."""
    samples = {"ttft": [9.0] * len(ms), "decode": [one for one in ms for _ in range(4)]}
    work = {"runtime": "llama.cpp", "threads": 2, "prompt_tokens": prompt, "decode_tokens": 4, "workload": 1}
    figures = {"ttft_ms": 9.0, "decode_tok_per_s": 1000 / ms[len(ms) // 2], "peak_rss_bytes": 1_000_000, "samples_ms": samples}
    return {"file": file, **work, "turns": "1a2b", **figures, **changed}


DRIFTING = [10.0, 10.1, 12.0, 12.1, 10.0, 9.9, 12.0, 12.2, 10.1, 12.0, 10.0, 12.0, 10.1, 12.1, 10.0]
TENTH = [1.1 * ms for ms in DRIFTING]


def test_every_file_is_told_from_the_first_that_did_its_work() -> None:
    rows = [row("a", DRIFTING), row("a", DRIFTING, 128), row("b", TENTH), row("b", DRIFTING[::-1], 128), row("c", TENTH, turns="other")]
    slower, same = turns.compared(rows)
    assert (slower["file"], slower["against"], slower["prompt_tokens"], slower["repeats"]) == ("b", "a", 32, 15)
    assert slower["decode"]["change"] == pytest.approx(1 / 1.1 - 1)
    assert slower["decode"]["word"] == "real"
    assert slower["decode"]["why"].startswith("slower, p = 3.1e-05")
    assert slower["ttft"] == {"change": 0.0, "word": "noise", "why": "within 5%"}
    assert same["prompt_tokens"] == 128
    assert same["decode"]["word"] != "real"
    (faster,) = turns.compared([rows[2], rows[0]])
    assert (faster["decode"]["change"], faster["decode"]["why"][:6]) == (pytest.approx(0.1), "faster")
    assert turns.compared(rows[:2]) == []
    assert "b against a, llama.cpp, 2 threads, prompt 32, 15 repeats in turns: decode speed \u22129.1 % (slower, p = " in turns.sentence(
        slower
    )


def test_two_runtimes_of_one_file_are_told_apart_too() -> None:
    (found,) = turns.compared([row("a", DRIFTING), row("a", TENTH, runtime="wllama")])
    assert turns.against(found) == "a (in llama.cpp)"


# ---- check --against ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """old/bot.gguf and new/bot.gguf, which is larger."""
    root = tmp_path_factory.mktemp("against")
    model = tiny_model("llama", root / "hf")
    for name, kind in (("old", "q8_0"), ("new", "f16")):
        (root / name).mkdir()
        shutil.move(gguf.write(model, kind, root, "tiny", lambda share, text: None), root / name / "bot.gguf")
    return root


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A bench whose second file decodes 10 % faster than the first, whatever it is; what it was asked for."""
    asked: list[Any] = []

    def bench_all(files: Sequence[tuple[Path, str]], settings: Bench, threads: int, progress: Any) -> list[dict[str, Any]]:
        asked.append((files, settings, threads))
        return [row(path.name, ms, n) for (path, _), ms in zip(files, (TENTH, DRIFTING), strict=True) for n in settings.prompt_tokens]

    monkeypatch.setattr(bench, "bench_all", bench_all)
    return asked


def checked(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["check", *map(str, arguments), "--json"], catch_exceptions=False, standalone_mode=False)


def test_a_file_is_held_against_the_one_before(tiny: Path, scripted: list[Any]) -> None:
    budgets = ("--budget", "decode=-5%", "--budget", "ttft=+5%", "--budget", "size=+1%")
    done = CliRunner().invoke(cli, ["check", str(tiny / "new/bot.gguf"), "--against", str(tiny / "old/bot.gguf"), *budgets, "--json"])
    assert isinstance(done.exception, CheckFailed)
    verdicts = json.loads(done.stdout)
    assert [(v["what"].split()[0], v["ok"]) for v in verdicts] == [
        *[("decode_tok_per_s", False)] * 2,  # a row for each prompt
        *[("ttft_ms", True)] * 2,
        ("size", False),
    ]
    assert verdicts[0]["value"].startswith("-9.09% since the baseline (")
    assert "p = 3.1e-05" in verdicts[0]["why"]
    assert "grew: token_embd.weight +" in verdicts[-1]["why"]
    ((files, settings, threads),) = scripted
    assert [path for path, _ in files] == [tiny / "new/bot.gguf", tiny / "old/bot.gguf"]
    assert (settings, threads) == (Bench(repeats=speeds.REPEATS), pytest.approx(threads))


def test_a_report_says_how_its_file_is_measured_again(tiny: Path, scripted: list[Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "gguf-f16").mkdir(parents=True)
    shutil.copy(tiny / "new/bot.gguf", run / "gguf-f16")
    (run / "gguf-f16/manifest.json").write_text("{}", encoding="utf-8")
    document = {"schema": 1, "name": "bot", "files": [{"file": "bot.gguf", "size_bytes": 7}]}
    rows = [row("bot.gguf", [1.0], 8, threads=3), row("bot.gguf", [1.0], 16, threads=3), row("bot.gguf", [1.0], 8, device="a phone")]
    (run / "report.json").write_text(report.to_json({**document, "bench": rows}), encoding="utf-8")
    with pytest.raises(CheckFailed):
        checked(run, "--against", tiny / "old/bot.gguf", "--budget", "decode=-5%")
    ((files, settings, threads),) = scripted
    assert files == [(run / "gguf-f16/bot.gguf", "llama.cpp"), (tiny / "old/bot.gguf", "llama.cpp")]
    assert (settings, threads) == (Bench((8, 16), 4, speeds.REPEATS), 3)


def test_sizes_alone_run_nothing(tiny: Path, scripted: list[Any]) -> None:
    checked(tiny / "old/bot.gguf", "--against", tiny / "new/bot.gguf", "--budget", "size=+0%")
    assert scripted == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--baseline", "old"), "holds one artifact against one other"),
        (("old/bot.gguf",), "holds one artifact against one other"),
    ],
)
def test_one_is_held_against_one(tiny: Path, more: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    with pytest.raises(UsageError, match=words):
        checked("new/bot.gguf", *more, "--against", "old/bot.gguf", "--budget", "size=+1%")


def test_what_is_not_at_hand_is_an_error(tiny: Path, tmp_path: Path) -> None:
    document = {"schema": 1, "name": "bot", "files": [{"file": "bot.gguf", "size_bytes": 7}]}
    (tmp_path / "report.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UsageError, match=r"bot\.gguf is not at hand"):
        checked(tmp_path, "--against", tiny / "old/bot.gguf", "--budget", "decode=-5%")
    (tmp_path / "report.json").write_text(json.dumps({**document, "files": []}), encoding="utf-8")
    with pytest.raises(UsageError, match="holds no file of those that are checked"):
        checked(tmp_path, "--against", tiny / "old/bot.gguf", "--budget", "decode=-5%")


def test_two_real_files_in_turns(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtimes really run; what a verdict says of two files as small as these is not asked."""
    monkeypatch.setattr(speeds, "REPEATS", 3)
    monkeypatch.setattr(machine, "cores", lambda: 1)  # two threads wait long for one another on a busy machine
    done = CliRunner().invoke(
        cli, ["check", str(tiny / "new/bot.gguf"), "--against", str(tiny / "old/bot.gguf"), "--budget", "decode=-99%", "--json"]
    )
    assert [verdict["ok"] for verdict in json.loads(done.stdout)] == [True, True]
