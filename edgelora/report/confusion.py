"""Which labels are taken for which: the confusion matrix as a drawing, and its largest wrong cells as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.report import figures as f
from edgelora.report import plot, tables
from edgelora.report.markup import NOTHING, Markup, tag

_MOST_MISTAKES = 15
_MOST_LABELS = 200  # of a drawing; more cannot be told apart
_NAMED = 20  # labels at most whose names stand beside the rows
_NAMES_WIDTH = 124.0


def mistakes(doc: Mapping[str, Any]) -> tables.Table:
    """The most frequent mistakes of the file that ships, most frequent first."""
    matrix = _shipped(doc)
    labels, counts = matrix.get("labels") or [], matrix.get("counts") or []
    wrong = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    rows = [
        {"truth": labels[i], "chosen": labels[j], "count": n, "of": sum(counts[i])}
        for n, i, j in sorted(wrong, key=lambda cell: (-cell[0], cell[1], cell[2]))[:_MOST_MISTAKES]
        if i < len(labels) and j < len(labels)
    ]
    return tables.tabulate(
        rows,
        [
            tables.Column("Label", lambda row: str(row["truth"]), numeric=False),
            tables.Column("Taken for", lambda row: str(row["chosen"]), numeric=False),
            tables.Column("Rows", lambda row: f"{f.count(row['count'])} of {f.count(row['of'])}"),
        ],
    )


def drawing(doc: Mapping[str, Any]) -> Markup:
    """A square a pair of labels, the darker the larger its share of the row; right answers lie on the diagonal."""
    matrix = _shipped(doc)
    labels, counts = matrix.get("labels") or [], matrix.get("counts") or []
    n = len(labels)
    if not 2 <= n <= _MOST_LABELS or len(counts) != n or any(len(row) != n for row in counts):
        return NOTHING
    left = _NAMES_WIDTH if n <= _NAMED else 0.0
    side = (plot.WIDTH - left) / n
    marks = [tag("rect", x=left, y=0, width=round(side * n, 2), height=round(side * n, 2), class_="track")]
    for i, row in enumerate(counts):
        total = sum(row)
        if left:
            marks.append(
                tag("text", plot.shortened(labels[i], left - 8, 12), x=left - 6, y=round(side * (i + 0.5) + 4, 1), class_="small end")
            )
        for j, count in enumerate(row):
            if count:
                title = tag(
                    "title",
                    f"{labels[i]} taken for {labels[j]}: {count} of {total}" if i != j else f"{labels[i]}: {count} of {total} right",
                )
                place = {"x": round(left + side * j, 2), "y": round(side * i, 2), "width": round(side, 2), "height": round(side, 2)}
                shade = round(0.15 + 0.85 * count / total, 2)
                marks.append(tag("rect", title, **place, class_=f"cell {'s0' if i == j else 's1'}", fill_opacity=shade))
    words = f"Confusion matrix of {n} labels on {matrix.get('set') or 'held-out rows'}: rows are true labels, columns chosen ones"
    svg = tag("svg", tag("title", words), *marks, viewBox=f"0 0 {plot.WIDTH} {round(side * n)}", role="img")
    legend = tag("p", f"{words}, in the order of the alphabet. Right answers lie on the diagonal.", class_="caption")
    return tag("figure", tag("figcaption", "Which label is taken for which"), legend, svg)


def _shipped(doc: Mapping[str, Any]) -> Mapping[str, Any]:
    """The matrix of the first file, on the set that the report leads with; empty when its rows are not whole."""
    found = tables.rows(doc, "confusion")
    matrix = found[0] if found else {}
    labels, counts = matrix.get("labels"), matrix.get("counts")
    if not isinstance(labels, list) or not isinstance(counts, list) or len(counts) != len(labels):
        return {}
    rows_whole = all(isinstance(row, list) and len(row) == len(labels) and all(isinstance(n, int) for n in row) for row in counts)
    if not rows_whole or not all(isinstance(label, str) for label in labels):
        return {}
    return matrix
