"""`edgelora bench` as a user runs it: quality beside speed, estimates, and the page that is shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgelora import report
from edgelora.cli import cli
from edgelora.errors import EdgeloraError, UsageError
from edgelora.export import gguf
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three exports of one tiny model, and rows."""
    root = tmp_path_factory.mktemp("secret-place")
    model = tiny_model("llama", root / "hf")
    for kind in ("f16", "q8_0", "q4_0"):
        gguf.write(model, kind, root, "tiny", lambda share, text: None)
    rows = [{"question": f"What is part {n}?", "answer": f"Part {n} is a wheel."} for n in range(6)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)


def test_quality_stands_beside_speed_on_a_page(folder: Path, tmp_path: Path) -> None:
    files = [folder / "tiny-q8_0.gguf", folder / "tiny-q4_0.gguf"]
    options = ("--rows", folder / "rows.jsonl", "--reference", folder / "tiny-f16.gguf", "--most", 4)
    short = ("--threads", 1, "--prompt-tokens", "4,8", "--repeats", 3)
    done = invoke(*files, *options, *short, "-o", tmp_path / "page", "--json")
    found = json.loads(done.stdout)
    assert [(row["file"], row["prompt_tokens"]) for row in found["bench"]] == [(path.name, n) for path in files for n in (4, 8)]
    near, far = (next(row for row in found["divergence"] if row["file"] == path.name) for path in files)
    assert 0 <= near["kl"] < far["kl"]  # eight bits are nearer to sixteen than four
    assert near["rows"] == 4
    assert [row["rows"] for row in found["losses"]] == [4, 4]
    assert len(found["answers"]) == 4

    document = report.read(tmp_path / "page")
    assert [row["kl"] for row in document["files"]] == [near["kl"], far["kl"]]
    assert [row["size_bytes"] for row in document["files"]] == [path.stat().st_size for path in files]
    assert all(sum(n for types in row["parts"].values() for n in types.values()) == row["size_bytes"] for row in document["files"])
    assert document["commands"] == [
        "edgelora bench tiny-q8_0.gguf tiny-q4_0.gguf --threads 1 --prompt-tokens 4,8 --repeats 3 --rows rows.jsonl "
        "--reference tiny-f16.gguf --most 4"
    ]
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    for words in ("Quality against size", "Quality against speed", "Where the MB go", "Answers side by side", "Perplexity"):
        assert words in page
    assert "secret-place" not in page + json.dumps(document)  # where files lie is nobody's business


def test_two_benches_are_compared(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        invoke(folder / "tiny-q8_0.gguf", "--threads", 1, "--prompt-tokens", "4", "--repeats", 3, "-o", tmp_path / name, "--quiet")
    done = CliRunner().invoke(
        cli, ["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "both")], catch_exceptions=False
    )
    assert "peak memory" in done.output
    rows = {row["what"]: row for row in report.read(tmp_path / "both" / "comparison.json")["rows"]}
    assert rows["size"]["verdicts"][1] is None  # the same file
    assert rows["decode (llama.cpp, 1 thread, 4-token prompt)"]["verdicts"][1]["word"] in ("noise", "cannot tell", "real")


def test_estimates_measure_nothing(folder: Path, tmp_path: Path) -> None:
    done = invoke(folder / "tiny-q8_0.gguf", "--estimate", "raspberry-pi-5,oneplus-12", "-o", tmp_path / "page")
    assert done.stdout.count("ESTIMATE  ") == 2
    assert "tok/s" in done.stdout
    document = report.read(tmp_path / "page")
    assert [row["device"] for row in document["estimates"]] == ["Raspberry Pi 5", "OnePlus 12 (Snapdragon 8 Gen 3)"]
    assert "bench" not in document
    assert "machine" not in document  # nothing ran on it
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "Nothing here was measured." in page
    assert "Estimated decode" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--reference", "x.gguf"), "--reference needs rows"),
        (("--devices", "x.yaml"), "--devices is a table for --estimate"),
        (("--estimate", "all", "--rows", "rows.csv"), "--estimate runs no file"),
        (("--estimate", "nokia-3310"), "no device 'nokia-3310'"),
        (("--runtime", "onnxruntime"), "tiny-q8_0.gguf is not opened by 'onnxruntime'"),
        (("--prompt-tokens", "32,x"), "are not counts above 0"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(EdgeloraError) as caught:
        invoke(folder / "tiny-q8_0.gguf", *arguments)
    assert isinstance(caught.value, UsageError)
    assert words in caught.value.message
    assert caught.value.hint


def test_a_reference_that_reads_other_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    other = gguf.write(tiny_model("qwen2", tmp_path / "hf"), "f16", tmp_path, "other", lambda share, text: None)
    with pytest.raises(UsageError, match="read the rows as different tokens"):
        invoke(folder / "tiny-q8_0.gguf", "--rows", folder / "rows.jsonl", "--reference", other, "--threads", 1, "--repeats", 3)
