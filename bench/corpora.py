"""What `data inspect` finds in real files, against what the files' own documentation says of them.

    python bench/corpora.py --corpora DIR

DIR holds public corpora (MedQuAD, BANKING77, JGLUE, Open-Assistant, Taskmaster, FreeBSD's FAQ, Aozora Bunko, open data of
Japanese cities, ...) with a README.md that counts their rows and defects; the documented figures below are copied from it. Every
file is inspected, and where it holds rows also prepared (nothing is written): each row that was read must be found in a set or
among the dropped ones. The result holds counts alone, no text of any row.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from edgelora import recipe as recipes
from edgelora.data import folder
from edgelora.data.inspect import inspect
from edgelora.data.source import open_source
from edgelora.recipe import Reading

QA = "question, answer"
PLAIN = {"encoding": "utf-8"}
PERSONA = {**PLAIN, "format": "tsv", "layout": "qna-maker", "columns": "Question, Answer, Metadata", "rows": 165}
# file -> (file to look for leaks in, what is documented). A key is a path into the document of `data inspect`.
FILES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "faq_en/medquad_faq.csv": (
        None,
        {
            **PLAIN,
            "columns": f"{QA}, focus, qtype, source, url",
            "rows": 4300,
            "repeats/same/rows": 48,
            "whole records repeated": 30,
            "repeats/question/rows": 960,
            "repeats/contradicted_questions": 493,
            "repeats/answer/rows": 66,
            "odd/line ends inside/texts": 1154,
            "characters/answer/median": 830,
            "characters/answer/most": 14441,
        },
    ),
    "faq_en/freebsd_faq_en.csv": (
        None,
        {
            **PLAIN,
            "columns": f"{QA}, category",
            "rows": 191,
            "odd/line ends inside/texts": 127,
            "odd/placeholders/count": "~20",
            "characters/answer/most": 4808,
        },
    ),
    "faq_en/personality_chat_friendly.tsv": (
        None,
        {**PERSONA, "repeats/question/rows": 2, "repeats/answer/rows": 70, "odd/white space at the ends/texts": 13},
    ),
    "faq_en/personality_chat_humorous.tsv": (
        None,
        {**PERSONA, "repeats/question/rows": 5, "repeats/contradicted_questions": 4, "repeats/answer/rows": 68},
    ),
    "faq_en/personality_chat_professional.tsv": (None, {**PERSONA, "repeats/question/rows": 2, "repeats/answer/rows": 80}),
    "instruct_en/self_instruct_user_oriented.jsonl": (
        None,
        {
            **PLAIN,
            "layout": "instances",
            "rows": 252,
            "repeats/question/rows": 1,
            "odd/no-break spaces/texts": 2,
            "characters/answer/most": 3103,
        },
    ),
    "instruct_en/self_instruct_seed_tasks.jsonl": (
        "instruct_en/self_instruct_user_oriented.jsonl",
        {**PLAIN, "layout": "instances", "rows": 175, "against/same/rows": 2},
    ),
    "instruct_en/dolly_sample_151.jsonl": (
        None,
        {
            **PLAIN,
            "columns": "prompt, answer",
            "rows": 151,
            "odd/templates already applied/texts": 151,
            "odd/special tokens of models/texts": "some",
            "characters/question/most": 9181,
        },
    ),
    "intents/banking77/train.csv": (
        "intents/banking77/test.csv",
        {
            **PLAIN,
            "columns": "text, category",
            "rows": 10003,
            "labels": 77,
            "odd/line ends inside/texts": 10,
            "repeats/question/rows": 4,
            "odd/no-break spaces/texts": 2,
            "characters/question/most": 433,
            "against/same/rows": 7,
            "against/unpunctuated/rows": 11,
        },
    ),
    "intents/banking77/test.csv": (
        None,
        {**PLAIN, "columns": "text, category", "rows": 3080, "labels": 77, "odd/line ends inside/texts": 3, "repeats/question/rows": 1},
    ),
    "intents/banking77/categories.json": (None, {**PLAIN, "format": "json", "rows": 77}),
    "faq_ja/vaccinecert_faq.json": (
        None,
        {
            **PLAIN,
            "format": "json",
            "columns": "No, カテゴリNo, カテゴリ名, カテゴリ内No, 質問, 回答, 更新日",
            "rows": 86,
            "odd/white space at the ends/rows": 7,
            "odd/line ends inside/texts": 44,
            "odd/full-width letters, digits and signs/texts": 52,
        },
    ),
    "faq_ja/freebsd_faq_ja.csv": (
        None,
        {
            **PLAIN,
            "columns": f"{QA}, category",
            "rows": 296,
            "odd/spaces between Japanese words/texts": 271,
            "odd/placeholders/count": "~12",
            "repeats/answer/rows": 1,
        },
    ),
    "qa_ja/jcommonsenseqa_train-v1.3.jsonl": (
        "qa_ja/jcommonsenseqa_valid-v1.3.jsonl",
        {
            **PLAIN,
            "format": "jsonl",
            "layout": "choices",
            "rows": 8939,
            "repeats/same/rows": 31,
            "repeats/question/rows": 110,
            "repeats/contradicted_questions": 58,
            "odd/half-width kana/texts": 5,
            "odd/white space at the ends/texts": 13,
            "odd/control characters/texts": 3,
            "against/same/rows": 19,
        },
    ),
    "qa_ja/jcommonsenseqa_valid-v1.3.jsonl": (None, {**PLAIN, "layout": "choices", "rows": 1119}),
    "qa_ja/jsquad_valid-v1.3.json": (
        None,
        {**PLAIN, "format": "json", "layout": "squad", "rows": 4442, "groups": 59, "repeats/same/rows": 5},
    ),
    "chat/oasst_en_messages.jsonl": (
        None,
        {**PLAIN, "layout": "messages", "rows": 546, "groups": 100, "turns/2": 197, "turns/4": 341, "turns/6": 8},
    ),
    "chat/oasst_en_100_tree.jsonl": (None, {**PLAIN, "layout": "tree", "groups": 100, "rows": 546}),
    "chat/oasst_realistic_seed_data.json": (None, {**PLAIN, "format": "json", "layout": "thread", "records read": 444, "groups": 74}),
    "chat/taskmaster4_data_07.json": (None, {**PLAIN, "format": "json", "layout": "sharegpt", "records read": 210, "left out": "a few"}),
    "lm/wikitext-2-raw_test.txt": (None, {**PLAIN, "format": "text"}),
    "lm/wikitext-2_test.txt": (None, {**PLAIN, "format": "text", "odd/special tokens of models/count": 15218}),
    "lm/wikitext-2_valid.txt": (None, {**PLAIN, "format": "text", "odd/special tokens of models/count": 11718}),
    "lm/tinyshakespeare.txt": (None, {**PLAIN, "format": "text"}),
    "lm/kokoro_ja.txt": (None, {**PLAIN, "format": "text", "odd/ruby/count": 4567, "odd/editor's notes/count": 231}),
    "messy/localgovjp-sjis.csv": (
        None,
        {
            "encoding": "cp932",
            "columns": "pid, pref, cid, city, citykana, lat, lng, url, phrase",
            "records": 1916,
            "odd/full-width letters, digits and signs/count": 826,
            "odd/half-width kana/count": 3,
        },
    ),
    "messy/postal_13TOKYO_sjis_halfkana.csv": (
        None,
        {"encoding": "cp932", "records": 4165, "number of columns": 15, "header": 0, "odd/half-width kana/count": 114894},
    ),
    "messy/takamatsu_0013_bom.csv": (
        None,
        {"encoding": "utf-8-sig", "records": 129, "number of columns": 17, "lines before the header": "some", "left out": 4},
    ),
    "messy/takamatsu_elderly_welfare_embedded_newline.csv": (
        None,
        {**PLAIN, "records": 47, "number of columns": 14, "odd/line ends inside/texts": 2, "odd/ideographic spaces/texts": "some"},
    ),
    "messy/takamatsu_hospital_fullwidth.csv": (
        None,
        {**PLAIN, "records": 628, "number of columns": 16, "odd/full-width letters, digits and signs/count": 2666},
    ),
    "messy/wagahai_aozora_sjis_ruby.txt": (
        None,
        {"encoding": "cp932", "odd/ruby/count": 9217, "odd/editor's notes/count": 460, "odd/characters written as notes (※)/count": 35},
    ),
}
# Where the figures differ, why.
WHY = {
    (
        "faq_en/medquad_faq.csv",
        "repeats/contradicted_questions",
    ): "one question stands with and without a hyphen (Attention Deficit-Hyperactivity)",
    ("faq_en/medquad_faq.csv", "repeats/answer/rows"): "two more answers differ in white space alone",
    (
        "faq_en/personality_chat_humorous.tsv",
        "repeats/contradicted_questions",
    ): "all five repeated questions have answers that differ in their letters",
    ("faq_ja/freebsd_faq_ja.csv", "odd/spaces between Japanese words/texts"): "questions are looked at too: 272 answers and 38 questions",
    ("qa_ja/jsquad_valid-v1.3.json", "repeats/same/rows"): "the context is part of a row here; without it five repeat",
    ("messy/takamatsu_0013_bom.csv", "records"): "8 of the 129 begin with # below the header: notes on the columns, not rows",
    (
        "qa_ja/jcommonsenseqa_train-v1.3.jsonl",
        "repeats/contradicted_questions",
    ): "questions that differ in width or punctuation count as one here",
    ("qa_ja/jcommonsenseqa_train-v1.3.jsonl", "odd/half-width kana/texts"): "the choices are looked at too",
    (
        "qa_ja/jcommonsenseqa_train-v1.3.jsonl",
        "odd/control characters/texts",
    ): "documented as no-break spaces; they are zero-width spaces (U+200B)",
}


def main() -> None:
    import results  # lies beside this script

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True)
    options = parser.parse_args()
    files = [look(options.corpora, name) for name in FILES]
    print("| file | | documented | found | |\n| --- | --- | --- | --- | --- |")
    for one in files:
        for check in one["checks"]:
            print(
                f"| {one['file']} | {check['what']} | {check['documented']} | {check['found']} | {'' if check['agrees'] else check['why']} |"
            )
    checks = [check for one in files for check in one["checks"]]
    agree = f"{sum(check['agrees'] for check in checks)} of {len(checks)}"
    results.save("corpora", "python bench/corpora.py --corpora DIR", (), [["figures that agree", agree]], {"files": files})


def look(corpora: Path, name: str) -> dict[str, Any]:
    """One file: every documented figure beside the one that was found, and what `prepare` makes of its rows."""
    against, documented = FILES[name]
    started = time.process_time()
    found = inspect(corpora / name, Reading(), against=corpora / against if against else None, near=False)
    seconds = time.process_time() - started
    checks = []
    for what, expected in documented.items():
        value = figure(found, what, corpora / name)
        checks.append(
            {"what": what, "documented": expected, "found": value, "agrees": agrees(expected, value), "why": WHY.get((name, what), "")}
        )
    changes: dict[str, int] = {}
    if found["layout"] is not None:
        check, changes = prepared(corpora / name, found["rows"] + figure(found, "left out", corpora / name))
        checks.append(check)
    return {"file": name, "checks": checks, "prepare_changes": changes, "inspect_cpu_seconds": round(seconds, 2)}


def figure(found: dict[str, Any], what: str, file: Path) -> Any:
    """The figure at a path of the document; a few that are computed from it."""
    if what == "columns":
        return ", ".join(found["columns"])
    if what == "number of columns":
        return len(found["columns"])
    if what == "labels":
        return len(found["labels"] or ())
    if what == "left out":
        return sum(one["rows"] for one in found["left_out"].values())
    if what == "lines before the header":
        return len(found["skipped"])
    if what == "odd/white space at the ends/rows":
        return sum(any(text != text.strip() for _, text in row.messages) for row in open_source(file, Reading()).rows())
    if what in ("records read", "whole records repeated"):
        records = [repr(record) for _, record in open_source(file, Reading()).opened.records()]
        return len(records) if what == "records read" else len(records) - len(set(records))
    value: Any = found
    for key in what.split("/"):
        value = value.get(key, value.get(int(key) if key.isdigit() else None, 0)) if isinstance(value, dict) else 0
    return value


def agrees(documented: Any, found: Any) -> bool:
    if documented in ("some", "a few"):
        return bool(found)
    if isinstance(documented, str) and documented.startswith("~"):
        return abs(found - int(documented[1:])) <= 0.2 * int(documented[1:])
    return bool(documented == found)


def prepared(file: Path, read: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Whether every record that was read is in one of the sets or listed as dropped, and how often each cleaning step changed something."""
    data = recipes.Data(train=str(file.absolute()), clean=recipes.Clean(near="none"))
    card = folder.look(data, Path(), licence=None, processes=1, lenient=True, progress=lambda share, text: None)
    found = sum(card["rows"].values()) + sum(card["dropped"].values())
    check = {"what": "prepare: rows kept and dropped", "documented": read, "found": found, "agrees": found == read, "why": ""}
    return check, {step: one["changes"] for step, one in card["changes"].items()}


if __name__ == "__main__":
    main()
