"""The same file in a browser: shown beside its native runtime, and on no front where it answers nonsense."""

from __future__ import annotations

from typing import Any

from edgelora import report
from edgelora.report import agreement as report_agreement
from edgelora.report import charts, fronts
from tests.report_example import GGUF, Page, example


def browsers(loss: float, equal: int = 5) -> dict[str, Any]:
    """The example with two rows of bench in a browser, where the file has that loss."""
    doc = example()
    doc["agreement"][0] |= {"loss": {"loss": loss, "low": loss - 0.1, "high": loss + 0.1}, "answers_equal": equal}
    doc["bench"].append({**doc["bench"][0], "runtime": "wllama", "decode_tok_per_s": 900.0})
    doc["bench"].append({**doc["bench"][0], "runtime": "another", "decode_tok_per_s": 3.0})
    return doc


def test_a_browser_is_shown_beside_the_native_runtime() -> None:
    page = Page(report.to_html(browsers(1.7204)))
    words = " ".join(page.text)
    for said in ("The same file in a browser", "99.1 %", "5 of 5", "✓ answers alike"):
        assert said in words
    assert "! some answers differ" in " ".join(Page(report.to_html(browsers(1.72, 4))).text)
    assert {"In the lorry.", "In the van.", f"{GGUF} in wllama"} <= set(page.text)
    assert "answers alike" in report.to_markdown(browsers(1.72))


def test_what_answers_nonsense_in_a_browser_is_on_no_front() -> None:
    """Faster than all others, and good in its native runtime: there it is still on the front."""
    fine, bad = browsers(1.7204), browsers(8.9, 0)
    assert report_agreement.nonsense(fine) == {}
    assert report_agreement.nonsense(bad) == {(GGUF, "wllama"): "loss 8.900 in the browser, 1.719 natively"}
    assert fronts.nonsense(bad) == {}
    for doc, crosses in ((fine, 0), (bad, 1)):
        drawn = fronts.speed_quality(doc, charts.colours(doc), {})
        assert drawn.count('class="cross') == crosses
        assert ("answers nonsense: never on the front" in drawn) == bool(crosses)
        assert "loss on paraphrase" in drawn  # a browser has no KL
    assert "✗ answers nonsense there" in " ".join(Page(report.to_html(bad)).text)


def test_a_browsers_quality_on_other_rows_is_not_drawn_beside_the_files() -> None:
    doc = browsers(1.72)
    doc["agreement"][0]["set"] = "the bench's own text"
    drawn = fronts.speed_quality(doc, charts.colours(doc), {})
    assert "another" in drawn
    assert "wllama" not in drawn
