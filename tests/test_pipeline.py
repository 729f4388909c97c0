"""The whole line on a tiny base: what a run leaves, what it does not do twice, and every command on the one before."""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from edgelora import artifact, report
from tests.line import CLASSIFY_ROWS, Done, Line, damaged, edgelora, finished_folders, write_recipe

FILES = ("tiny-q8_0.gguf", "tiny-int8-onnx")


def size_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def exported(line: Line, name: str) -> Path:
    return line.one(f"[go]*/{name}")


def test_a_run_leaves_whole_folders_and_three_reports(finished: Line) -> None:
    kinds = sorted(artifact.load(finished.out / name).kind for name in finished_folders(finished.out))
    assert kinds == ["adapter", "bench", "evaluation", "export", "export", "export", "export", "model"]
    assert damaged(finished.out) == []
    assert sorted(p.name for p in finished.out.iterdir() if p.is_file()) == [".lock", "report.html", "report.json", "report.md"]
    assert finished.done.err == ""
    assert f"report: {Path('runs/tiny/report.html')}\n" in finished.done.out


@pytest.mark.parametrize("task", ["finished", "classified"])
def test_the_report_agrees_with_the_files(request: pytest.FixtureRequest, task: str) -> None:
    line: Line = request.getfixturevalue(task)
    document = report.read(line.out)
    assert [row["file"] for row in document["files"]] == list(FILES)
    for row in document["files"]:
        path = exported(line, row["file"])
        assert row["size_bytes"] == size_bytes(path)
        assert row["tokens_equal"] is row["template_equal"] is True
        assert 0 <= row["kl"] <= 5
        assert 0 < row["top1"] <= 1
        if row["format"] == "gguf":
            assert row["predicted_bytes"] == row["size_bytes"]
            assert row["sha256"] == artifact.sha256(path)
        else:
            assert row["predicted_bytes"] == pytest.approx(row["size_bytes"], rel=0.1)
    facts = artifact.load(line.one("evaluation-*")).facts
    assert document["losses"] == facts["losses"]
    assert {(row["file"], row["set"]) for row in document["losses"]} == {(file, "sealed") for file in FILES}
    for row in document["losses"]:
        assert 1 <= row["rows"] <= 12
        assert row["tokens"] > row["rows"]
        for side in ("before", "after"):
            assert row[side]["low"] <= row[side]["loss"] <= row[side]["high"]
        assert row["change"] == pytest.approx(row["after"]["loss"] / row["before"]["loss"] - 1)
    assert {row["file"] for row in document["bench"]} == set(FILES)
    assert all(row["decode_tok_per_s"] > 0 and row["peak_rss_bytes"] > 0 and row["threads"] == 1 for row in document["bench"])
    training = document["training"]
    assert (training["steps"], len(training["curve"]), len(training["valid_curve"])) == (
        training["curve"][-1]["step"],
        training["steps"],
        3,
    )
    assert training["best_valid_loss"] == min(point["loss"] for point in training["valid_curve"])
    assert document["checks"] == [
        {"what": f"size of {file}", "limit": "<= 5MB", "value": document["checks"][i]["value"], "ok": True} for i, file in enumerate(FILES)
    ]


def test_answers_stand_side_by_side(finished: Line) -> None:
    answers = report.read(finished.out)["answers"]
    assert answers
    for row in answers:
        assert set(row) == {"question", "before", "after"}
        assert set(row["after"]) == set(FILES)


def test_the_pages_show_the_documents_figures(finished: Line) -> None:
    document = report.read(finished.out)
    for page in ("report.html", "report.md"):
        text = (finished.out / page).read_text(encoding="utf-8")
        for file in FILES:
            assert file in text
        assert f"{document['training']['trained_parameters']:,}" in text


