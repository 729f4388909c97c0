"""Labels as answers: scored as whole token sequences in every runtime, chosen by length, told when unknown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgelora import labels, report
from edgelora.data.row import Row
from edgelora.data.split import Dataset
from edgelora.errors import DataError
from edgelora.runtime import answers, runtime
from edgelora.runtime.torch_reference import answer_log_probs
from tests.line import Line, edgelora, write_recipe
from tests.tiny_models import ARCHITECTURES, tiny_model

PROMPT = [3, 77, 120, 45, 8, 300, 12, 9, 210, 33, 41]
ANSWERS = [[50, 60, 2], [50, 61, 70, 2], [50, 61, 71, 2], [51, 2], [50, 2], [52, 53, 54, 55, 56, 57, 2], [52, 53, 54, 58, 2]]


def test_a_tree_shares_beginnings() -> None:
    made = answers.tree([[5, 6, 0], [5, 7, 0], [8, 0]])
    assert made.tokens == (5, 6, 0, 7, 0, 8, 0)
    assert made.parents == (-1, 0, 1, 0, 3, -1, 5)
    assert made.paths == ((0, 1, 2), (0, 3, 4), (5, 6))
    assert made.inner == (0, 1, 3, 5)
    assert [made.depth(node) for node in range(7)] == [0, 1, 2, 1, 2, 0, 1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_torch_scores_answers_as_it_scores_texts(arch: str, tmp_path: Path) -> None:
    with runtime("torch").open(tiny_model(arch, tmp_path), 1) as session:
        for prompt in (PROMPT, PROMPT[:1]):
            for found, expected in zip(session.score_answers(prompt, ANSWERS), answers.one_by_one(session, prompt, ANSWERS), strict=True):
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompts_of_unequal_length_are_scored_together(attention: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", tmp_path), dtype=torch.float32, attn_implementation=attention).eval()
    prompts = [PROMPT, PROMPT[:3], [*PROMPT, *PROMPT[2:]]]
    with torch.no_grad():
        together = answer_log_probs(model, prompts, ANSWERS)
        for prompt, found in zip(prompts, together, strict=True):
            (alone,) = answer_log_probs(model, [prompt], ANSWERS)
            for one, other in zip(found, alone, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_exported_files_score_answers_as_they_score_texts(finished: Line) -> None:
    onnx = next(p.parent for p in finished.out.glob("onnx-*/**/model.onnx"))
    files = {"llama.cpp": next(finished.one("gguf-*").glob("*.gguf")), "onnxruntime": onnx, "onnxruntime-genai": onnx}
    for name, file in files.items():
        with runtime(name).open(file, 1) as session:
            for prompt in (PROMPT, PROMPT[:1], PROMPT * 9):
                expected = answers.one_by_one(session, prompt, ANSWERS)
                for found, one in zip(session.score_answers(prompt, ANSWERS), expected, strict=True):
                    np.testing.assert_allclose(found, one, rtol=0, atol=0.02 if name == "llama.cpp" else 1e-3, err_msg=name)


def test_a_long_label_is_not_passed_over_for_its_length() -> None:
    shares = labels.log_shares([np.full(8, -0.5, np.float32), np.full(2, -1.0, np.float32)])
    assert np.exp(shares).sum() == pytest.approx(1)
    assert shares.argmax() == 0  # -4 nats in all against -2
    assert shares[0] - shares[1] == pytest.approx((1.0 - 0.5) * 5)  # as if both had five tokens


def test_macro_f1_by_hand() -> None:
    counts = labels.confusion([0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 0, 2], 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert labels.macro_f1(counts) == pytest.approx((4 / 6 + 2 / 3 + 2 / 3) / 3)  # the fourth label is nowhere


def test_a_label_that_was_never_trained_is_told(tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base, task="classify")
    (tmp_path / "test.jsonl").write_text('{"text": "It hums", "label": "noise"}\n{"text": "It came late again", "label": "delivery"}\n')
    done = edgelora("finetune", "tiny.yaml", "--set", "data.held_out={test: test.jsonl}", cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    assert done.err == (
        "error: test: the label 'noise' (1 row) stands in no training row\n"
        "give the training file rows with it, or take it out of the set: what was never trained cannot be chosen\n"
    )


def test_the_report_shows_what_is_taken_for_what(classified: Line) -> None:
    document = report.read(classified.out)
    for row, matrix in zip(document["accuracy"], document["confusion"], strict=True):
        counts = np.array(matrix["counts"])
        assert matrix["labels"] == ["delivery", "repair"]
        assert counts.sum() == row["rows"]
        assert np.trace(counts) / counts.sum() == row["after"]
        assert labels.macro_f1(counts) == row["macro_f1_after"]
    assert "Confusion matrix of 2 labels" in (classified.out / "report.html").read_text(encoding="utf-8")


def test_a_bench_with_rows_counts_what_is_taken_for_what(classified: Line, tmp_path: Path) -> None:
    file = next(classified.one("gguf-*").glob("*.gguf"))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"It hums {n}", "label": label}) + "\n" for n in range(2) for label in ("repair", "delivery"))
    )
    short = ("--threads", "1", "--prompt-tokens", "4", "--repeats", "3")
    assert edgelora("bench", file, "--rows", "rows.jsonl", *short, "-o", "page", cwd=tmp_path).code == 0
    document = report.read(tmp_path / "page")
    counts = np.array(document["confusion"][0]["counts"])
    assert counts.sum(1).tolist() == [2, 2]  # the same text twice under each label: whatever it is taken for, half are right
    assert (document["accuracy"][0]["after"], document["accuracy"][0]["macro_f1_after"]) == (0.5, labels.macro_f1(counts))

    (tmp_path / "rows.jsonl").write_text('{"text": "It hums", "label": "noise"}\n')
    done = edgelora("bench", file, "--rows", "rows.jsonl", *short, cwd=tmp_path)
    assert (done.code, done.err) == (
        2,
        f"error: line 1: the label 'noise' is none that {file.name} was trained on\nits labels: delivery, repair\n",
    )


def test_predict_refuses_labels_of_another_classifier(classified: Line, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"text": "It hums"}\n')
    file = next(classified.one("gguf-*").glob("*.gguf"))
    done = edgelora("predict", file, "q.jsonl", "-o", "found.jsonl", "--labels", "repair,noise", cwd=tmp_path)
    assert (done.code, done.err) == (2, f"error: --labels: {file.name} was not trained on noise\nits labels: delivery, repair\n")


def test_thousands_of_answers_are_no_labels() -> None:
    rows = tuple(Row((("user", f"question {i}"), ("assistant", f"answer {i}")), i + 1) for i in range(20_000))
    with pytest.raises(DataError, match="20000 different labels, more than 1000") as caught:
        labels.check(Dataset(rows, rows[:1], {}, (), ()), None)
    assert caught.value.hint == "are they answers? write data.task: chat"
