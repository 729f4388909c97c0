"""Pareto plots: which files nothing beats in both of two measures. A file that answers nonsense is never on a front.

`figure` draws any such plot; `size_quality` and `speed_quality` are the two that a report shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgelora.recipe import Evaluate
from edgelora.report import agreement, plot, tables
from edgelora.report import figures as f
from edgelora.report.markup import NOTHING, Markup, tag

# Nats a token at which a model says nothing: what words cost to someone who knows only how frequent each is (unigram
# entropy of English in vocabularies of 32k to 128k tokens is 6.5 to 7.5).
GUESSING = 7.0
Doc = Mapping[str, Any]


@dataclass(frozen=True)
class Quality:
    """How good a file is, lower is better, with its interval's ends where they are known."""

    value: float
    low: float | None
    high: float | None


def qualities(doc: Doc) -> tuple[str, dict[Any, Quality]]:
    """(the measure with its unit, each file's): KL to the trained model, or where more files or a browser have it the loss on the first set."""
    kl = {row.get("file"): _quality(row, "kl") for row in tables.rows(doc, "files")}
    kl = {file: quality for file, quality in kl.items() if quality}
    losses = [row for row in tables.rows(doc, "losses") if f.known(tables.section(row, "after").get("loss"))]
    first = next((row.get("set") for row in losses), None)
    loss = {row.get("file"): _quality(tables.section(row, "after"), "loss", "") for row in losses if row.get("set") == first}
    loss = {file: quality for file, quality in loss.items() if quality}
    if len(loss) > len(kl) or (loss and tables.rows(doc, "agreement")):  # in a browser a loss is measured, and no KL
        return f"loss on {first or 'held-out rows'}, nats a token", {k: v for k, v in loss.items() if v}
    return "KL, nats a token", {k: v for k, v in kl.items() if v}


def nonsense(doc: Doc) -> dict[Any, str]:
    """Files that answer nonsense, and how that is seen.

    Beyond `evaluate.max_kl` of the trained model; or, on the same rows, that much more loss than the best file there (the
    difference of two losses estimates the divergence); or a loss that knowing word frequencies alone would reach.
    """
    limit = tables.section(tables.section(doc, "recipe"), "evaluate").get("max_kl")
    limit = limit if f.known(limit) else Evaluate.max_kl
    found: dict[Any, str] = {}
    for row in tables.rows(doc, "files"):
        if f.known(row.get("kl")) and row["kl"] > limit:
            found[row.get("file")] = f"KL {f.number(row['kl'])}, above {f.number(limit)}"
    best: dict[Any, float] = {}
    after = [(row, tables.section(row, "after").get("loss")) for row in tables.rows(doc, "losses")]
    for row, loss in after:
        if f.known(loss):
            best[row.get("set")] = min(loss, best.get(row.get("set"), loss))
    for row, loss in after:
        if f.known(loss) and (loss > best[row.get("set")] + limit or loss >= GUESSING):
            found.setdefault(row.get("file"), f"loss {f.loss(loss)} on {row.get('set') or 'held-out rows'}")
    return found


def front(points: Sequence[plot.Point], more_is_better: bool = False) -> list[plot.Point]:
    """The points that no other beats in one measure without losing in the other, left to right. `y`: less is better."""

    def beats(a: plot.Point, b: plot.Point) -> bool:
        ax, bx = (-a.x, -b.x) if more_is_better else (a.x, b.x)
        return ax <= bx and a.y <= b.y and (ax < bx or a.y < b.y)

    able = [p for p in points if not p.out]
    return sorted((p for p in able if not any(beats(q, p) for q in able)), key=lambda p: (p.x, p.y))


def figure(title: str, points: Sequence[plot.Point], x_label: str, y_label: str, more_is_better: bool = False) -> Markup:
    """A captioned scatter with its front as a line; points that are `out` (nonsense) are crosses beside it."""
    if not points:
        return NOTHING
    best = front(points, more_is_better)
    where = "lower right is better" if more_is_better else "lower left is better"
    legend = [tag("span", where)]
    if len(best) > 1:
        legend.append(tag("span", tag("i", class_="frontier"), tag("span", "nothing is better in both"), class_="key"))
    if any(p.out for p in points):
        legend.append(tag("span", tag("i", "×", class_="out"), tag("span", "answers nonsense: never on the front"), class_="key"))
    drawing = plot.scatter(points, x_label, y_label, best)
    return tag("figure", tag("figcaption", title, tag("span", *legend, class_="legend")), drawing)


