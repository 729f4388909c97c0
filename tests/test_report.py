"""The report: what it says word for word, that nothing hostile gets through, and that what was not measured is not there."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgelora import report
from edgelora.report import estimates, markdown, markup, page, schema, sorting, tables
from tests.report_example import ANSWER, GGUF, MINUS, ONNX, QUESTION, TAGS, Page, example, leaves


@pytest.fixture
def doc() -> dict[str, Any]:
    return example()


ATTRIBUTES = {"lang", "dir", "charset", "name", "content", "http-equiv", "class", "scope", "tabindex", "role", "aria-label"}
ATTRIBUTES |= {
    "viewbox",
    "x",
    "y",
    "x1",
    "x2",
    "y1",
    "y2",
    "cx",
    "cy",
    "r",
    "rx",
    "width",
    "height",
    "points",
    "d",
    "data-by",
    "fill-opacity",
    "text-anchor",
}
UNMEASURED = re.compile(r"\b(None|nan|NaN|inf|null|undefined|Infinity)\b")


# --- words -------------------------------------------------------------------------------------------------------


def test_markdown_word_for_word(doc: dict[str, Any]) -> None:
    assert report.to_markdown(doc).startswith(
        f"""### quickstart

The file that ships: 105.5 MB, 41 % lower loss than the untuned base on paraphrase, 65.3 tok/s on this machine.

**✓ 1 of 1 check passed.**

| File | Format | Runtime | Size | KL, nats a token | Same top token | n | Tokenizer, template | SHA-256 |
| :-- | :-- | :-- | --: | --: | --: | --: | :-- | :-- |
| `{GGUF}` | gguf q4_k_m | llama.cpp | 105.5 MB (predicted: 105.4 MB) | 0.0396 [0.0381, 0.0412] | 91.2 % | 8,245 tokens \
| ✓ both equal | `9f2c4e01aa00` |
| `{ONNX}` | onnx int4-mixed | onnxruntime | 113.6 MB | 0.157 |  | 8,245 tokens | ✗ template differs |  |

| Set | File | Loss, untuned base | Loss, this file | Perplexity | Change | n |
| :-- | :-- | --: | --: | --: | --: | --: |
| paraphrase | `{GGUF}` | 2.914 [2.784, 3.054] | 1.719 [1.629, 1.819] | 5.58 [5.10, 6.17] | {MINUS}41.0 % [{MINUS}45.0, {MINUS}37.6] | 60 rows (4,120 tokens) |

| Set | File | Accuracy, untuned base | Accuracy, this file | n |
| :-- | :-- | --: | --: | --: |
| sealed | `{GGUF}` | 40.8 % | 84.2 % [77.5, 90.0] | 120 rows |

| File | In | Against | Threads | Prompt tokens | Repeats | Decode speed | Time to the first token |
| :-- | :-- | :-- | --: | --: | --: | :-- | :-- |
| `{ONNX}` | onnxruntime | {GGUF} (in llama.cpp) | 1 | 32 | 15 | {MINUS}13.4 % (slower, p = 0.0003) | \\+1.2 % (noise: within 5%) |

<details><summary>Checks</summary>

| Result | Check | Limit | Measured |
| :-- | :-- | --: | --: |
| ✓ passed | size of quickstart-q4_k_m.gguf | <= 130 MB | 105.5 MB |

