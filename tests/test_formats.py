"""Every format and every layout, found out and as asked for."""

from __future__ import annotations

import csv
import importlib
import io
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from edgelora.data.files import FORMATS
from edgelora.data.layouts import LAYOUTS
from edgelora.data.row import Row
from edgelora.data.source import Source, open_source
from edgelora.errors import DataError
from edgelora.recipe import Reading

QA = [("Where?", "Here."), ("When, exactly?", 'At "nine"\nsharp.'), ("どこ？", "ここ。")]


def source(folder: Path, name: str, content: str | bytes, lenient: bool = False, **reading: Any) -> Source:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return open_source(file, Reading(**reading), lenient=lenient)


def pairs(found: Source) -> list[tuple[str, str]]:
    return [(row.question, row.answer) for row in found.rows()]


def table(rows: list[Any], **dialect: Any) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, **dialect).writerows(rows)
    return stream.getvalue()


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def test_every_entry_imports_and_a_recipe_can_name_it() -> None:
    hints = typing.get_type_hints(Reading)
    for names, hint in ((FORMATS, hints["format"]), (LAYOUTS, hints["layout"])):
        assert [name for part in typing.get_args(hint) for name in typing.get_args(part)] == list(names)
    assert all(callable(importlib.import_module(module).open_file) for module in FORMATS.values())
    for module in LAYOUTS.values():
        assert callable(importlib.import_module(module).mapping)
        assert callable(importlib.import_module(module).rows)


# --- CSV and its like ---


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_delimiters(tmp_path: Path, delimiter: str, suffix: str, ending: str) -> None:
    rows = [("question", "answer", "note"), *((*pair, "x") for pair in QA)]
    found = source(tmp_path, f"a{suffix}", table(rows, delimiter=delimiter, lineterminator=ending))
    assert (found.delimiter, pairs(found)) == (delimiter, QA)


def test_tabs_without_quoting_keep_their_quotation_marks(tmp_path: Path) -> None:
    found = source(tmp_path, "a.tsv", 'question\tanswer\n"Hi" he said\t"Yes"\nA "b"\tc\n')
    assert pairs(found) == [('"Hi" he said', '"Yes"'), ('A "b"', "c")]


def test_mixed_quoting_and_line_ends_in_cells(tmp_path: Path) -> None:
    found = source(tmp_path, "a.csv", 'question,"answer"\r\n"a\nb",c\r\nd,"e ""f"""\r\n')
    assert pairs(found) == [("a\nb", "c"), ("d", 'e "f"')]
    assert [row.line for row in found.rows()] == [2, 4]


def test_lines_before_the_header(tmp_path: Path) -> None:
    found = source(tmp_path, "a.csv", "#LINK,,\n#license,CC-BY,\n#property,question,answer\n#type,string,string\n1,Q,A\n")
    assert (found.opened.header, found.opened.skipped, pairs(found)) == (3, (1, 2), [("Q", "A")])
    assert found.columns == ("#property", "question", "answer")
    titled = source(tmp_path, "b.csv", "Our FAQ 2024\n\n件名,内容,備考\nQ,A,x\n", question="件名", answer="内容")
    assert (titled.opened.header, pairs(titled)) == (3, [("Q", "A")])


def test_no_header(tmp_path: Path) -> None:
    text = '13101,"100  ",ﾄｳｷﾖｳ\n13101,"102  ",ﾁﾖﾀﾞ\n'
    found = source(tmp_path, "a.csv", text)
    assert (found.opened.header, found.columns, found.layout) == (0, ("column 1", "column 2", "column 3"), None)
    with pytest.raises(DataError, match="no column looks like the question"):
        list(found.rows())
    assert pairs(source(tmp_path, "a.csv", text, question="column 2", answer="column 3")) == [("100  ", "ﾄｳｷﾖｳ"), ("102  ", "ﾁﾖﾀﾞ")]
    asked = source(tmp_path, "b.csv", "Where?,Here.\nWhen?,Now.\n", header=0, question="column 1", answer="column 2")
    assert pairs(asked) == [("Where?", "Here."), ("When?", "Now.")]