def test_labels_are_scored(classified: Line) -> None:
    document = report.read(classified.out)
    assert [row["file"] for row in document["accuracy"]] == list(FILES)
    for row in document["accuracy"]:
        assert 0 <= row["low"] <= row["after"] <= row["high"] <= 1
        assert (row["after"] * row["rows"]) % 1 == pytest.approx(0)
        assert (row["before"] * row["rows"]) % 1 == pytest.approx(0)
    assert "ccuracy" in (classified.out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predict_knows_the_labels_of_a_classifier(classified: Line, tmp_path: Path, name: str, suffix: str) -> None:
    rows = tmp_path / "texts.csv"
    rows.write_text("text\n" + "".join(f'"{text}, ""again"" "\n' for text, _ in CLASSIFY_ROWS[:5]), encoding="utf-8")
    done = edgelora("predict", exported(classified, name), rows, "-o", f"found.{suffix}", "--threads", 1, "--json", cwd=tmp_path)
    assert done.document == {"output": f"found.{suffix}", "rows": 5, "dropped": 0}
    text = (tmp_path / f"found.{suffix}").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = (
        [json.loads(line) for line in text.splitlines()] if suffix == "jsonl" else list(csv.DictReader(text.splitlines()))
    )
    assert [row["question"] for row in found] == [f'{text}, "again"' for text, _ in CLASSIFY_ROWS[:5]]
    assert all(row["label"] in ("delivery", "repair") for row in found)
    assert all(0.5 <= float(row["probability"]) <= 1 for row in found)  # the better one of two


def test_predict_agrees_with_the_reports_accuracy(classified: Line, tmp_path: Path) -> None:
    from edgelora import recipe as recipes
    from edgelora.data import split

    sealed = split.load(recipes.load(classified.recipe)).reporting("sealed")
    rows = tmp_path / "sealed.jsonl"
    rows.write_text("".join(json.dumps({"text": row.question}) + "\n" for row in sealed), encoding="utf-8")
    (row, *_) = report.read(classified.out)["accuracy"]
    assert row["rows"] == len(sealed)
    assert edgelora("predict", exported(classified, row["file"]), rows, "-o", "found.jsonl", "--threads", 1, cwd=tmp_path).code == 0
    found = [json.loads(line)["label"] for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert sum(label == row.answer for label, row in zip(found, sealed, strict=True)) / len(sealed) == row["after"]


def test_predict_takes_other_labels_and_none(finished: Line, tmp_path: Path) -> None:
    rows = tmp_path / "q.jsonl"
    rows.write_text('{"question": "What is it?"}\n{"question": ""}\n{"question": "And this?"}\n', encoding="utf-8")
    file = exported(finished, FILES[0])
    edgelora("predict", file, rows, "-o", "l.jsonl", "--labels", "yes,no,maybe", "--threads", 1, cwd=tmp_path)
    assert {json.loads(line)["label"] for line in (tmp_path / "l.jsonl").read_text().splitlines()} <= {"yes", "no", "maybe"}
    done = edgelora("predict", file, rows, "-o", "a.tsv", "--max-new-tokens", 4, "--threads", 1, cwd=tmp_path)
    assert done == Done(0, "wrote a.tsv: 2 rows, 1 empty ones left out\n", "")
    assert (tmp_path / "a.tsv").read_text(encoding="utf-8").startswith("line\tquestion\tanswer\n1\tWhat is it?\t")
    assert edgelora("predict", file, rows, "-o", "a.xlsx", cwd=tmp_path) == Done(
        2, "", "error: a.xlsx: .xlsx is not a format predictions are written in\nuse .jsonl, .csv or .tsv\n"
    )


@pytest.fixture
def copy(finished: Line, tmp_path: Path) -> Line:
    """A finished run that a test may add to."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder, copy_function=shutil.copy2)
    return Line(folder, finished.done, finished.log)


def test_the_same_command_repeats_nothing(copy: Line) -> None:
    before = finished_folders(copy.out)
    old = report.read(copy.out)
    started = time.monotonic()
    done = edgelora("run", "tiny.yaml", "--json", cwd=copy.folder)
    assert time.monotonic() - started < 10  # the walk itself takes longer, and this is without its imports
    assert done.document == report.read(copy.out)
    assert finished_folders(copy.out) == before
    assert old == done.document


def test_bench_settings_repeat_the_bench_alone(copy: Line) -> None:
    before = finished_folders(copy.out)
    document = edgelora("run", "tiny.yaml", "--set", "bench.decode_tokens=3", "--json", cwd=copy.folder).document
    after = finished_folders(copy.out)
    assert before.items() <= after.items()
    (new,) = after.keys() - before.keys()
    assert new.startswith("bench-")
    assert {row["decode_tokens"] for row in document["bench"]} == {3}
    assert report.read(copy.out) == document


def test_a_broken_budget_is_exit_code_1(copy: Line) -> None:
    done = edgelora("run", "tiny.yaml", "--set", "budgets.size=100kB", "--json", cwd=copy.folder)
    sizes = [f"{size_bytes(exported(copy, file)) / 1e6:.1f} MB" for file in FILES]
    assert done.code == 1
    assert (
        done.err
        == "error: 2 of 2 budgets broken: "
        + "; ".join(f"size of {file}: {size}, limit <= 100kB" for file, size in zip(FILES, sizes, strict=True))
        + "\n"
    )
    assert [row["ok"] for row in json.loads(done.out)["checks"]] == [False, False]
    assert report.read(copy.out)["checks"] == json.loads(done.out)["checks"]
    checked = edgelora("check", copy.out, cwd=copy.folder)  # the budgets it was made with
    assert (checked.code, checked.err) == (1, "error: 2 of 2 budgets broken\nshrink what grew, or raise the limit on purpose\n")
    lines = checked.out.splitlines()
    assert lines[::2] == [f"BROKEN  size of {file}: {size} (limit <= 100kB)" for file, size in zip(FILES, sizes, strict=True)]
    assert all("take a smaller type" in line for line in lines[1::2])
    rows = edgelora("check", copy.out, "--budget", "size=5MB", "--budget", "top1=0.01", "--json", cwd=copy.folder).document
    assert [row["ok"] for row in rows] == [True] * 4
    assert edgelora("check", copy.out, "--recipe", "tiny.yaml", cwd=copy.folder).code == 0
    missing = edgelora("check", copy.out, "--budget", "accuracy=0.9", cwd=copy.folder)
    assert (missing.code, missing.out) == (1, "BROKEN  accuracy: no accuracy in the report: not measured (limit >= 0.9)\n")


def test_the_dry_run_predicts_what_came_out(finished: Line, tmp_path: Path) -> None:
    plan = edgelora("run", finished.recipe, "--dry-run", "--json", cwd=tmp_path).document
    document = report.read(finished.out)
    assert list(tmp_path.iterdir()) == []  # nothing is written for a base that is a folder
    assert plan["trained_parameters"] == document["training"]["trained_parameters"]
    assert plan["total_parameters"] == document["training"]["total_parameters"]
    assert (plan["rows"]["train"], plan["tokens"]) == (document["training"]["rows"], document["training"]["tokens"])
    sizes = {row["format"]: row["size_bytes"] for row in document["files"]}
    assert {row["format"]: row["size_bytes"] for row in plan["files"]} == {
        "gguf": sizes["gguf"],
        "onnx": pytest.approx(sizes["onnx"], rel=0.1),
    }
    assert plan["training"].keys() == {"peak_rss_bytes", "seconds"}


def test_every_command_works_on_the_one_before(finished: Line, tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    made = edgelora("finetune", "tiny.yaml", "--out", "out", "--json", cwd=tmp_path).document
    adapter = tmp_path / made["adapter"]
    assert adapter.name == finished.one("adapter-*").name  # the same work has the same name, whichever command did it
    merged = edgelora("merge", adapter, "--recipe", "tiny.yaml", "--json", cwd=tmp_path).document
    assert {row["base"] for row in merged["candidates"]} == {"nf4", "16bit"}
    assert merged["kept"] in ("nf4", "16bit")
    model = Path(merged["model"])
    assert model.name == finished.one("model-*").name
    plan = edgelora(
        "export", model, "--format", "gguf", "--type", "q8_0", "--threads", 1, "--name", "bot", "--dry-run", "--json", cwd=tmp_path
    ).document
    gguf = edgelora(
        "export", model, "--format", "gguf", "--type", "q8_0", "--threads", 1, "--name", "bot", "--out", "files", "--json", cwd=tmp_path
    ).document
    assert (plan["type"], plan["predicted_bytes"]) == ("q8_0", gguf["predicted_bytes"])
    assert plan["weights"]["fallbacks"] == []
    assert gguf["size_bytes"] == gguf["predicted_bytes"] == (tmp_path / gguf["path"]).stat().st_size
    other = edgelora(
        "export",
        model,
        "--format",
        "gguf",
        "--type",
        "f16",
        "--threads",
        1,
        "--rows",
        "rows.jsonl",
        "--out",
        "files",
        "--json",
        cwd=tmp_path,
    ).document
    assert other["kl"] < 1e-3
    assert other["rows"] == 16
    onnx = edgelora(
        "export", model, "--format", "onnx", "--type", "int8", "--threads", 1, "--out", "files", "--json", cwd=tmp_path
    ).document
    assert onnx["size_bytes"] == size_bytes(tmp_path / onnx["path"])

    against = edgelora(
        "eval", gguf["path"], "rows.jsonl", "--against", other["path"], "--most", 5, "--threads", 1, "--json", cwd=tmp_path
    ).document
    assert (against["rows"], against["file"], against["against"]) == (5, "bot-q8_0.gguf", Path(other["path"]).name)
    assert against["change"] == pytest.approx(against["loss"] / against["before"]["loss"] - 1)
    assert abs(against["change"]) < 0.02  # 8 bits against 16 of one model
    alone = edgelora("eval", onnx["path"], "rows.jsonl", "--most", 5, "--threads", 1, "--json", cwd=tmp_path).document
    assert alone["loss"] == pytest.approx(against["loss"], abs=0.1)
    assert alone["tokens"] == against["tokens"]

    assert (
        edgelora(
            "predict", onnx["path"], "rows.jsonl", "-o", "p.jsonl", "--max-new-tokens", 3, "--threads", 1, "--json", cwd=tmp_path
        ).document["rows"]
        == 16
    )
    benched = edgelora(
        "bench", gguf["path"], onnx["path"], "--threads", 1, "--prompt-tokens", "8", "--repeats", 3, "--json", cwd=tmp_path
    ).document
    assert [row["file"] for row in benched["bench"]] == ["bot-q8_0.gguf", Path(onnx["path"]).name]

    pages = edgelora("report", finished.out, "-o", "pages", "--json", cwd=tmp_path).document
    assert sorted(pages) == ["html", "json", "md"]
    assert report.read(tmp_path / "pages") == report.read(finished.out)
    compared = edgelora("report", finished.out, "pages", "-o", "both", "--json", cwd=tmp_path).document
    assert all((tmp_path / path).is_file() for path in compared.values())
    assert edgelora("check", "pages", "--budget", "size=5MB", "--json", cwd=tmp_path).document[0]["ok"] is True


@pytest.mark.parametrize("name", FILES)
def test_chat_answers_a_prompt_and_a_pipe(finished: Line, tmp_path: Path, name: str) -> None:
    options = ("chat", exported(finished, name), "--max-new-tokens", 6, "--threads", 1)
    first = edgelora(*options, "--prompt", "What is part 3?", "--json", cwd=tmp_path).document
    assert [message["role"] for message in first] == ["user", "assistant"]
    assert edgelora(*options, "--prompt", "What is part 3?", cwd=tmp_path) == Done(0, first[1]["content"] + "\n", "")
    piped = edgelora(
        *options, "--system", "Be brief.", "--json", cwd=tmp_path, stdin="What is part 3?\n質問です\n\nnever read\n".encode()
    ).document
    assert [message["role"] for message in piped] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in piped if message["role"] == "user"] == ["What is part 3?", "質問です"]
    plain = edgelora(*options, cwd=tmp_path, stdin=b"What is part 3?")  # no line end, as `echo -n` sends it
    assert plain == Done(0, first[1]["content"] + "\n", "")
    assert edgelora(*options, "--json", cwd=tmp_path).document == []
