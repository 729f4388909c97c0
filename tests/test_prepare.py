"""Preparing a data set: what decides the sets, what is dropped, found and written, and that a killed command leaves nothing half."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelora import artifact
from edgelora import recipe as recipes
from edgelora.cli import cli
from edgelora.data import duplicates, gaps, keys, split
from edgelora.data.prepare import Spool, prepare
from edgelora.errors import DataError, UsageError
from tests.line import ROOT

Pairs = list[tuple[str, str]]


def jsonl(rows: Pairs) -> bytes:
    return "".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in rows).encode()


def data_of(train: str, **values: Any) -> recipes.Data:
    return recipes.parse({"name": "x", "base": "b", "data": {"train": train, **values}}).data


def sets_of(folder: Path, content: bytes, name: str = "t.jsonl", **values: Any) -> dict[str, set[tuple[str, str]]]:
    """The rows of every set, as they were read."""
    (folder / name).write_bytes(content)
    found: dict[str, set[tuple[str, str]]] = {"train": set(), "valid": set(), "sealed": set()}
    for finished in prepare(data_of(name, **values), folder).finished():
        found[finished.set].add((finished.raw[0][1].strip(), finished.raw[1][1].strip()))
    return found


def command(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["data", "prepare", *map(str, arguments)], catch_exceptions=True)


# --- sealed never moves ---

TEXT = st.text(st.sampled_from("abcXYZ 09ｶﾞあ漢サーバ。？《》<br>&amp;ーＡ１\u3000é問合せ下さ"), min_size=1, max_size=25).filter(
    lambda t: any(c.isalnum() for c in t)
)
ROWS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=25, unique_by=lambda r: r[0])
SWITCH = st.sampled_from(["all", "answers", "none"])
CLEAN = st.fixed_dictionaries(
    dict.fromkeys(
        ("mojibake", "controls", "tokens", "html", "ruby", "markup", "width", "joins", "whitespace", "variants", "spelling"), SWITCH
    )
    | {
        "personal": st.sampled_from(["report", "remove", "none"]),
        "duplicates": st.sampled_from(["drop", "none"]),
        "near": st.sampled_from(["report", "drop", "none"]),
    }
    | {"typos": st.just("none")}
)
SHARES = {"sealed_share": 0.3, "valid_share": 0.2}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=ROWS,
    more=ROWS,
    seed=st.randoms(use_true_random=False),
    clean=CLEAN,
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp932"]),
)
def test_nothing_moves_a_row_into_or_out_of_sealed(rows: Pairs, more: Pairs, seed: Any, clean: dict[str, str], encoding: str) -> None:
    """Adding, shuffling and encoding rows otherwise, another file format, other cleaning: sealed rows stay sealed, no other joins them."""
    with tempfile.TemporaryDirectory() as folder:
        before = sets_of(Path(folder), jsonl(rows), **SHARES)["sealed"]
        mixed = [*rows, *more]
        seed.shuffle(mixed)
        after = sets_of(Path(folder), jsonl(mixed), **SHARES, clean=clean)["sealed"]
        stripped = {(q.strip(), a.strip()) for q, a in rows}
        assert before <= after
        assert after & stripped == before
        table = io.StringIO()
        csv.writer(table).writerows([("question", "answer"), *mixed])
        try:
            raw = table.getvalue().encode(encoding)
        except UnicodeEncodeError:
            return  # cp932 has no é
        encoded = sets_of(Path(folder), raw, "t.csv", encoding=encoding, format="csv", delimiter=",", header=1, **SHARES, clean=clean)[
            "sealed"
        ]
        assert {keys.normal(q) for q, _ in encoded} == {keys.normal(q) for q, _ in after}


def test_the_first_normalization_is_fixed() -> None:
    """These places may never change: a released data set's sealed rows would move."""
    hashes = {text: keys.question_key(text)[:12] for text in ("What is part 1?", "ｻｰﾊﾞｰ とは？", "Ａ１ & é")}
    assert hashes == {"What is part 1?": "d8b6d7526fcd", "ｻｰﾊﾞｰ とは？": "655974e23cf2", "Ａ１ & é": "5f68c07208db"}