def test_too_many_cells_are_an_error_or_a_listed_row(tmp_path: Path) -> None:
    text = "question,answer\nWhat, exactly?,It\nQ,A\n"
    with pytest.raises(DataError, match=r"a.csv line 2: 3 cells for 2 columns"):
        list(source(tmp_path, "a.csv", text).rows())
    found = source(tmp_path, "a.csv", text, lenient=True)
    assert (pairs(found), found.dropped) == ([("Q", "A")], [(2, "3 cells for 2 columns")])


# --- Excel and Parquet ---


def workbook(file: Path, rows: list[Any], title: str = "FAQ") -> None:
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = title
    for row in rows:
        sheet.append(row)
    book.create_sheet("other").append(["question", "answer"])
    book.save(file)


def test_excel(tmp_path: Path) -> None:
    import datetime

    file = tmp_path / "a.xlsx"
    workbook(
        file,
        [["title"], [], ["質問", "回答", "n"], ["Q", 3.0], ["When?", datetime.datetime(2024, 5, 1)], ["", ""], ["どこ", "ここ"], [None]],
    )
    found = open_source(file, Reading())
    assert pairs(found) == [("Q", "3"), ("When?", "2024-05-01"), ("どこ", "ここ")]
    assert (found.format, found.opened.sheet, found.opened.header, found.dropped) == ("xlsx", "FAQ", 3, [(6, "empty")])
    with pytest.raises(DataError, match="has no sheet 'x'") as caught:
        open_source(file, Reading(sheet="x"))
    assert "FAQ, other" in caught.value.hint
    with pytest.raises(DataError, match="holds no rows"):
        open_source(file, Reading(sheet="other"))


def test_formulas_are_never_evaluated(tmp_path: Path) -> None:
    file = tmp_path / "a.xlsx"
    workbook(file, [["question", "answer"], ["Q", "A"], ["Sum?", "=1+1"]])
    with pytest.raises(DataError, match="row 3: cell B3 is a formula whose value was not saved"):
        list(open_source(file, Reading()).rows())
    found = open_source(file, Reading(), lenient=True)
    assert (pairs(found), [line for line, _ in found.dropped]) == ([("Q", "A")], [3])


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QA]
    for columns in ({"question": [q for q, _ in QA], "answer": [a for _, a in QA]}, {"messages": turns}):
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        assert pairs(open_source(file, Reading())) == QA


def test_contents_outweigh_a_wrong_suffix(tmp_path: Path) -> None:
    assert source(tmp_path, "a.json", jsonl({"q": "1", "a": "2"}, {"q": "3", "a": "4"})).format == "jsonl"
    assert source(tmp_path, "a.jsonl", json.dumps([{"q": "1", "a": "2"}], indent=1)).format == "json"
    workbook(tmp_path / "b.csv", [["question", "answer"], ["Q", "A"]])
    assert open_source(tmp_path / "b.csv", Reading()).format == "xlsx"
    assert source(tmp_path, "a.dat", "question,answer\nQ,A\n", format="csv").format == "csv"
    for head, what in ((b"\xd0\xcf\x11\xe0", "old Excel"), (b"\x1f\x8b", "compressed"), (b"%PDF", "PDF")):
        with pytest.raises(DataError, match=what):
            source(tmp_path, "c.csv", head)


# --- JSON ---


