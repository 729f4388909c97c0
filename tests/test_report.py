"""The report: what it says word for word, that nothing hostile gets through, and that what was not measured is not there."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgelora import report
from edgelora.errors import DiskFull, EdgeloraError, ModelError, UsageError
from edgelora.report import contract, figures, fronts, markdown, markup, plot, schema, sorting

GGUF, ONNX = "quickstart-q4_k_m.gguf", "quickstart-int4-mixed-onnx"
QUESTION, ANSWER = "荷物が届かない場合はどうすればよいですか。", "「注文履歴」から調査を依頼してください。"


@pytest.fixture
def doc() -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "quickstart",
        "created": "2026-11-23",
        "edgelora": "0.1.0",
        "commit": "abc1234",
        "machine": {"class": "x86-2core", "cpu": "AMD EPYC", "cores": 2, "memory_bytes": 24_300_000_000, "gpu": None, "load_average": 0.42},
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "recipe": {"name": "quickstart", "train": {"r": 16, "lr": 2e-4}, "exports": [{"format": "gguf", "type": None}], "budgets": {}},
        "training": {
            "method": "qlora",
            "base": "SmolLM2-135M-Instruct",
            "trained_parameters": 4_884_480,
            "total_parameters": 139_399_488,
            "trained_share": 0.03504,
            "rows": 1204,
            "tokens": 182_344,
            "epochs": 3.0,
            "curve": [{"step": i, "loss": 1.5 + 1.4 * math.exp(-i / 20)} for i in range(1, 61)],
            "valid_curve": [{"step": 20, "loss": 2.11}, {"step": 40, "loss": 1.742}, {"step": 60, "loss": 1.78}],
            "predicted": {"peak_rss_bytes": 3_100_000_000, "seconds": 840},
            "measured": {"peak_rss_bytes": 2_930_000_000, "seconds": 911.4, "tokens_per_s": 600.3},
            "full_finetune_bytes": 5_400_000_000,
            "model_16bit_bytes": 269_100_000,
            "notes": ["Stopped after epoch 3."],
        },
        "merge": {
            "kept": "nf4",
            "why": "It is closest to the model as trained.",
            "candidates": [
                {
                    "base": "nf4",
                    "loss": 1.7431,
                    "kl": 0.00021,
                    "kl_low": 0.0001,
                    "kl_high": 0.0003,
                    "top1": 0.997,
                    "rows": 16,
                    "tokens": 950,
                },
                {"base": "16bit", "loss": 1.8562, "kl": 0.277, "top1": 0.751},
            ],
        },
        "files": [
            {
                "file": GGUF,
                "format": "gguf",
                "type": "q4_k_m",
                "runtime": "llama.cpp",
                "size_bytes": 105_461_344,
                "predicted_bytes": 105_400_000,
                "kl": 0.03961,
                "kl_low": 0.0381,
                "kl_high": 0.0412,
                "top1": 0.912,
                "tokens": 8245,
                "tokens_equal": True,
                "template_equal": True,
                "sha256": "9f2c4e01aa" + "0" * 54,
                "parts": {
                    "embedding": {"Q8_0": 30_081_024},
                    "attention": {"Q4_K": 20_000_000, "Q6_K": 5_000_000},
                    "metadata": {"-": 380_320},
                },
            },
            {
                "file": ONNX,
                "format": "onnx",
                "type": "int4-mixed",
                "runtime": "onnxruntime",
                "size_bytes": 113_600_000,
                "kl": 0.157,
                "tokens": 8245,
                "tokens_equal": True,
                "template_equal": False,
            },
        ],
        "losses": [
            {
                "set": "paraphrase",
                "file": GGUF,
                "rows": 60,
                "tokens": 4120,
                "before": {"loss": 2.914, "low": 2.784, "high": 3.054},
                "after": {"loss": 1.719, "low": 1.629, "high": 1.819},
                "change": -0.4101,
                "change_low": -0.45,
                "change_high": -0.376,
            }
        ],
        "confusion": [{"set": "sealed", "file": GGUF, "labels": ["card", "fee"], "counts": [[50, 10], [9, 51]]}],
        "accuracy": [{"set": "sealed", "file": GGUF, "rows": 120, "before": 0.408, "after": 0.842, "low": 0.775, "high": 0.9}],
        "answers": [{"question": QUESTION, "before": "荷物 is a Japanese word.", "after": {GGUF: ANSWER}}],
        "bench": [
            {
                "file": GGUF,
                "runtime": "llama.cpp",
                "threads": 1,
                "prompt_tokens": 32,
                "load_ms": 310.2,
                "ttft_ms": 118.4,
                "prefill_tok_per_s": 271.3,
                "decode_tok_per_s": 65.27,
                "peak_rss_bytes": 245_000_000,
                "cpu_s_per_token": 0.0151,
                "load_average": 0.4,
                "bandwidth_gb_per_s": 14.7,
                "bandwidth_share": 0.47,
                "samples_ms": {"ttft": [117.0, 118.4, 131.0], "decode": [15.1, 15.3, 15.6]},
            }
        ],
        "estimates": [
            {
                "file": GGUF,
                "runtime": "llama.cpp",
                "device": "Raspberry Pi 5",
                "decode_tok_per_s": 101.3,
                "low": 77.8,
                "high": 131.2,
                "bytes_per_token": 103_400_000,
                "bandwidth_gb_per_s": 17.1,
                "efficiency": 0.62,
                "validated": True,
                "trust": "leaving each of 4 published figures on 1 device out: at most 10% off",
                "source": "LPDDR4X-4267, 32 bits wide",
            }
        ],
        "checks": [{"what": f"size of {GGUF}", "limit": "<= 130 MB", "value": "105.5 MB", "ok": True}],
        "commands": ["edgelora run quickstart.yaml"],
        "notes": ["Other work ran on this machine."],
    }


class Page(HTMLParser):
    """Tags and attributes as a browser would see them; fails on a tag that is not closed in its order."""

    VOID = frozenset({"meta", "br", "col", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.prose: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text.append(data)
            if self.open[-1] != "code":  # a recipe may say null
                self.prose.append(data)
            if self.open[-1] == "h2":
                self.headings.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.prose)


TAGS = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "h1", "h2", "h3", "p", "div"}
TAGS |= {"span", "i", "bdi", "figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "pre", "code"}
TAGS |= {"details", "summary", "svg", "text", "rect", "line", "circle", "polyline", "path", "script", "wbr"}
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
MINUS = "\u2212"
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
    assert f"- {GGUF} (32 prompt tokens): the repeats' decode medians are 40% apart." in text
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
        for path in _leaves(doc):
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


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value[:3])
        return [leaf for key, item in items for leaf in _leaves(item, (*path, key))]
    return [path]


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


# --- JSON and files ----------------------------------------------------------------------------------------------


def test_json_round_trip_keeps_every_number(doc: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads(report.to_json(doc)) == doc
    paths = report.write(doc, tmp_path / "new" / "folder")
    assert report.read(paths["json"]) == doc
    assert report.read(tmp_path / "new" / "folder") == doc
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["report.html", "report.json", "report.md"]
    assert QUESTION in paths["json"].read_text(encoding="utf-8")  # readable, not escaped


def test_not_a_number_becomes_null(doc: dict[str, Any]) -> None:
    doc["files"][0]["kl"] = math.nan
    doc["training"]["curve"][5]["loss"] = math.inf
    back = json.loads(report.to_json(doc))
    assert back["files"][0]["kl"] is None
    assert back["training"]["curve"][5]["loss"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "{path} is not a report: it holds a list of 2, not a JSON object"),
        ("{", "{path} is not a report: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"schema": 1, "name": NaN}', "{path} is not a report: NaN is not a JSON number"),
        ('{"schema": 2, "name": "a"}', "{path} has schema 2, this edgelora reads schema 1"),
        ('{"name": "a"}', "{path} has schema None, this edgelora reads schema 1"),
        ('{"schema": 1}', "{path} is damaged: name: missing"),
        ('{"schema": 1, "name": 7}', "{path} is damaged: name: 7 is not text"),
        ('{"schema": 1, "name": "a", "files": {}}', "{path} is damaged: files: an object of 0 is not a list"),
        (
            '{"schema": 1, "name": "a", "files": [{}, {"size_bytes": "9 MB", "kl": true}]}',
            "{path} is damaged: files[1].size_bytes: '9 MB' is not a whole number (and 1 more)",
        ),
        ('{"schema": 1, "name": "a", "training": {"curve": [7]}}', "{path} is damaged: training.curve[0]: 7 is not an object"),
        ('{"schema": 1, "name": "a", "bench": [{"ttft_ms": 1e999}]}', "{path} is damaged: bench[0].ttft_ms: inf is not a number"),
        ('{"schema": 1, "name": "a", "checks": [{"ok": 1}]}', "{path} is damaged: checks[0].ok: 1 is not true or false"),
        (
            '{"schema": 1, "name": "a", "machine": {"cores": 1' + "0" * 400 + "}}",
            "{path} is damaged: machine.cores: a number above 1e18 is not a whole number",
        ),
    ],
)
def test_read_names_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        report.read(path)
    assert caught.value.message == message.format(path=path)
    assert caught.value.hint


def test_read_refuses_what_it_should_not_parse(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(ModelError, match="there is no report at"):
        report.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="is not a report: 'utf-8' codec"):
        report.read(path)
    path.write_text('{"schema": 1, "name": "a", "recipe": ' + '{"a": ' * 100 + "1" + "}" * 101, encoding="utf-8")
    with pytest.raises(ModelError, match="nested more than 24 levels deep"):
        report.read(path)
    path.write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(ModelError, match="is not a report"):
        report.read(path)
    with path.open("wb") as stream:
        stream.truncate(report.MAX_BYTES + 1)  # sparse: takes no room
    with pytest.raises(ModelError, match="is larger than 64 MiB"):
        report.read(path)


def test_write_refuses_what_read_would_refuse(doc: dict[str, Any], tmp_path: Path) -> None:
    doc["files"][0]["size_bytes"] = "105 MB"
    with pytest.raises(ModelError, match=re.escape("the report is damaged: files[0].size_bytes: '105 MB' is not a whole number")):
        report.write(doc, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_report(doc: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write(doc, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        report.write({**doc, "name": "other"}, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_write_into_a_file_is_a_clear_error(doc: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(EdgeloraError, match=r"cannot write the report into .*taken: File exists"):
        report.write(doc, tmp_path / "taken")


def test_needs_only_the_standard_library() -> None:
    code = "import sys, edgelora.report; print(sorted({m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    loaded = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert loaded.stdout.strip() == "['__main__', 'edgelora']"


def test_json_schema_accepts_what_validate_accepts(doc: dict[str, Any]) -> None:
    """Every key of the schema is in it, with its meaning where a name does not tell, and real documents satisfy it."""
    found = report.json_schema()
    assert found["$defs"]["report"]["properties"]["schema"]["const"] == schema.SCHEMA
    assert _named(found["$defs"]["report"]) == _keys(schema.REPORT)
    assert set(contract._MEANINGS) <= {key for path in (*_keys(schema.REPORT), *_keys(schema.COMPARISON)) for key in path}
    compared = report.compare([doc, doc])
    for document, name, other in ((doc, "report", "comparison"), (compared, "comparison", "report")):
        assert list(_violations(found["$defs"][name], document)) == []
        assert list(_violations(found["$defs"][other], document)) != []
    for path in _leaves(doc):
        broken = json.loads(json.dumps(doc))
        place = broken
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = {"no": "such thing"}
        if path[0] != "recipe":
            assert list(_violations(found["$defs"]["report"], broken)), path
            with pytest.raises(ModelError):
                schema.validate(broken, "it")


def _keys(kind: Any, at: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if isinstance(kind, list):
        return _keys(kind[0], at)
    if not isinstance(kind, dict) or str in kind:
        return {at}
    return {path for key, inner in kind.items() for path in _keys(inner, (*at, key))}


def _named(made: dict[str, Any], at: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if "items" in made:
        return _named(made["items"], at)
    return {path for key, inner in made["properties"].items() for path in _named(inner, (*at, key))} if "properties" in made else {at}


def _violations(made: dict[str, Any], value: Any, at: str = "") -> Any:
    """The part of JSON Schema that ours uses."""
    if "const" in made and value != made["const"]:
        yield at
    types = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict, "null": type(None)}
    named = [made["type"]] if isinstance(made.get("type"), str) else made.get("type", list(types))
    if not any(isinstance(value, types[n]) and not (isinstance(value, bool) and n in ("integer", "number")) for n in named):
        yield at
    if isinstance(value, list) and "items" in made:
        for item in value:
            yield from _violations(made["items"], item, f"{at}[]")
    if isinstance(value, dict):
        yield from (f"{at}.{key}" for key in made.get("required", ()) if key not in value)
        if "not" in made and not list(_violations(made["not"], value)):
            yield at
        for key, item in value.items():
            inner = made.get("properties", {}).get(key, made.get("additionalProperties"))
            if inner is not None:
                yield from _violations(inner, item, f"{at}.{key}")


# --- comparison --------------------------------------------------------------------------------------------------


def test_comparison_joins_by_type_and_shows_the_change(doc: dict[str, Any], tmp_path: Path) -> None:
    other = json.loads(json.dumps(doc))
    other["commit"] = "def5678"
    other["files"] = [{"file": "renamed.gguf", "format": "gguf", "type": "q4_k_m", "size_bytes": 98_100_000, "kl": 0.0515, "top1": 0.9}]
    other["losses"][0] |= {"file": "renamed.gguf", "after": {"loss": 1.8, "low": 1.7, "high": 1.9}}
    other["bench"][0] |= {"file": "renamed.gguf", "decode_tok_per_s": 69.9}
    joined = report.compare([doc, other])
    rows = {(row["type"], row["what"]): row["values"] for row in joined["rows"]}
    assert rows["q4_k_m", "size"] == [105_461_344, 98_100_000]
    assert rows["q4_k_m", "loss on paraphrase"] == [1.719, 1.8]
    assert rows["q4_k_m", "decode (llama.cpp, 1 thread, 32-token prompt)"] == [65.27, 69.9]
    assert rows["int4-mixed", "size"] == [113_600_000, None]
    text = report.to_markdown(joined)
    assert text.startswith("### Comparison of 2 runs: quickstart abc1234 / quickstart def5678\n")
    assert "| Measure | quickstart abc1234 | quickstart def5678 |" in text
    assert f"| size | 105.5 MB | 98.1 MB ({MINUS}7.0 %) |" in text
    assert "| KL to the trained model | 0.0396 [0.0381, 0.0412] | 0.0515 (+30.0 %) |" in text
    assert f"| same top token | 91.2 % | 90.0 % ({MINUS}1.2 points) |" in text
    page = Page(report.to_html(joined))
    assert page.headings == [
        "What really differs",
        "What is noise",
        "Runs",
        "Size and quality",
        "gguf q4_k_m",
        "onnx int4-mixed",
    ]
    assert page.tags <= TAGS
    paths = report.write(joined, tmp_path)
    assert paths["html"].name == "comparison.html"
    assert report.read(paths["json"]) == joined
    with pytest.raises(UsageError, match="a comparison cannot be compared again"):
        report.compare([joined, doc])


def test_comparison_warns_of_what_does_not_compare(doc: dict[str, Any]) -> None:
    other = json.loads(json.dumps(doc))
    other["machine"]["class"] = "h100-80gb"
    other["losses"][0]["tokens"] = other["files"][0]["tokens"] = 999
    other["bench"][0]["threads"] = 2
    joined = report.compare([doc, other])
    assert joined["notes"] == [
        "The runs come from different machines (x86-2core, h100-80gb): their speeds and memory do not compare.",
        "1: quickstart ships quickstart-q4_k_m.gguf (llama.cpp, 1 thread).",
        "2: quickstart ships quickstart-q4_k_m.gguf (llama.cpp, 2 threads).",
        "gguf q4_k_m, same top token: the runs measured different samples (n = 8,245, 999), so they do not compare row by row.",
    ]
    decode = [row["values"] for row in joined["rows"] if row["what"].startswith("decode") and row["type"] == "q4_k_m"]
    assert decode == [[65.27, None], [None, 65.27]]  # one thread against two is no comparison
    assert all(re.sub(r"\\(?=\|)", "", note) in Page(report.to_html(joined)).text for note in joined["notes"])


def _timed(decode_ms: float, spread: float = 0.01, **changed: Any) -> dict[str, Any]:
    """A report of one file whose repeats scatter by `spread`."""
    rng = random.Random(f"{decode_ms} {spread} {changed}")
    each = [decode_ms * (1 + spread * rng.random()) for _ in range(5)]
    samples = {"ttft": [10 * ms for ms in each], "decode": [ms * (1 + 0.005 * rng.random()) for ms in each for _ in range(8)]}
    row = {
        "file": "bot.gguf",
        "runtime": "llama.cpp",
        "threads": 1,
        "prompt_tokens": 32,
        "decode_tok_per_s": 1000 / decode_ms,
        "samples_ms": samples,
    }
    file = {"file": "bot.gguf", "format": "gguf", "size_bytes": 100, "kl": 0.05, "kl_low": 0.04, "kl_high": 0.06, "tokens": 900}
    return {
        "schema": 1,
        "name": "bot",
        "created": str(decode_ms),
        "machine": {"class": "x86-2core"},
        "files": [file | changed],
        "bench": [row],
    }


@pytest.mark.parametrize(
    ("other", "what", "word", "why"),
    [
        (_timed(10.1), "decode (llama.cpp, 1 thread, 32-token prompt)", "noise", "within 5%"),
        (_timed(11.5), "decode (llama.cpp, 1 thread, 32-token prompt)", "real", "slower, p = 0.004 that this is chance"),
        (_timed(8.8), "decode (llama.cpp, 1 thread, 32-token prompt)", "real", "faster, p = 0.004 that this is chance"),
        (
            {**_timed(11.5), "machine": {"class": "arm64-4core"}},
            "decode (llama.cpp, 1 thread, 32-token prompt)",
            "cannot tell",
            "other machines",
        ),
        (_timed(10.1, kl=0.055, kl_low=0.045, kl_high=0.065), "KL to the trained model", "noise", "the 95 % intervals overlap"),
        (_timed(10.1, kl=0.09, kl_low=0.08, kl_high=0.1), "KL to the trained model", "real", "the 95 % intervals do not overlap"),
        (
            _timed(10.1, kl=0.09, kl_low=0.08, kl_high=0.1, tokens=800),
            "KL to the trained model",
            "cannot tell",
            "measured on other rows (n = 900 and 800)",
        ),
        (_timed(10.1, size_bytes=101), "size", "real", "+1 byte"),
    ],
)
def test_comparison_tells_what_differs_from_noise(other: dict[str, Any], what: str, word: str, why: str) -> None:
    joined = report.compare([_timed(10.0), other])
    (row,) = [row for row in joined["rows"] if row["what"] == what]
    assert row["verdicts"][0] is None
    assert row["verdicts"][1]["word"] == word
    assert row["verdicts"][1]["why"].startswith(why)
    title = {"real": "What really differs", "noise": "What is noise", "cannot tell": "What cannot be told"}[word]
    page = Page(report.to_html(joined))
    assert title in page.headings
    assert any(what in text and why in text for text in page.text)
    assert (f"#### {title}" if word == "real" else f"<summary>{title}</summary>") in report.to_markdown(joined)


def test_repeats_that_overlap_tell_nothing() -> None:
    """The fastest tenth is 8 % slower, and two of five repeats of each lie among the other's."""
    one, two = _timed(10.0), _timed(10.9)
    for doc, each in ((one, (10.0, 10.2, 11.0, 13.0, 14.0)), (two, (10.8, 11.2, 12.0, 13.5, 14.5))):
        doc["bench"][0]["samples_ms"] = {"ttft": list(each), "decode": [ms for ms in each for _ in range(8)]}
    (row,) = [row for row in report.compare([one, two])["rows"] if row["what"].startswith("decode")]
    assert row["verdicts"][1]["word"] == "cannot tell"
    assert row["verdicts"][1]["why"].startswith("the repeats do not differ enough")


