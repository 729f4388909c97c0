"""The quick start's own recipe on the embedded base: real model, real training, shortened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgelora import report

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
SHORT = (
    "train.epochs=0.25",
    "evaluate.rows=10",
    "evaluate.verify_rows=4",
    "evaluate.answers=1",
    "bench.prompt_tokens=[16]",
    "bench.repeats=3",
    "threads=1",
)


@pytest.mark.slow
def test_the_shipped_files_are_better_than_the_untuned_base(tmp_path: Path) -> None:
    settings = [word for item in SHORT for word in ("--set", item)]
    command = [sys.executable, "-m", "edgelora.cli", "run", str(RECIPE), "--out", str(tmp_path / "out"), "--json", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert report.read(tmp_path / "out")["files"] == document["files"]
    assert document["training"]["trained_parameters"] == 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    losses = {candidate["base"]: candidate["loss"] for candidate in document["merge"]["candidates"]}
    assert document["merge"]["kept"] == min(losses, key=losses.__getitem__)
    assert set(losses) == {"nf4", "16bit"}
    assert [file["format"] for file in document["files"]] == ["gguf", "onnx"]
    for file in document["files"]:
        assert file["size_bytes"] < 130e6
        assert file["tokens_equal"]
        assert file["template_equal"]
    assert document["files"][0]["predicted_bytes"] == document["files"][0]["size_bytes"]
    on_paraphrases = [row for row in document["losses"] if row["set"] == "paraphrase"]
    assert len(on_paraphrases) == 2
    assert all(row["change_high"] < 0 for row in on_paraphrases)