def test_a_list_is_read_a_row_at_a_time(tmp_path: Path) -> None:
    rows = [{"question": f"q{n} " + "x" * (n % 700), "answer": '\\" ]}{[,'} for n in range(3000)]
    for content in (json.dumps(rows), json.dumps(rows, indent=2), json.dumps({"version": [1], "data": rows, "n": {"x": []}})):
        assert pairs(source(tmp_path, "a.json", content)) == [(row["question"], row["answer"]) for row in rows]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"q": 1, "a": 2},\n{"q": 1', r"line 2: not JSON \(Expecting ',' delimiter\)"),
        ('[{"q": 1, "a": 2}\n{"q": 1, "a": 2}]', r"line 2: not JSON \(expected ',' or '\]' after a row\)"),
        ('[{"q": 1, "a": 2}', "not JSON"),
        ('[{"q": 1, "a": 2}] []', "more after the end"),
        ("[" * 10_000 + "]" * 10_000, "line 1: nested too deeply"),
        ('[{"q": ' + "[" * 10_000 + "]" * 10_000 + "}]", "line 1: nested too deeply"),
        ('[{"q": 1' + "0" * 5000 + "}]", "not a usable number"),
        ("{", "not JSON"),
        ("[1]", "row 1: expected an object, found int"),
    ],
)
def test_broken_lists(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(source(tmp_path, "a.json", content).rows())


def test_half_characters_are_left_out(tmp_path: Path) -> None:
    found = source(tmp_path, "a.jsonl", '{"q": "\\ud83d", "a": "x"}\n{"q": "\\ud83d\\ude00", "a": "y"}\n')
    assert (pairs(found), found.dropped) == ([("😀", "y")], [(1, "half a character (a lone surrogate)")])


# --- layouts ---

U, A = "user", "assistant"
LAYOUT_CASES: list[tuple[str, list[Any], list[tuple[Any, str | None]]]] = [
    (
        "messages",
        [{"tree_id": "t", "messages": [{"role": U, "content": "a"}, {"role": A, "content": [{"type": "text", "text": "b"}]}]}],
        [(((U, "a"), (A, "b")), "conversation:t")],
    ),
    (
        "messages",
        [{"prompt": [{"role": U, "content": "a"}], "completion": [{"role": A, "content": "b"}]}],
        [(((U, "a"), (A, "b")), None)],
    ),
    (
        "sharegpt",
        [{"id": 7, "conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        [(((U, "a"), (A, "b")), "conversation:7")],
    ),
    (
        "sharegpt",
        [{"conversation_id": "c", "utterances": [{"speaker": U, "text": "a"}, {"speaker": A, "text": "b"}]}],
        [(((U, "a"), (A, "b")), "conversation:c")],
    ),
    (
        "tree",
        [
            {
                "message_tree_id": "t",
                "prompt": {
                    "text": "a",
                    "role": "prompter",
                    "replies": [
                        {"text": "b", "role": A, "replies": [{"text": "c", "role": "prompter", "replies": []}]},
                        {"text": "d", "role": A, "replies": []},
                    ],
                },
            }
        ],
        [(((U, "a"), (A, "b")), "conversation:t"), (((U, "a"), (A, "d")), "conversation:t")],
    ),
    (
        "thread",
        [
            {"message_id": 3, "parent_id": 2, "text": "c", "role": "prompter"},
            {"message_id": 1, "parent_id": None, "text": "a", "role": "prompter"},
            {"message_id": 2, "parent_id": 1, "text": "b", "role": A},
            {"message_id": 4, "parent_id": 3, "text": "d", "role": A},
            {"message_id": 5, "parent_id": 1, "text": "e", "role": A},
        ],
        [(((U, "a"), (A, "b"), (U, "c"), (A, "d")), "conversation:1"), (((U, "a"), (A, "e")), "conversation:1")],
    ),
    (
        "squad",
        [
            {
                "title": "T",
                "paragraphs": [{"context": "C", "qas": [{"question": "a", "answers": [{"text": "b"}]}, {"question": "x", "answers": []}]}],
            }
        ],
        [(((U, "C\n\na"), (A, "b")), "document:T")],
    ),
    (
        "squad",
        [{"context": "C", "question": "a", "answers": {"text": ["b"], "answer_start": [0]}}],
        [(((U, "C\n\na"), (A, "b")), "document:C")],
    ),
    (
        "instances",
        [{"instruction": "i", "instances": [{"input": "x", "output": "y"}, {"input": "", "output": "z"}]}],
        [(((U, "i\n\nx"), (A, "y")), "question:i"), (((U, "i"), (A, "z")), "question:i")],
    ),
    (
        "choices",
        [{"question": "a", "choice0": "x", "choice1": "y", "label": 1}],
        [(((U, "a\n1. x\n2. y"), (A, "y")), "question:a")],
    ),
    ("alpaca", [{"instruction": "i", "input": "x", "output": "y"}], [(((U, "i\n\nx"), (A, "y")), None)]),
    (
        "qna-maker",
        [{"Question": "a", "Answer": "b\\nc", "QnaId": 4}],
        [(((U, "a"), (A, "b\nc")), "conversation:4")],
    ),
    ("pairs", [{"prompt": "a", "completion": "b"}], [(((U, "a"), (A, "b")), None)]),
    ("pairs", [{"text": "a", "label": 1}], [(((U, "a"), (A, "1")), None)]),
    ("text", [{"text": "a"}], [((("text", "a"),), None)]),
]


@pytest.mark.parametrize(("layout", "records", "expected"), LAYOUT_CASES)
def test_layouts(tmp_path: Path, layout: str, records: list[Any], expected: list[tuple[Any, str | None]]) -> None:
    for name, content in (("a.jsonl", jsonl(*records)), ("a.json", json.dumps(records))):
        for asked in (None, layout):
            found = source(tmp_path, name, content, layout=asked)
            assert found.layout == layout
            assert [(row.messages, row.group) for row in found.rows()] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (jsonl({"messages": [{"role": U, "content": "a"}]}, {"messages": 3}), "line 2: `messages` is not a list"),
        (jsonl({"conversations": [{"from": "human", "value": "a"}]}, {"conversations": [3]}), "line 2: '3' is not a message"),
        (jsonl({"prompt": {"text": "a", "role": "x", "replies": []}}), "line 1: not a tree of messages"),
        (jsonl({"id": 1, "parent_id": None, "text": "a", "role": "x"}), "line 1: role 'x' is not known"),
        (jsonl({"paragraphs": [{"context": "C"}]}), "line 1: not an article"),
        (jsonl({"instruction": "a", "instances": "b"}), "line 1: `instances` is not a list"),
        (
            jsonl({"question": "a", "choice0": "x", "choice1": "y", "label": 1}, {"question": "a", "label": 7}),
            "line 2: label '7' names none",
        ),
        (jsonl({"id": 1, "parent_id": 2, "text": "a", "role": A}, {"id": 2, "parent_id": 1, "text": "a", "role": A}), "none of its"),
    ],
)
def test_broken_records_name_their_line(tmp_path: Path, content: str, message: str) -> None:
    from edgelora.data.read import read

    found = source(tmp_path, "a.jsonl", content)
    with pytest.raises(DataError, match=message):
        read(found.path)


def test_asked_columns(tmp_path: Path) -> None:
    text = "title,body,topic\nT,B,x\n"
    assert pairs(source(tmp_path, "a.csv", text, question="title", answer="topic", context="body")) == [("T\n\nB", "x")]
    assert [row.group for row in source(tmp_path, "a.csv", text, question="title", answer="body", group="topic").rows()] == [
        "conversation:x"
    ]
    with pytest.raises(DataError, match="has no column 'none'"):
        source(tmp_path, "a.csv", text, question="none")
    with pytest.raises(DataError, match="is not of the layout squad"):
        source(tmp_path, "a.csv", text, layout="squad")


def test_text_is_paragraphs(tmp_path: Path) -> None:
    found = source(tmp_path, "a.txt", "one\ntwo\n\n\nthree\n" + "four\n" * 1000)
    rows = list(found.rows())
    assert [row.line for row in rows] == [1, 5, 505, 1005]
    assert rows[0] == Row((("text", "one\ntwo"),), 1)
    assert rows[0].question == "one\ntwo"
