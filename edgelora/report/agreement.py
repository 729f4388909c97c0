"""Browsers in the report: whether a file answers there as in its native runtime. What answers nonsense there is on no front."""

from __future__ import annotations

from typing import Any

from edgelora.recipe import Evaluate
from edgelora.report import figures as f
from edgelora.report.tables import FAIL, PASS, UNJUDGED, Column, Row, Table, of, rows, section, tabulate, text


def table(doc: Row) -> Table:
    """A file in a browser a row."""
    strange = nonsense(doc)
    return tabulate(
        rows(doc, "agreement"),
        [
            Column("File", text("file"), numeric=False),
            Column("In", text("runtime"), numeric=False),
            Column("Against", text("against"), numeric=False),
            Column("Set", text("set"), numeric=False),
            Column("Loss there", _loss, by=lambda row: section(row, "loss").get("loss")),
            Column("Loss natively", of("against_loss", f.loss), by="against_loss"),
            Column("Same top token", of("top1", f.percent), by="top1"),
            Column("Same greedy answers", _answers, by="answers_equal"),
            Column("n", lambda row: f.sample(row.get("rows"), row.get("tokens")), by="tokens"),
            Column("Verdict", lambda row: _verdict(row, strange), numeric=False),
        ],
    )


def nonsense(doc: Row) -> dict[tuple[Any, Any], str]:
    """(file, runtime) -> how it is seen that the file answers nonsense in that browser.

    Its loss there is above the native one by more than `evaluate.max_kl`: the difference of two losses estimates the divergence.
    """
    limit = section(section(doc, "recipe"), "evaluate").get("max_kl")
    limit = limit if f.known(limit) else Evaluate.max_kl
    found = {}
    for row in rows(doc, "agreement"):
        here, there = section(row, "loss").get("loss"), row.get("against_loss")
        if f.known(here) and f.known(there) and here > there + limit:
            found[row.get("file"), row.get("runtime")] = f"loss {f.loss(here)} in the browser, {f.loss(there)} natively"
    return found


def differing(doc: Row) -> list[tuple[str, list[tuple[str, str]]]]:
    """Greedy answers that are not the same: (prompt, [(who, what was said)])."""
    shown = []
    for row in rows(doc, "agreement"):
        for answer in rows(row, "differing"):
            who = [(row.get("against"), answer.get("native")), (row.get("runtime"), answer.get("browser"))]
            said = [(f"{row.get('file') or ''} in {name or ''}", words) for name, words in who if words is not None]
            shown.append((answer.get("prompt") or "", said))
    return shown


def _loss(row: Row) -> str:
    values = section(row, "loss")
    return f.within(values.get("loss"), values.get("low"), values.get("high"), f.loss)


def _answers(row: Row) -> str:
    equal, compared = f.count(row.get("answers_equal")), f.count(row.get("answers"))
    return f"{equal} of {compared}" if equal and compared else ""


def _verdict(row: Row, strange: dict[tuple[Any, Any], str]) -> str:
    if (row.get("file"), row.get("runtime")) in strange:
        return f"{FAIL}answers nonsense there"
    equal, compared = row.get("answers_equal"), row.get("answers")
    if not f.known(equal) or not f.known(compared):
        return ""
    return f"{PASS}answers alike" if equal == compared else f"{UNJUDGED}some answers differ"
