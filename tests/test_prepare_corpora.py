"""The documented defects of real data sets, found by preparing them. Runs with --corpora DIR."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edgelora import recipe as recipes
from edgelora.data import assign, keys
from edgelora.data.prepare import Prepared, prepare


def prepared(folder: Path, train: str, **data: Any) -> Prepared:
    settings = {"typos": "none", "near": "none", **data.pop("clean", {})}
    return prepare(
        recipes.parse({"name": "x", "base": "b", "data": {"train": train, "clean": settings, **data}}).data, folder, lenient=True
    )


def left(found: Prepared) -> Counter[str]:
    return Counter(why.reason for why in found.assigned.left.values())


def test_medquad(corpora: Path) -> None:
    found = prepared(corpora, "faq_en/medquad_faq.csv")
    assert len(found.index) == 4300
    assert left(found) == {"duplicate": 48}
    questions: dict[int, set[int]] = {}
    for question, answer in zip(found.index.question, found.index.answer, strict=True):
        questions.setdefault(question, set()).add(answer)
    assert sum(len(answers) > 1 for answers in questions.values()) == 494  # documented: 493, told apart by punctuation too
    disagreeing = [len(assign.contradictions(found.index, found.assigned, [name])) for name in ("train", "valid", "sealed")]
    assert sum(disagreeing) == 494  # no question straddles two sets


def test_banking77_leaks(corpora: Path) -> None:
    folder = corpora / "intents" / "banking77"
    found = prepared(folder, "train.csv", held_out={"test": "test.csv"}, task="classify")
    assert len(found.index) == 10003 + 3080

    def texts(name: str) -> list[str]:
        with (folder / name).open(encoding="utf-8", newline="") as stream:
            return [row["text"] for row in csv.DictReader(stream)]

    def normal(text: str) -> str:
        return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())

    test = {normal(text) for text in texts("test.csv")}
    leaked = [text for text in texts("train.csv") if normal(text) in test]
    assert len({normal(text) for text in leaked}) == 11
    kept = {finished.raw[0][1] for finished in found.finished() if finished.set in ("train", "valid")}
    assert not kept & set(leaked)
    shared = set(found.index.question[:10003]) & set(found.index.question[10003:])
    assert len(shared) == 29  # the 11, and 18 that differ in a hyphen or a space ("top-up", "top up")


def test_jcommonsenseqa_leaks(corpora: Path) -> None:
    found = prepared(corpora / "qa_ja", "jcommonsenseqa_train-v1.3.jsonl", held_out={"test": "jcommonsenseqa_valid-v1.3.jsonl"})

    def questions(name: str) -> list[str]:
        lines = (corpora / "qa_ja" / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["question"] for line in lines]

    train, test = questions("jcommonsenseqa_train-v1.3.jsonl"), questions("jcommonsenseqa_valid-v1.3.jsonl")
    assert sum(text in set(train) for text in test) == 19
    leaked = {keys.normal(text) for text in train} & {keys.normal(text) for text in test}
    assert leaked >= {keys.normal(text) for text in set(train) & set(test)}
    for finished in found.finished():
        if finished.set in ("train", "valid"):
            assert keys.normal(finished.raw[0][1].split("\n")[0]) not in leaked


def test_personality_chat_contradicts_itself(corpora: Path) -> None:
    documented = {"friendly": 2, "humorous": 5, "professional": 2}  # repeated questions
    for persona, repeated in documented.items():
        found = prepared(corpora / "faq_en", f"personality_chat_{persona}.tsv")
        assert len(found.index) == 165
        assert 165 - len(set(found.index.question)) == repeated, persona
    disagreeing = prepared(corpora / "faq_en", "personality_chat_humorous.tsv")
    assert sum(len(assign.contradictions(disagreeing.index, disagreeing.assigned, [name])) for name in ("train", "valid", "sealed")) == 5


def test_stray_tokens_of_dolly(corpora: Path) -> None:
    found = prepared(corpora / "instruct_en", "dolly_sample_151.jsonl")
    rows = list(found.finished())
    tokens = Counter(change.before for finished in rows for change in finished.changes if change.step == "tokens")
    assert tokens["###eos_token###"] == 151
    text = "\n".join(content for finished in rows for _, content in finished.row.messages)
    assert "###" not in text
    assert "Below is an instruction" not in text


def test_ruby_of_wagahai(corpora: Path) -> None:
    found = prepared(corpora / "messy", "wagahai_aozora_sjis_ruby.txt", clean={"duplicates": "none"})
    rows = list(found.finished())
    readings = [
        change.before for finished in rows for change in finished.changes if change.step == "ruby" and change.before.startswith("《")
    ]
    text = "\n".join(finished.row.answer for finished in rows)
    assert len(readings) + text.count("《") == 9217
    assert text.count("《") <= 1  # of the legend that explains the mark
    assert "［＃" not in text.replace("［＃］", "")


def test_half_width_kana_of_the_postal_codes(corpora: Path) -> None:
    found = prepared(
        corpora / "messy",
        "postal_13TOKYO_sjis_halfkana.csv",
        question="column 9",
        answer="column 6",
        header=0,
        clean={"duplicates": "none"},
    )
    rows = list(found.finished())
    assert sum(len(re.findall("[\uff61-\uff9f]", content)) for finished in rows for _, content in finished.raw) > 10_000
    assert not any(re.search("[\uff61-\uff9f]", content) for finished in rows for _, content in finished.row.messages)


def test_joined_lines_of_the_freebsd_faq(corpora: Path) -> None:
    found = prepared(corpora / "faq_ja", "freebsd_faq_ja.csv")
    rows = list(found.finished())
    assert len(rows) == 296
    assert 265 <= sum(any(change.step == "joins" for change in finished.changes) for finished in rows) <= 280  # documented: 271 answers
    assert not any("[.filename]" in finished.row.answer for finished in rows)
    written = {choice.chosen for choice in found.decided.choices}
    assert {"ユーザ", "サーバ", "コンピュータ", "メモリ"} & written


@pytest.mark.parametrize(
    "name", ["faq_ja/vaccinecert_faq.json", "faq_en/freebsd_faq_en.csv", "chat/oasst_en_messages.jsonl", "chat/taskmaster4_data_07.json"]
)
def test_every_row_is_somewhere(corpora: Path, name: str) -> None:
    found = prepared(corpora, name)
    assert sum(found.counts.values()) + len(found.assigned.left) == len(found.index) > 0
    assert sum(1 for _ in found.finished()) == sum(found.counts.values())
    again = prepared(
        corpora,
        name,
        clean=dataclasses.asdict(recipes.Clean()) | dict.fromkeys(("width", "joins", "html", "whitespace"), "none") | {"keep": []},
    )
    sealed = found.index.names.index("sealed")
    assert [home == sealed for home in found.assigned.home] == [home == sealed for home in again.assigned.home]
