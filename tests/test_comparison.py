"""Several reports as one: what is joined, what really differs, and what is noise."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from edgelora import report
from edgelora.errors import UsageError
from tests.report_example import MINUS, TAGS, Page, example


@pytest.fixture
def doc() -> dict[str, Any]:
    return example()


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
        (_timed(11.5), "decode (llama.cpp, 1 thread, 32-token prompt)", "cannot tell", "benches that were not in turns may be"),
        (_timed(16.0), "decode (llama.cpp, 1 thread, 32-token prompt)", "real", "slower, by more than 50%"),
        (_timed(7.5), "decode (llama.cpp, 1 thread, 32-token prompt)", "cannot tell", "benches that were not in turns may be"),
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


def test_equal_sizes_are_not_worth_a_word() -> None:
    joined = report.compare([_timed(10.0), _timed(10.1)])
    assert [row["verdicts"][1] for row in joined["rows"] if row["what"] == "size"] == [None]


def test_runs_that_ship_different_files_are_compared_by_what_they_ship() -> None:
    """Two threads against one is other work for a file's row, and another way to ship it."""
    one, two = _timed(10.0), _timed(13.5)
    two["bench"][0]["threads"] = 2
    joined = report.compare([one, two])
    rows = {(row["type"], row["what"]): row for row in joined["rows"]}
    assert rows["the file that ships", "decode (32-token prompt)"]["verdicts"][1]["word"] == "cannot tell"
    assert rows["bot.gguf", "decode (llama.cpp, 2 threads, 32-token prompt)"]["values"] == [None, 1000 / 13.5]
    assert "bot 13.5 ships bot.gguf (llama.cpp, 2 threads)." in joined["notes"]
    assert not any(row["type"] == "the file that ships" for row in report.compare([one, _timed(13.5)])["rows"])


def test_comparison_of_one_is_a_usage_error(doc: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        report.compare([doc])
    assert caught.value.message == "a comparison needs two or more reports, found 1"
