"""Data: read what people have, keep sets apart, train on answers only."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from edgelora import models
from edgelora import recipe as recipes
from edgelora.data import chat, split, template
from edgelora.data.read import read
from edgelora.data.row import Row
from edgelora.errors import DataError, ModelError
from edgelora.recipe import Reading


def save(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return file


def pairs(table: object) -> list[tuple[str, str]]:
    return [(row.question, row.answer) for row in table.rows]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "question,answer\nQ1,A1\n", [("Q1", "A1")]),
        ("bom.csv", b"\xef\xbb\xbfQuestion,Answer\r\nQ1,A1\r\n", [("Q1", "A1")]),
        ("utf16.csv", "質問,回答\nはい,いいえ\n".encode("utf-16"), [("はい", "いいえ")]),
        ("nl.csv", 'text,category\r\n"two\nlines",label\r\n', [("two\nlines", "label")]),
        ("q.tsv", 'Question\tAnswer\tMetadata\nsay "hi"\t"hi" he said\tx\n', [('say "hi"', '"hi" he said')]),
        ("a.jsonl", '{"prompt": "Q", "completion": "A"}\n\n{"prompt": "Q2", "completion": "A2"}\n', [("Q", "A"), ("Q2", "A2")]),
        ("alpaca.json", '[{"instruction": "Add", "input": "1 2", "output": "3"}]', [("Add\n\n1 2", "3")]),
        ("ja.json", '[{"No": 1, "質問": "どこ", "回答": "ここ"}]', [("どこ", "ここ")]),
        ("number.jsonl", '{"q": 1, "a": 2}\n', [("1", "2")]),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str | bytes, expected: list[tuple[str, str]]) -> None:
    assert pairs(read(save(tmp_path, name, content))) == expected


def test_columns_by_name_and_cp932(tmp_path: Path) -> None:
    file = save(tmp_path, "x.csv", "件名,内容\n営業時間,平日のみ\n".encode("cp932"))
    with pytest.raises(DataError, match=r"line 1: byte 0x8c is not utf-8") as caught:
        read(file, Reading(encoding="utf-8"))
    assert "cp932" in caught.value.hint
    with pytest.raises(DataError, match="no column looks like the question"):
        read(file)
    for encoding in ("cp932", None):
        assert pairs(read(file, Reading(encoding=encoding, question="件名", answer="内容"))) == [("営業時間", "平日のみ")]


def test_conversations_and_questions_alone(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    file = save(
        tmp_path,
        "c.jsonl",
        json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": [*messages, {"role": "assistant", "content": "d"}]}) + "\n",
    )
    table = read(file)
    assert [row.messages[-1] for row in table.rows] == [("assistant", "d")]
    assert table.dropped == ((1, "does not end with an answer"),)
    assert [row.messages[-1] for row in read(file, answered=False).rows] == [("user", "c"), ("user", "c")]
    assert read(save(tmp_path, "q.csv", "question\nwhy?\n"), answered=False).rows[0].messages == (("user", "why?"),)


def test_system_message_goes_first(tmp_path: Path) -> None:
    row = read(save(tmp_path, "a.csv", "question,answer\nQ,A\n"), Reading(system="Be kind.")).rows[0]
    assert row.messages == (("system", "Be kind."), ("user", "Q"), ("assistant", "A"))


def test_empty_rows_are_left_out_with_their_lines(tmp_path: Path) -> None:
    table = read(save(tmp_path, "a.csv", 'question,answer\nQ1,A1\n,A2\n"Q\n3",\nQ4,A4\n'))
    assert [row.line for row in table.rows] == [2, 6]
    assert table.dropped == ((3, "empty"), (4, "empty"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "holds no rows"),
        ("a.csv", "question,answer\n", "holds no rows"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", "", "holds no rows"),
        ("a.csv", "question,answer\n,\n", "none of its 1 rows"),
        ("a.csv", "x,y\n1,2\n", "no column looks like the question"),
        ("a.csv", 'question,answer\n"unclosed,b\n', r"line \d: unexpected end of data"),
        ("a.jsonl", '{"q": "1", "a": "2"}\n{"q": \n', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object, found list"),
        ("a.json", '{"q": 1}', "expected a JSON list of rows, found dict"),
        ("a.jsonl", "[" * 20000 + "\n", "nested too deeply"),
        ("a.csv", "question,answer\na\0b,c\n", "line 2: a NUL byte"),
        ("a.csv", b"question,answer\n\xff\x81\x8d,c\n", r"line 2: byte 0xff is not utf-8"),
        ("a.csv", "question,answer\n" + "x" * (1 << 21) + ",b\n", "line 2: field larger than field limit"),
        ("a.xlsx", "", "is not a readable Excel file"),
        ("a.parquet", "", "is not a readable Parquet file"),
        ("a.docx", "", "is not a known data format"),
        ("a.jsonl", '{"messages": "hi"}\n', "`messages` is not a list"),
        ("a.jsonl", '{"messages": [{"role": "tool", "content": "x"}]}\n', "is not a message"),
    ],
)
def test_broken_files_are_one_clear_error(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(save(tmp_path, name, content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data file not found"):
        read(tmp_path / "none.csv")


# --- sets ---


def load(folder: Path, rows: list[tuple[str, str]], **data: object) -> split.Dataset:
    save(folder, "t.jsonl", "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return split.load(recipes.parse({"name": "x", "base": "b", "data": {"train": "t.jsonl", **data}}, folder=folder))


def questions(rows: tuple[Row, ...]) -> set[str]:
    return {row.question for row in rows}


def test_adding_and_shuffling_rows_moves_no_other_row(tmp_path: Path) -> None:
    rows = [(f"question {n}", f"answer {n}") for n in range(300)]
    first = load(tmp_path, rows)
    more = rows + [(f"another {n}", "x") for n in range(200)]
    random.Random(1).shuffle(more)
    second = load(tmp_path, more)
    for name in ("train", "valid"):
        assert questions(getattr(first, name)) <= questions(getattr(second, name))
    assert questions(first.held_out["sealed"]) <= questions(second.held_out["sealed"])
    assert 15 <= len(first.valid) <= 45
    assert 15 <= len(first.held_out["sealed"]) <= 45


def test_the_same_question_never_straddles_sets(tmp_path: Path) -> None:
    rows = [(f"Question  {n}?" if k else f"question {n}", f"answer {k}") for n in range(60) for k in range(2)]
    found = load(tmp_path, rows)
    keys = [{split.group_key(row) for row in rows} for rows in (found.train, found.valid, *found.held_out.values())]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 60


def test_rows_of_held_out_files_are_dropped_from_training(tmp_path: Path) -> None:
    save(tmp_path, "s.jsonl", '{"question": "QUESTION 3 ?", "answer": "x"}\n')
    found = load(tmp_path, [(f"question {n}", "a") for n in range(20)], sealed="s.jsonl")
    assert "question 3" not in questions(found.train)
    assert ("t.jsonl", 4, "question stands in sealed") in found.dropped
    assert len(found.held_out["sealed"]) == 1


def test_exact_duplicates_are_counted_once(tmp_path: Path) -> None:
    found = load(tmp_path, [("q 1", "a"), ("q 2", "b"), ("Q 1", "a"), ("q 3", "c"), ("q 4", "d"), ("q 5", "e")])
    assert ("t.jsonl", 3, "duplicate") in found.dropped


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_rows(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match=rf"{count} usable rows?; fine-tuning needs at least 4"):
        load(tmp_path, [(f"q {n}", "a") for n in range(count)])


def test_few_rows_still_keep_one_to_select_and_say_when_none_reports(tmp_path: Path) -> None:
    found = load(tmp_path, [(f"q {n}", "a") for n in range(5)])
    assert len(found.valid) >= 1
    assert "sealed" not in found.held_out  # lending it a row would take that row back when another is added
    assert any("No row fell into `sealed`" in note for note in found.notes)
    assert len(found.train) >= 2


# --- templates and masks ---


def test_only_answers_and_their_end_are_trained(tiny_base: Path) -> None:
    tokenizer = models.open_tokenizer(tiny_base)
    row = Row((("system", "S"), ("user", "one?"), ("assistant", "uno"), ("user", "two?"), ("assistant", "dos")), 1)
    encoded = chat.encode(tokenizer, row)
    trained = tokenizer.decode([i for i, on in zip(encoded.ids, encoded.trained, strict=True) if on])
    assert trained == "uno<|im_end|>dos<|im_end|>"
    assert list(encoded.prompt) == chat.prompt_ids(tokenizer, row.messages[:2])


def test_a_template_without_an_end_mark_gets_the_stop_token(tiny_base: Path) -> None:
    tokenizer = models.open_tokenizer(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoded = chat.encode(tokenizer, Row((("user", "q"), ("assistant", "a b")), 1))
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert encoded.trained[-1]
    assert tokenizer.decode(encoded.ids[:-1]).endswith("assistant: a b")


def test_a_base_without_a_template_gets_a_plain_one(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(tiny_base, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    tokenizer = models.open_tokenizer(folder)
    encoded = chat.encode(tokenizer, Row((("user", "q"), ("assistant", "a")), 1))
    assert tokenizer.decode([i for i, on in zip(encoded.ids, encoded.trained, strict=True) if on]) == " a<|im_end|>"


def test_long_rows_are_left_out_not_cut(tiny_base: Path) -> None:
    tokenizer = models.open_tokenizer(tiny_base)
    rows = [Row((("user", "q"), ("assistant", "a " * n)), n) for n in (1, 200)]
    kept = chat.encode_all(tokenizer, rows, 64)
    assert [row.line for row, _ in kept] == [1]


def test_the_system_message_travels_in_the_template(tiny_base: Path) -> None:
    tokenizer = models.open_tokenizer(tiny_base)
    plain = chat.render(tokenizer, (("system", 'Say "hi" {{ now }}\nもし'), ("user", "q")), open_turn=True)
    tokenizer.chat_template = chat.with_system(tokenizer.chat_template, 'Say "hi" {{ now }}\nもし')
    assert chat.render(tokenizer, (("user", "q"),), open_turn=True) == plain
    assert template.render(tokenizer.chat_template, (("user", "q"),), {}) == plain
    assert "other" in chat.render(tokenizer, (("system", "other"), ("user", "q")))
    assert "hi" not in chat.render(tokenizer, (("system", "other"), ("user", "q")))


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ 1/0 }}",
        "{% if %}",
        "x" * 200_000,
        "",
    ],
)
def test_templates_of_strangers_stay_in_their_box(text: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        template.render(text, (("user", "q"),), {})