def test_equal_sizes_are_not_worth_a_word() -> None:
    joined = report.compare([_timed(10.0), _timed(10.1)])
    assert [row["verdicts"][1] for row in joined["rows"] if row["what"] == "size"] == [None]


def test_runs_that_ship_different_files_are_compared_by_what_they_ship() -> None:
    """Two threads against one is other work for a file's row, and a real difference of what is shipped."""
    one, two = _timed(10.0), _timed(11.5)
    two["bench"][0]["threads"] = 2
    joined = report.compare([one, two])
    rows = {(row["type"], row["what"]): row for row in joined["rows"]}
    assert rows["the file that ships", "decode (32-token prompt)"]["verdicts"][1]["word"] == "real"
    assert rows["bot.gguf", "decode (llama.cpp, 2 threads, 32-token prompt)"]["values"] == [None, 1000 / 11.5]
    assert "bot 11.5 ships bot.gguf (llama.cpp, 2 threads)." in joined["notes"]
    assert not any(row["type"] == "the file that ships" for row in report.compare([one, _timed(11.5)])["rows"])


def test_comparison_of_one_is_a_usage_error(doc: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        report.compare([doc])
    assert caught.value.message == "a comparison needs two or more reports, found 1"


# --- figures and plots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (figures.size(999), "999 B"),
        (figures.size(105_461_344), "105.5 MB"),
        (figures.size(999_960_000), "1.00 GB"),
        (figures.size(None), ""),
        (figures.percent(0.036), "3.6 %"),
        (figures.percent(-0.0001), "0.0 %"),
        (figures.change(-0.31), f"{MINUS}31.0 %"),
        (figures.change(0.05), "+5.0 %"),
        (figures.number(0.0396), "0.0396"),
        (figures.number(0.99951), "1.00"),
        (figures.number(1024.4), "1,024"),
        (figures.number(3e-6), "3.00e-06"),
        (figures.number(0), "0"),
        (figures.number(math.nan), ""),
        (figures.number(True), ""),
        (figures.ms(412.3), "412 ms"),
        (figures.ms(12_400), "12.4 s"),
        (figures.seconds(48), "48 s"),
        (figures.seconds(911.4), "15 min 11 s"),
        (figures.seconds(7500), "2 h 05 min"),
        (figures.sample(1, 2), "1 row (2 tokens)"),
        (figures.sample(None, 8245), "8,245 tokens"),
        (figures.within(0.5, 0.25, 0.75, figures.percent), "50.0 % [25.0, 75.0]"),
        (figures.within(0.5, None, 0.75, figures.percent), "50.0 %"),
        (figures.within(None, 0.25, 0.75, figures.percent), ""),
    ],
)
def test_figures_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_axes_end_on_round_numbers() -> None:
    axis = plot.axis([0.13, 0.87], 0, 100)
    assert (axis.low, axis.high) == (0.0, 1.0)
    assert axis.ticks(5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert axis.at(0.25) == 25
    wide = plot.axis([0.005, 0.45], 200, 0, log=True)
    assert wide.log
    assert wide.ticks(8) == pytest.approx([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    assert wide.at(0.005) > wide.at(0.05) > wide.at(0.45)
    same = plot.axis([3.0, 3.0], 0, 100)
    assert same.low < 3 < same.high


def test_thinning_keeps_spikes_and_ends_within_bounds() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[5_003] = (5_003.0, 9.0)
    points[7_001] = (7_001.0, -9.0)
    thin = plot.thinned(points)
    assert len(thin) <= 400
    assert (5_003.0, 9.0) in thin
    assert (7_001.0, -9.0) in thin
    assert thin == sorted(thin)


def test_scatter_labels_do_not_overlap() -> None:
    rng = random.Random(5)
    points = [plot.Point(f"type_{i}_m", 90 + rng.random() * 30, 0.03 + rng.random() * 0.05, None, None, "s0", "") for i in range(14)]
    drawn = plot.scatter(points, "size, MB", "KL")
    found = re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)" class="label small halo">(type_\d+_m)', drawn)
    assert len(found) >= 12  # at this density nearly every label finds a place
    boxes = [(float(x), float(y) - 11, float(x) + plot.text_width(text, 12), float(y) + 3) for x, y, text in found]
    for i, a in enumerate(boxes):
        assert a[0] >= 0
        assert a[2] <= plot.WIDTH
        for b in boxes[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], (a, b)


# --- fronts ------------------------------------------------------------------------------------------------------


def _point(label: str, x: float, y: float, out: str = "") -> plot.Point:
    return plot.Point(label, x, y, None, None, "s0", label, file=label, out=out)


def test_front_is_what_nothing_beats() -> None:
    points = [
        _point("small", 80, 0.3),
        _point("good", 110, 0.02),
        _point("middle", 95, 0.1),
        _point("beaten", 100, 0.2),
        _point("same", 95, 0.1),
    ]
    assert [p.label for p in fronts.front(points)] == ["small", "middle", "same", "good"]
    speeds = [_point("fast", 150, 0.3), _point("slow and bad", 100, 0.4), _point("slow and good", 100, 0.1)]
    assert [p.label for p in fronts.front(speeds, more_is_better=True)] == ["slow and good", "fast"]
    rng = random.Random(3)
    cloud = [_point(str(i), rng.random(), rng.random()) for i in range(200)]
    found = fronts.front(cloud)
    assert [p.y for p in found] == sorted((p.y for p in found), reverse=True)  # each step right is a step down
    assert all(any(q.x <= p.x and q.y <= p.y for q in found) for p in cloud)


@pytest.mark.parametrize("kind", ["kl", "loss", "guessing"])
def test_a_file_that_answers_nonsense_fast_is_never_on_a_front(kind: str) -> None:
    """Smallest and fastest of all, and worth nothing: it would be on both fronts by its size and its speed alone."""
    files = [
        {"file": f"{name}.gguf", "size_bytes": size, "tokens": 900}
        for name, size in (("good", 110_000_000), ("small", 90_000_000), ("nonsense", 70_000_000))
    ]
    doc: dict[str, Any] = {"schema": 1, "name": "x", "files": files}
    speeds = {"good.gguf": 100.0, "small.gguf": 130.0, "nonsense.gguf": 400.0}
    doc["bench"] = [
        {"file": file, "runtime": "llama.cpp", "threads": 2, "prompt_tokens": 32, "decode_tok_per_s": s} for file, s in speeds.items()
    ]
    bad = {"kl": 5.4, "loss": 6.1, "guessing": 7.3}[kind]
    good = (0.02, 0.1) if kind == "kl" else (1.9, 2.0) if kind == "loss" else (6.9, 6.95)
    for file, value in zip(files, (*good, bad), strict=True):
        if kind == "kl":
            file["kl"] = value
        else:
            doc.setdefault("losses", []).append({"set": "held", "file": file["file"], "rows": 60, "after": {"loss": value}})
    assert list(fronts.nonsense(doc)) == ["nonsense.gguf"]
    html = report.to_html(doc)
    page = Page(html)
    assert page.text.count("answers nonsense: never on the front") == 2
    lines = re.findall(r'<polyline points="([^"]+)" class="frontier"', html)
    assert [len(line.split()) for line in lines] == [2, 2]  # good and small, in both plots
    crosses = re.findall(r'<path d="M([-\d.]+),([-\d.]+)l9,9[^"]*" class="cross', html)
    assert len(crosses) == 2
    centres = {(f"{float(x) + 4.5:.1f}", f"{float(y) + 4.5:.1f}") for x, y in crosses}
    drawn = {tuple(f"{float(v):.1f}" for v in pair.split(",")) for line in lines for pair in line.split()}
    assert not centres & drawn


def test_a_file_whose_quality_nobody_measured_is_not_in_the_plots() -> None:
    doc = {
        "schema": 1,
        "name": "x",
        "files": [{"file": "a", "size_bytes": 5}],
        "bench": [{"file": "a", "prompt_tokens": 8, "decode_tok_per_s": 9.0}],
    }
    assert fronts.size_quality(doc, {"a": "s0"}, {}) == ""
    assert fronts.speed_quality(doc, {"a": "s0"}, {}) == ""


def test_labels_are_cut_in_the_middle_to_fit() -> None:
    assert plot.shortened("short.gguf", 200) == "short.gguf"
    cut = plot.shortened("a-very-long-name-of-a-file-that-nobody-would-type-q4_k_m.gguf", 200)
    assert cut.startswith("a-very")
    assert cut.endswith(".gguf")
    assert "…" in cut
    assert plot.text_width(cut, 13) <= 200
    assert plot.text_width("荷物", 13) == 26