def size_quality(doc: Doc, series: Mapping[Any, str], names: Mapping[Any, str]) -> Markup:
    measure, known = qualities(doc)
    points = []
    for row in tables.rows(doc, "files"):
        file, size = row.get("file"), row.get("size_bytes")
        if f.known(size) and file in known:
            points.append(_point(file, names.get(file, ""), size / 1e6, known[file], series[file], f.size(size), measure))
    return figure("Quality against size", _judged(doc, points), "size, MB", measure)


def speed_quality(doc: Doc, series: Mapping[Any, str], names: Mapping[Any, str]) -> Markup:
    """Decode speed at the longest prompt that every file was measured with, a point for each runtime and thread count.

    In a browser a file is as good as it was found to be there.
    """
    measure, known = qualities(doc)
    there, strange = _in_browsers(doc, measure, known), agreement.nonsense(doc)
    rows = [row for row in tables.rows(doc, "bench") if f.known(row.get("decode_tok_per_s")) and row.get("file") in known]
    rows = [row for row in rows if there.get((row.get("file"), row.get("runtime")), True)]
    lengths = Counter(int(row["prompt_tokens"]) for row in rows if f.known(row.get("prompt_tokens")))
    if not lengths:
        return NOTHING
    most = max(lengths.values())
    length = max(n for n, count in lengths.items() if count == most)
    rows = [row for row in rows if row.get("prompt_tokens") == length]
    ways = {key: Counter(file for file, _ in {(row.get("file"), row.get(key)) for row in rows}) for key in ("device", "runtime", "threads")}
    points = []
    for row in rows:
        file, speed = row.get("file"), row["decode_tok_per_s"]
        differs = [key for key in ways if row.get(key) and ways[key][file] > 1]
        words = [f"{row[key]} thread{'' if row[key] == 1 else 's'}" if key == "threads" else short_runtime(row[key]) for key in differs]
        label = ", ".join(filter(None, [names.get(file, file), *words]))
        way = (file, row.get("runtime"))
        point = _point(file, label, speed, there.get(way) or known[file], series[file], f"{f.number(speed)} tok/s", measure)
        points.append(replace(point, out=strange[way], hint=f"{point.hint}; nonsense: {strange[way]}") if way in strange else point)
    return figure("Quality against speed", _judged(doc, points), f"decode after {f.count(length)} prompt tokens, tok/s", measure, True)


def _in_browsers(doc: Doc, measure: str, known: Mapping[Any, Quality]) -> dict[tuple[Any, Any], Quality | None]:
    """(file, runtime) -> its quality there: its own, and what it loses there more than natively on the same tokens.

    (A browser may spell an answer in other tokens, so its loss alone would not do.) None where that was measured on other rows.
    """
    found: dict[tuple[Any, Any], Quality | None] = {}
    for row in tables.rows(doc, "agreement"):
        here, native, own = tables.section(row, "loss").get("loss"), row.get("against_loss"), known.get(row.get("file"))
        way = row.get("file"), row.get("runtime")
        same_rows = measure.startswith(f"loss on {row.get('set')},")
        found[way] = _moved(own, here - native) if same_rows and own and f.known(here) and f.known(native) else None
    return found


def _moved(quality: Quality, by: float) -> Quality:
    low, high = (end + by if f.known(end) else None for end in (quality.low, quality.high))
    return Quality(quality.value + by, low, high)


def short_runtime(name: Any) -> str:
    """'genai' for onnxruntime-genai: beside onnxruntime, where room is short."""
    return str(name or "").removeprefix("onnxruntime-")


def _point(file: Any, label: str, x: float, quality: Quality, series: str, shown: str, measure: str) -> plot.Point:
    hint = f"{file or ''}: {shown}, {measure.split(',')[0]} {f.within(quality.value, quality.low, quality.high, f.number)}"
    return plot.Point(label, x, quality.value, quality.low, quality.high, series, hint, file=file)


def _judged(doc: Doc, points: Sequence[plot.Point]) -> list[plot.Point]:
    bad = nonsense(doc)
    return [replace(p, out=bad[p.file], hint=f"{p.hint}; nonsense: {bad[p.file]}") if p.file in bad else p for p in points]


def _quality(row: Doc, key: str, prefix: str | None = None) -> Quality | None:
    prefix = f"{key}_" if prefix is None else prefix
    value = row.get(key)
    return Quality(value, row.get(f"{prefix}low"), row.get(f"{prefix}high")) if f.known(value) else None