</details>
"""
    )


def test_markdown_details(doc: dict[str, Any]) -> None:
    text = report.to_markdown(doc)
    speed = "118 ms | 271 | 65.3 | 245.0 MB | 15.1 ms | 47 % (of 14.7 GB/s) | 0.40 |"
    assert f"| `{GGUF}` | llama.cpp | 1 | 32 | 310 ms | {speed}" in text
    assert "- Trained parameters: 4,884,480 of 139,399,488\n- Trained share: 3.50 %\n" in text
    assert "- Peak memory: 2.93 GB (predicted: 3.10 GB)\n- Full fine-tuning, activations apart: predicted: 5.40 GB\n" in text
    assert "- Time: 15 min 11 s (predicted: 14 min 00 s)\n" in text
    assert "| the dequantized 4-bit base (nf4) | 1.743 | 0.000210 [0.000100, 0.000300] | 99.7 % | 16 rows (950 tokens) | ✓ kept |" in text
    assert "```sh\nedgelora run quickstart.yaml\n```" in text


@pytest.mark.parametrize(
    ("change", "low", "high", "words"),
    [
        (-0.31, -0.35, -0.28, "31 % lower loss than the untuned base on paraphrase"),
        (0.052, 0.01, 0.09, "5 % higher loss than the untuned base on paraphrase"),
        (-0.02, -0.06, 0.01, "no loss change that can be told from the untuned base on paraphrase"),
        (-0.31, None, None, "31 % lower loss than the untuned base on paraphrase"),
    ],
)
def test_headline_claims_no_more_than_the_interval(doc: dict[str, Any], change: float, low: Any, high: Any, words: str) -> None:
    doc["losses"][0] |= {"change": change, "change_low": low, "change_high": high}
    for text in (report.to_markdown(doc), report.to_html(doc)):
        assert f"The file that ships: 105.5 MB, {words}, 65.3 tok/s on this machine." in text


def test_headline_speaks_of_the_first_file_only(doc: dict[str, Any]) -> None:
    doc["files"].reverse()  # the ONNX folder ships now; it has neither losses nor a bench
    assert "\nThe file that ships: 113.6 MB.\n" in report.to_markdown(doc)


def test_disturbed_speeds_say_so(doc: dict[str, Any]) -> None:
    assert "disturbed" not in (report.to_html(doc) + report.to_markdown(doc)).lower()
    doc["bench"][0] |= {"noisy": True, "noisy_why": "the repeats' decode medians are 40% apart"}
    text = report.to_markdown(doc)
    assert "65.3 tok/s on this machine (disturbed, see below)." in text
    assert "| ! yes |" in text
    assert f"- {GGUF} in llama.cpp (32 prompt tokens): the repeats' decode medians are 40% apart." in text
    assert "llama.cpp, 1 thread, 32-token prompt, disturbed" in Page(report.to_html(doc)).text


@pytest.mark.parametrize(
    ("results", "words", "cell"),
    [
        ([True, False], "✗ 1 of 2 checks failed", "✗ failed"),
        ([True, None], "! 1 of 2 checks could not be judged", "! not judged"),
        ([True, True], "✓ 2 of 2 checks passed", "✓ passed"),
    ],
)
def test_an_unjudged_check_is_no_pass(doc: dict[str, Any], results: list[Any], words: str, cell: str) -> None:
    doc["checks"] = [{"what": f"check {i}", "ok": ok} for i, ok in enumerate(results)]
    assert f"**{words}.**" in report.to_markdown(doc)
    assert f"| {cell} | check 1 |" in report.to_markdown(doc)
    page = Page(report.to_html(doc))
    assert words in page.text
    assert cell in page.text
    assert (("div", "class", "tile pass") in page.attributes) == (results == [True, True])


def test_page_reads_in_order(doc: dict[str, Any]) -> None:
    page = Page(report.to_html(doc))
    assert page.headings == [
        "Size, quality and speed",
        "Where the MB go",
        "Loss before and after",
        "Labels",
        "Speed on this machine (x86-2core)",
        "Which file is faster",
        "The same file in a browser",
        "Devices",
        "Estimates for other devices",
        "Answers side by side",
        "Which merge was kept",
        "Checks",
        "Training",
        "Machine and versions",
        "Commands to repeat this",
        "Recipe",
        "Notes",
    ]
    for words in (
        "39 % of the 16-bit model (269.1 MB)",
        "best 1.742",
        "32 prompt tokens, 3 runs",
        QUESTION,
        ANSWER,
        "60 rows (4,120 tokens)",
    ):
        assert any(words in text for text in page.text), words
    assert ("bdi", "lang", "ja") in page.attributes
    assert ("html", "lang", "en") in page.attributes
    assert ("meta", "charset", "utf-8") in page.attributes


def test_recipe_is_shown_as_yaml_that_can_be_used_again(doc: dict[str, Any]) -> None:
    doc["recipe"]["data"] = {"held_out": {"paraphrase": "a: b # c.csv"}, "prompt_tokens": [32, 128], "odd: key": "x\ny"}
    page = Page(report.to_html(doc))
    shown = next(text for text in page.text if text.startswith("name: "))
    assert yaml.safe_load(shown) == doc["recipe"]


def test_what_disturbed_all_is_said_once(doc: dict[str, Any]) -> None:
    row = doc["bench"][0] | {"noisy": True}
    others, apart = "other programs ran beside ours", "the repeats' decode medians are 40% apart"
    doc["bench"] = [row | {"noisy_why": others}, row | {"noisy_why": f"{others}; {apart}", "runtime": "x", "prompt_tokens": 128}]
    assert tables.disturbances(doc) == [f"All of it: {others}.", f"{GGUF} in x (128 prompt tokens): {apart}."]


def test_estimates_are_a_device_a_row_and_a_file_a_column(doc: dict[str, Any]) -> None:
    one = doc["estimates"][0]
    other = {
        **one,
        "file": ONNX,
        "runtime": "onnxruntime",
        "decode_tok_per_s": 88.0,
        "low": 22.0,
        "high": 151.0,
        "trust": "not validated: x",
    }
    doc["estimates"] = [one, {**one, "device": "OnePlus 12", "decode_tok_per_s": 453.0, "bandwidth_gb_per_s": 76.8}, other]
    table = estimates.table(doc)
    assert table.titles == (
        "Device",
        f"Estimate, tok/s: {GGUF} in llama.cpp",
        f"Estimate, tok/s: {ONNX} in onnxruntime",
        "Memory bandwidth",
    )
    assert table.rows == (
        ("Raspberry Pi 5", "≈ 100 [78, 130]", "≈ 88 [22, 150]", "17.1 GB/s"),
        ("OnePlus 12", "≈ 450 [78, 130]", "", "76.8 GB/s"),
    )
    assert table.keys == ((None, 101.3, 88.0, 17.1), (None, 453.0, None, 76.8))
    assert estimates.trust(doc) == [
        f"{GGUF} in llama.cpp: a token reads 103.4 MB (62 % of the bandwidth); {one['trust']}.",
        f"{ONNX} in onnxruntime: a token reads 103.4 MB (62 % of the bandwidth); not validated: x.",
    ]


def test_lines_break_after_underscores_of_words_and_not_of_types() -> None:
    assert "".join(markup.breakable("fiat_currency_support")) == "fiat_<wbr>currency_<wbr>support"
    assert markup.breakable("model-q5_k_m.gguf") == ["model-q5_k_m.gguf"]
    assert markup.breakable("") == [""]


def test_a_cell_stacks_its_figure_interval_and_remark() -> None:
    cell = page._cell("0.136 [0.105, 0.180] (+202.8 %, cannot tell)", "right", 0.136)
    below = '<span class="below">[0.105, 0.180]</span><span class="below">(+202.8 %, cannot tell)</span>'
    assert cell == f'<td class="right" data-by="0.136">0.136{below}</td>'
    assert page._cell("5 of 40", "right", None) == '<td class="right">5 of 40</td>'


# --- what is not there -------------------------------------------------------------------------------------------


def test_a_name_alone_makes_no_heading_and_no_placeholder() -> None:
    least = {"schema": 1, "name": "bare"}
    page = Page(report.to_html(least))
    assert page.headings == []
    assert page.words.split() == ["bare", "bare"]  # title and first heading
    assert report.to_markdown(least) == "### bare\n"


@pytest.mark.parametrize("section", sorted(set(schema.REPORT) - {"schema", "name"}))
def test_each_section_can_be_missing_or_alone(doc: dict[str, Any], section: str) -> None:
    without = {key: value for key, value in doc.items() if key != section}
    alone = {key: doc[key] for key in ("schema", "name", section)}
    for part in (without, alone, {**doc, section: None}):
        schema.validate(part, "part")
        assert not UNMEASURED.search(Page(report.to_html(part)).words)
        assert not UNMEASURED.search(report.to_markdown(part))


def test_every_figure_can_be_missing(doc: dict[str, Any]) -> None:
    """Null in place of every single value, NaN and infinity of every number: the words None and nan never appear."""
    for hole in (None, math.nan, math.inf):
        for path in leaves(doc):
            if path[0] in ("schema", "name", "recipe"):
                continue
            broken = json.loads(json.dumps(doc))
            place = broken
            for key in path[:-1]:
                place = place[key]
            if hole is not None and (isinstance(place[path[-1]], str | bool) or place[path[-1]] is None):
                continue
            place[path[-1]] = hole
            page = report.to_html(broken)
            assert not UNMEASURED.search(Page(page).words), path
            assert not re.search(r'="[^"]*\b(nan|inf|None)\b', page), path
            assert not UNMEASURED.search(report.to_markdown(broken)), path


# --- hostile input -----------------------------------------------------------------------------------------------

HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style><iframe src=javascript:alert(1)>",
    "'-->]]><svg/onload=alert(1)>",
    "مرحبا \u202eevil\u202c \u2066x\u2069",
    "bell\x07 escape\x1b[31m null\x00 delete\x7f",
    "W" * 20_000,
    "| a | b |\n| - | - |\n# heading\n```\n[x](y) ![i](j) @everyone <b>",
    "\ud800 lone",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(doc: dict[str, Any], text: str, tmp_path: Path) -> None:
    doc = schema.plain(_replaced(doc, text))
    html = report.to_html(doc)
    page = Page(html)
    assert page.scripts == [sorting.SCRIPT]
    assert page.tags <= TAGS
    assert {name for _, name, _ in page.attributes} <= ATTRIBUTES
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert markup.visible(doc["answers"][0]["question"]) in page.words
    paths = report.write(doc, tmp_path)
    assert report.read(paths["json"]) == doc
    assert len(report.to_markdown(doc)) <= 65_536
    shown = re.sub(r"^(`{3,})sh\n(.*\n)\1$", "", report.to_markdown(doc), flags=re.M)  # a command in a code block is inert
    assert "<script" not in shown
    assert "<img" not in shown
    assert "<iframe" not in shown
    assert "<b>" not in shown
    assert "@everyone" not in shown
    assert not re.search(r"(?<!\\)\[x\]\(y\)", shown)
    for table in re.findall(r"(?:^\|.*\n)+", shown, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1  # no cell broke out of its row


def _replaced(value: Any, text: str) -> Any:
    """`value` with every text in it, names and keys of files included, replaced."""
    if isinstance(value, dict):
        return {text if key == GGUF else key: _replaced(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, text) for item in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("<b> &amp; a < b", "&lt;b> &amp;amp; a < b"),
        ("q4_k_m _x_ *y*", r"q4_k_m \_x\_ \*y\*"),
        ("[0.1, 0.2] [x](y) [1](y)", r"[0.1, 0.2] \[x](y) \[1](y)"),
        ("a|b\nc", r"a\|b c"),
        ("# 1. - x", r"\# 1. - x"),
        ("1. x", r"\1. x"),
        ("\u202ex", "⟨U+202E⟩x"),
    ],
)
def test_markdown_escapes_what_means_something_and_no_more(text: str, escaped: str) -> None:
    assert markdown.escape(text) == escaped


def test_page_reaches_for_nothing(doc: dict[str, Any]) -> None:
    for html in (report.to_html(doc), report.to_html(report.compare([doc, doc]))):
        assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|url\(|@import|<link|<iframe|\bon\w+=", html, re.I)
        page = Page(html)
        assert page.scripts == [sorting.SCRIPT]  # ours, and its hash is the one that the policy allows
        own = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
        policy = next(value for tag, name, value in page.attributes if tag == "meta" and name == "content")
        assert policy == (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{own}'; img-src data:; base-uri 'none'; form-action 'none'"
        )


def test_a_long_answer_is_folded_and_whole(doc: dict[str, Any]) -> None:
    words = "".join(chr(ord("a") + i % 26) for i in range(5000))
    doc["answers"][0]["before"] = words
    page = Page(report.to_html(doc))
    i = page.text.index(words[:600] + "…")
    assert page.text[i + 1 : i + 3] == ["4,400 more characters", words[600:]]


@pytest.mark.parametrize("seed", range(60))
def test_any_document_of_the_schema_can_be_shown(seed: int) -> None:
    rng = random.Random(seed)
    doc = {**_random(schema.REPORT, rng), "schema": 1, "name": "n"}
    doc.pop("kind", None)
    for row in doc.get("bench") or []:
        if row and row.get("emulated"):  # such a row holds no figure
            row.update(dict.fromkeys(schema.MEASURED))
    schema.validate(doc, "it")
    for shown in (doc, report.compare([doc, {**_random(schema.REPORT, rng), "schema": 1, "name": "n"}])):
        html = report.to_html(shown)
        page = Page(html)
        assert page.tags <= TAGS
        assert not UNMEASURED.search(page.words)
        for _, name, value in page.attributes:
            if name in {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"} and value != "device-width":
                assert -1000 < float(value or "") < 1e5, (name, value)
        assert not UNMEASURED.search(report.to_markdown(shown))
        assert json.loads(report.to_json(shown)) == schema.plain(shown)


def _random(kind: Any, rng: random.Random) -> Any:
    if rng.random() < 0.12:
        return None if not isinstance(kind, dict) or kind is not schema.REPORT else {}
    if isinstance(kind, list):
        return [_random(kind[0], rng) for _ in range(rng.choice([0, 1, 2, 5]))]
    if isinstance(kind, dict):
        named = [(key if isinstance(key, str) else rng.choice("ab"), value) for key, value in kind.items()]
        return {key: _random(value, rng) for key, value in named if rng.random() < 0.85}
    if kind is bool:
        return rng.random() < 0.5
    if kind is int:
        return rng.choice([0, 1, -1, 7, 10**6, 10**18, -(10**18), rng.randrange(10**9)])
    if kind is float:
        return rng.choice([0.0, -0.0, 1e-300, -1e-13, 1e18, -1e18, 0.5, 1, rng.random(), rng.gauss(0, 100)])
    return rng.choice(["", "a", "b", "q4_0", "f16", "x" * 80])