def test_shares_come_out_and_no_question_straddles(tmp_path: Path) -> None:
    found = sets_of(tmp_path, jsonl([(f"question {n} {k}?", f"{n}") for n in range(1000) for k in "ab"]), valid_share=0.2)
    assert 140 <= len(found["sealed"]) <= 260
    assert 330 <= len(found["valid"]) <= 470


def test_conversations_of_one_tree_stay_together(tmp_path: Path) -> None:
    rows = [
        {"tree_id": f"t{n // 4}", "messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]}
        for n in range(400)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    homes: dict[str, set[str]] = {}
    for finished in prepare(data_of("c.jsonl"), tmp_path).finished():
        homes.setdefault(str(finished.row.group), set()).add(finished.set)
    assert len(homes) == 100
    assert all(len(home) == 1 for home in homes.values())


def test_a_row_that_links_train_and_sealed_leaves_train(tmp_path: Path) -> None:
    rows = [{"id": n % 50, "question": f"q {n // 2}", "answer": f"a {n}"} for n in range(200)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepared = prepare(data_of("g.jsonl", group="id", sealed_share=0.3), tmp_path)
    found: dict[str, set[str]] = {}
    for finished in prepared.finished():
        found.setdefault(finished.set, set()).add(finished.row.question)
    assert not found["train"] & (found["sealed"] | found["valid"])
    assert not found["valid"] & found["sealed"]
    linking = [why for why in prepared.assigned.left.values() if why.reason == "question stands in sealed"]
    assert linking
    assert all(prepared.assigned.home[why.like] == 2 for why in linking if why.like is not None)


def test_selecting_rows_give_way_to_sealed_ones_and_files_are_compared(tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_bytes(jsonl([("Q 1", "x"), ("only here", "y")]))
    (tmp_path / "s.jsonl").write_bytes(jsonl([("q 1?", "a"), ("q 2", "b")]))
    (tmp_path / "t.jsonl").write_bytes(jsonl([(f"q {n}", "a") for n in range(9)] + [("Only here!", "z")]))
    prepared = prepare(data_of("t.jsonl", valid="v.jsonl", sealed="s.jsonl"), tmp_path)
    assert prepared.counts == {"train": 7, "valid": 1, "sealed": 2}
    assert split.dropped(prepared) == [
        ("t.jsonl", 2, "question stands in sealed"),
        ("t.jsonl", 3, "question stands in sealed"),
        ("t.jsonl", 10, "question stands in valid"),
        ("v.jsonl", 1, "question stands in sealed"),
    ]


def test_what_cleaning_empties_leaves_train_but_never_sealed(tmp_path: Path) -> None:
    rows = [(f"q {n}", "<|im_end|>" if n % 2 else "fine") for n in range(60)]
    dirty = sets_of(tmp_path, jsonl(rows), **SHARES, clean={"tokens": "none"})
    cleaned = sets_of(tmp_path, jsonl(rows), **SHARES)
    assert cleaned["sealed"] == dirty["sealed"]
    assert {answer for _, answer in cleaned["sealed"]} == {"<|im_end|>", "fine"}
    assert {answer for _, answer in cleaned["train"]} == {"fine"}


def test_what_is_held_out_decides_no_spelling(tmp_path: Path) -> None:
    """The majority is that of the trained rows: sealed rows must not speak through it."""
    questions = [f"q {n}" for n in range(200)]
    point = {q: keys.point(int(keys.question_key(q)[:16], 16)) for q in questions}
    rows = [(q, "サーバー" if point[q] < 0.3 else "サーバ" if point[q] < 0.4 else "雨") for q in questions]
    (tmp_path / "t.jsonl").write_bytes(jsonl(rows))
    prepared = prepare(data_of("t.jsonl", sealed_share=0.3), tmp_path)
    assert not prepared.decided.choices
    assert {f.row.answer for f in prepared.finished() if f.set == "sealed"} == {"サーバー"}


# --- duplicates ---


def test_near_duplicates_are_found_within_and_across_sets(tmp_path: Path) -> None:
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "near",
        "the",
        "river",
        "bank",
        "while",
        "seven",
        "wizards",
        "brew",
        "strong",
        "coffee",
        "at",
        "night",
    ]
    rows = [
        (f"{n} " + " ".join(words[n % 7 :]) + f" number {n * 7919}", f"answer {n} " + " ".join(reversed(words[n % 5 :]))) for n in range(40)
    ]
    rows += [(q.replace("lazy", "lazyy"), a) for q, a in rows]
    (tmp_path / "t.jsonl").write_bytes(jsonl(rows))
    texts = [f"{q}\n{a}" for q, a in rows]
    exact = {
        n
        for n, t in enumerate(texts)
        if any(
            len(duplicates.pieces(t) & duplicates.pieces(u)) / len(duplicates.pieces(t) | duplicates.pieces(u)) >= 0.9 for u in texts[:n]
        )
    }
    signatures = np.stack([duplicates.signature(text) for text in texts])
    found = duplicates.near(signatures, range(len(texts)), 0.9, texts.__getitem__)
    assert {pair.row for pair in found} == exact >= set(range(40, 80))
    assert all(0.9 <= pair.similarity <= 1 for pair in found)
    reported = prepare(data_of("t.jsonl"), tmp_path)
    dropped = prepare(data_of("t.jsonl", clean={"near": "drop"}), tmp_path)
    assert len(reported.near) >= 40
    assert sum(reported.counts.values()) == 80
    left = [why for why in dropped.assigned.left.values() if why.reason.startswith("nearly the same as a row of")]
    assert len(left) >= 30
    assert dropped.counts["sealed"] == reported.counts["sealed"]
    assert prepare(data_of("t.jsonl", clean={"near": "none"}), tmp_path).near == []


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [("Yes.", "yes", True), ("１２", "12 !", True), ("C", "C++", False), ("1.5", "15", False), ("-5", "5", False), ("?", "!", False)],
)
def test_what_counts_as_the_same_answer(tmp_path: Path, a: str, b: str, same: bool) -> None:
    found = sets_of(tmp_path, jsonl([("Which one", a), ("which one?", b), *((f"q {n}", "x") for n in range(4))]))
    assert ({(q, x) for rows in found.values() for q, x in rows} >= {("Which one", a), ("which one?", b)}) is not same


# --- the folder ---

MESSY: Pairs = [
    ("ｻｰﾊﾞｰとは?", "サーバーの問い合わせは info@example.jp まで。"),
    *((f"お尋ね {n}", f"サーバーの回答 {n} です。問い合わせ。") for n in range(60)),
    ("お尋ね 1", "別の回答です。"),
    ("お尋ね 2", "サーバーの回答 2 です。問い合わせ"),
    ("エラー", "サーバが 落ちます。<br>問合せ &amp; 確認 {product-name} を"),
    ("空", " "),
]


def messy(folder: Path) -> Path:
    file = folder / "faq.csv"
    with file.open("w", encoding="cp932", newline="") as stream:
        csv.writer(stream).writerows([("質問", "回答"), *MESSY])
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_folder_holds_the_sets_the_card_and_every_change(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command(messy(tmp_path), "-o", out, "--licence", "CC BY 4.0", "--json")
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout)
    assert card == json.loads((out / "card.json").read_text(encoding="utf-8"))
    assert card["sources"][0]["encoding"] == "cp932"
    assert card["licence"] == "CC BY 4.0"
    rows = {name: lines(out / f"{name}.jsonl") for name in ("train", "valid", "sealed")}
    assert {name: len(found) for name, found in rows.items()} == card["rows"]
    assert sum(card["rows"].values()) + sum(card["dropped"].values()) == card["rows_read"] == len(MESSY)
    assert card["dropped"] == {"duplicate": 1, "empty": 1}
    dropped = lines(out / "dropped.jsonl")
    assert [(d["line"], d["reason"]) for d in dropped] == [(66, "empty"), (64, "duplicate")]
    assert dropped[1]["like"] == 5
    changes = lines(out / "changes.jsonl")
    assert Counter(change["step"] for change in changes) == {step: entry["changes"] for step, entry in card["changes"].items()}
    mended = next(row for found in rows.values() for row in found if row["line"] == 65)
    assert mended["messages"][1]["content"] == "サーバーが落ちます。\n問い合わせ & 確認 {product-name} を"
    assert {(c["step"], c["before"], c["after"]) for c in changes if c["line"] == 65} == {
        ("joins", " ", ""),
        ("html", "<br>", "\n"),
        ("html", "&amp;", "&"),
        ("variants", "サーバ", "サーバー"),
        ("variants", "問合せ", "問い合わせ"),
    }
    assert next(row for found in rows.values() for row in found if row["line"] == 2)["messages"][0]["content"] == "サーバーとは?"
    findings = lines(out / "findings.jsonl")
    assert {"personal data: e-mail", "gap: a placeholder that was never filled in", "gap: ends in the middle of a sentence"} <= {
        f["what"] for f in findings
    }
    assert "info@example.jp" not in (out / "card.json").read_text(encoding="utf-8") + (out / "card.md").read_text(encoding="utf-8")
    page = (out / "card.md").read_text(encoding="utf-8")
    assert "| train | " in page
    assert "`サーバ` → `サーバー`" in page
    made = artifact.load(out)
    assert made.rows == {"train": "train", "valid": "select", "sealed": "report"}
    assert not list(tmp_path.glob(".*"))


def test_the_same_command_again_finds_it_finished_and_another_is_refused(tmp_path: Path) -> None:
    file, out = messy(tmp_path), tmp_path / "out"
    assert command(file, "-o", out).exit_code == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert command(file, "-o", out).exit_code == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    done = command(file, "-o", out, "--width", "none")
    assert isinstance(done.exception, UsageError)
    assert "exists and was made from something else" in done.exception.message


def test_several_processes_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(jsonl([(f"質問 {n}", f"サーバー{'' if n % 9 else 'ー'} を 参照 {n}") for n in range(600)]))
    for out, processes in (("one", 1), ("two", 2)):
        assert command(tmp_path / "t.jsonl", "-o", tmp_path / out, "--processes", processes).exit_code == 0
    for file in sorted((tmp_path / "one").glob("*.jsonl")):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_a_dry_run_tells_the_same_and_writes_nothing(tmp_path: Path) -> None:
    file = messy(tmp_path)
    told = command(file, "--dry-run", "--show-changes")
    assert "variants: '問合せ' -> '問い合わせ', 1 times" in told.output
    assert "nothing was written" in told.output
    assert [path.name for path in tmp_path.iterdir()] == ["faq.csv"]
    assert json.loads(command(file, "--dry-run", "--json").stdout) == json.loads(command(file, "-o", tmp_path / "out", "--json").stdout)


def test_personal_data_that_is_removed_is_nowhere_in_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = [
        *MESSY,
        *((f"call {n}", f"Call 03-1234-{n:04d} or {n}@example.org") for n in range(80)),
        ("call 5", "call 03-1234-0005 or 5@example.org"),
    ]
    (tmp_path / "t.jsonl").write_bytes(jsonl(rows))
    assert command(tmp_path / "t.jsonl", "-o", out, "--personal", "remove").exit_code == 0
    text = "".join(path.read_text(encoding="utf-8") for path in out.iterdir())
    assert "example.org" not in text
    assert "1234-0005" not in text
    assert "[phone]" in text
    assert artifact.load(out).facts["changes"]["personal"]["changes"] == 161 - 0


def test_labels_are_never_cleaned_and_missing_ones_are_named(tmp_path: Path) -> None:
    rows = [(f"text {n} ｱ", f"label_{n % 3}　Ａ<br>") for n in range(120)] + [(f"rare {n}", f"rare_{n}") for n in range(9)]
    (tmp_path / "t.jsonl").write_bytes(jsonl(rows))
    done = command(tmp_path / "t.jsonl", "-o", tmp_path / "out", "--task", "classify", "--json")
    card = json.loads(done.stdout)
    assert {row["messages"][1]["content"] for row in lines(tmp_path / "out" / "train.jsonl")} <= {
        f"label_{n}　Ａ<br>" for n in range(3)
    } | {f"rare_{n}" for n in range(9)}
    assert all(re.fullmatch(r"(valid|sealed) has no row of \d labels: rare_\d.*", text) for text in card["shortfalls"])
    assert len(card["shortfalls"]) == 2


def test_a_prepared_folder_trains_as_it_is(tmp_path: Path) -> None:
    messy(tmp_path)
    assert command(tmp_path / "faq.csv", "-o", tmp_path / "out").exit_code == 0

    def loaded(train: str) -> split.Dataset:
        return split.load(recipes.parse({"name": "x", "base": "b", "data": {"train": train}}, folder=tmp_path))

    direct, prepared = loaded("faq.csv"), loaded("out")
    assert prepared.fingerprint("train", "valid", "sealed") == direct.fingerprint("train", "valid", "sealed")
    assert any("Cleaning changed the rows in" in note for note in direct.notes)
    assert any("1 trained questions have more than one answer" in note for note in direct.notes)
    assert prepared.notes[0] == "out was prepared before; its rows are used as they are."
    with (tmp_path / "out" / "train.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(
            json.dumps({"messages": [{"role": "user", "content": "新"}, {"role": "assistant", "content": "答"}], "group": "x"}) + "\n"
        )
    assert len(loaded("out").train) == len(direct.train) + 1
    assert "out/train.jsonl was changed after it was prepared." in loaded("out").notes
    (tmp_path / "empty").mkdir()
    with pytest.raises(Exception, match=r"is not an edgelora artifact"):
        loaded("empty")


def test_a_selecting_stage_cannot_reach_sealed_rows(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(jsonl([(f"q {n}", "a") for n in range(60)]))
    dataset = split.load(recipes.parse({"name": "x", "base": "b", "data": {"train": "t.jsonl"}}, folder=tmp_path))
    assert dataset.selecting == dataset.valid
    with pytest.raises(DataError, match="`valid` selects and does not report"):
        dataset.reporting("valid")
    with pytest.raises(DataError, match="sealed reports and was to select"):
        artifact.build(tmp_path, "x", "x", lambda folder: {}, made_from={}, recipe={}, versions={}, rows={"sealed": "select"})


@pytest.mark.parametrize("wait", [0.0, 0.2])
def test_a_killed_command_leaves_nothing_half_and_the_next_one_finishes(tmp_path: Path, wait: float) -> None:
    (tmp_path / "t.jsonl").write_bytes(jsonl([(f"question {n}", f"answer {n} " * 20) for n in range(3000)]))
    arguments = [sys.executable, "-m", "edgelora.cli", "data", "prepare", "t.jsonl", "-o", "out", "--typos", "none", "--near", "none"]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() or (tmp_path / "out" / "manifest.json").exists()
    done = command(tmp_path / "t.jsonl", "-o", tmp_path / "out", "--typos", "none", "--near", "none")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / ".out.partial").exists()
    assert sum(artifact.load(tmp_path / "out").facts["rows"].values()) == 3000


def test_a_spool_in_a_file_gives_what_one_in_memory_gives(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(jsonl(MESSY))
    with tempfile.TemporaryFile() as stream:
        on_disk = list(prepare(data_of("t.jsonl"), tmp_path, spool=Spool(stream)).finished())
    assert on_disk == list(prepare(data_of("t.jsonl"), tmp_path).finished())


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("This is the whole answer to it.", []),
        ("billing", []),
        ("Open the settings and then choose the", [gaps.CUT]),
        ("設定を開いてから、もう一度お試しのうえ、電源を入れた状態の", [gaps.CUT]),
        ("```\ncode", [gaps.OPEN_CODE]),
        ("See {rel121-current} or mail {{ name }}", [gaps.PLACEHOLDER]),
        ("a set {1, 2} and f'{x}' and ${HOME}", []),
        ("broken \ufffd", [gaps.BROKEN_CHARACTER]),
    ],
)
def test_gaps(answer: str, found: list[str]) -> None:
    assert gaps.look(answer) == found


def test_answers_cut_at_a_limit_are_noticed() -> None:
    assert gaps.cut_length(Counter({120: 1, 250: 2, 512: 30})) == (512, 30)
    assert gaps.cut_length(Counter({120: 1, 510: 9, 511: 10, 512: 9})) is None
    assert gaps.cut_length(Counter()) is None
