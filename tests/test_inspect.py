"""data inspect: what is in a file, as a document and as lines for a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelora import models
from edgelora.cli.inspect import describe
from edgelora.data.inspect import inspect
from edgelora.recipe import Reading
from tests.test_cli import edgelora

FAQ = """question,answer
Where is the office?,"In Takamatsu,
near the port."
where is  the OFFICE?,In Takamatsu.
How do I reset my password?,Open ｻｲﾝｲﾝ and click.
How do I reset my password?,Open ｻｲﾝｲﾝ and click.
,nothing asked
What does it cost and when do I have to pay for it?,=SUM(A1)
What does it cost and when do I have to pay for it now?,Ten.###eos_token###
What, exactly?,is this
"""


def look(folder: Path, text: str = FAQ, name: str = "faq.csv", **options: Any) -> dict[str, Any]:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return inspect(file, Reading(), **options)


def test_rows_repeats_and_oddities(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert (found["rows"], found["format"], found["encoding"], found["layout"]) == (6, "csv", "utf-8", "pairs")
    assert found["left_out"] == {
        "empty": {"rows": 1, "lines": [7]},
        "3 cells for 2 columns": {"rows": 1, "lines": [10]},
    }
    repeats = found["repeats"]
    assert repeats["same"] == {"rows": 1, "lines": [(6, 5)]}
    assert repeats["question"] == {"rows": 2, "lines": [(4, 2), (6, 5)]}
    assert repeats["contradicted_questions"] == 1
    assert found["near"]["lines"] == [(9, 8, pytest.approx(0.92, abs=0.02))]
    odd = {name: (one["count"], one["lines"]) for name, one in found["odd"].items()}
    assert odd == {
        "line ends inside": (1, [2]),
        "half-width kana": (10, [5, 6]),
        "special tokens of models": (1, [9]),
        "formulas (kept as text)": (1, [8]),
    }
    assert found["characters"]["question"] == {"least": 20, "median": 27, "p95": 51, "most": 55, "mean": pytest.approx(34, abs=2)}


def test_leaks(tmp_path: Path) -> None:
    other = tmp_path / "test.csv"
    other.write_text(
        "question,answer\nWhere is the office,x\nhow do i reset my password?,x\nWhat does it cost and when do I have to pay for them?,x\nNew?,x\n"
    )
    found = look(tmp_path, against=other)
    leaks = found["against"]
    assert (leaks["file"], leaks["rows"]) == ("test.csv", 4)
    assert [(leaks[way]["rows"], leaks[way]["lines"]) for way in ("same", "unpunctuated", "letters")] == [
        (1, [(3, 5)]),
        (2, [(2, 2), (3, 5)]),
        (2, [(2, 2), (3, 5)]),
    ]
    assert found["near_against"]["lines"][0][:2] == (4, 8)
    text = "\n".join(describe(found, colour=False))
    assert "LEAK      2 of its questions stand in this file: 1 but for case and spaces, 2 but for punctuation too" in text


def test_labels_and_their_counts(tmp_path: Path) -> None:
    rows = "".join(f"text {n},{'a' if n % 3 else 'b'}\n" for n in range(30))
    found = look(tmp_path, "text,label\n" + rows)
    assert found["labels"] == {"a": 20, "b": 10}
    assert "labels    2: a 20, b 10" in "\n".join(describe(found, colour=False))
    many = "".join(f"text {n},label {n}\n" for n in range(20_000))
    assert look(tmp_path, "text,label\n" + many, near=False)["labels"] is None


def test_a_table_without_questions_is_described_all_the_same(tmp_path: Path) -> None:
    found = look(tmp_path, "pid,name,phone\n1,A,ｱ\n1,A,ｱ\n,,\n2,B,\n")
    assert (found["layout"], found["records"], found["left_out"]) == (None, 4, {"empty": {"rows": 1, "lines": [4]}})
    assert found["repeats"]["same"] == {"rows": 1, "lines": [(3, 2)]}
    assert (
        describe(found, colour=False)[-1]
        == "no rows to train on: no column looks like the question; name columns with --question and --answer"
    )


def test_examples_are_what_the_model_sees(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = models.open_tokenizer(tiny_base)
    found = look(tmp_path, tokenizer=tokenizer, base="tiny")
    tokens = found["tokens"]
    assert (tokens["rows"], tokens["sampled"], tokens["refused"], tokens["row"]["least"] > 20) == (6, False, {}, True)
    example = next(example for example in found["examples"] if example["line"] == 8)
    assert "".join(text for text, _ in example["pieces"]).startswith("<|im_start|>user\nWhat does it cost")
    assert [text for text, trained in example["pieces"] if trained] == ["=SUM(A1)<|im_end|>"]
    assert "⟦=SUM(A1)<|im_end|>⟧" in "\n".join(describe(found, colour=False))
    assert "\x1b[" in "\n".join(describe(found, colour=True))
    tokenizer.chat_template = "{{ raise_exception('no such turns') }}"
    refused = look(tmp_path, tokenizer=tokenizer, base="tiny")["tokens"]
    assert (refused["row"], refused["refused"]["the chat template fails: no such turns"]["rows"]) == (None, 6)


def test_languages(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    found = look(
        tmp_path,
        "question,answer\n"
        + "How do I pay for this and where is the office?,Come to us.\n住所を教えてください,香川県高松市番町一丁目です\n" * 3,
    )
    assert set(found["languages"]["shares"]) == {"en", "ja"}


def test_long_files_are_sampled_evenly(tmp_path: Path) -> None:
    rows = "".join(f"question number {n},answer {n}\n" for n in range(9000))
    found = look(tmp_path, "question,answer\n" + rows, near=False)
    assert found["rows"] == 9000
    assert 2000 <= found["languages"]["texts"] <= 4001


def test_terminal_control_does_not_pass(tmp_path: Path) -> None:
    found = look(tmp_path, 'question,answer\n"a\x1b[31mred\x07 \u202eb",c\n')
    text = "\n".join(describe({**found, "columns": ["\x1b[2J"]}, colour=False))
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_the_command(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "faq.csv").write_text(FAQ, encoding="utf-8")
    done = edgelora("data", "inspect", "faq.csv", "--base", tiny_base, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("faq.csv  0.4 kB\n  format    csv, UTF-8, delimiter comma\n")
    assert "what the model sees, trained tokens ⟦like this⟧" in done.stdout
    done = edgelora("data", "inspect", "faq.csv", "--base", tiny_base, "--json", "--no-near", cwd=tmp_path)
    assert json.loads(done.stdout)["rows"] == 6
    done = edgelora("data", "inspect", "none.csv", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[0]) == (3, "error: data file not found: none.csv")
