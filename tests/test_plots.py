"""Figures for people, axes, labels and fronts: what stands where in a plot."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest

from edgelora import report
from edgelora.report import charts, figures, fronts, plot
from tests.report_example import MINUS, Page


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


def test_a_sample_far_beyond_every_bar_presses_nothing_flat() -> None:
    drawn = plot.bars([plot.Bar("a", 100.0, "100 ms", "s0", [90.0, 110.0, 190_000.0]), plot.Bar("b", 50.0, "50 ms", "s0", [50.0])], "x")
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="10" rx="2" class="fill', drawn)]
    assert widths[0] > plot.WIDTH / 2
    assert drawn.count('class="sample"') == 3


def test_labels_keep_clear_of_the_front() -> None:
    points = [_point("best", 90, 0.4), _point("worst", 115, 0.42), _point("other", 111, 0.1)]
    drawn = plot.scatter(points, "size, MB", "KL", fronts.front(points))
    (line,) = re.findall(r'<polyline points="([^"]+)" class="frontier"', drawn)
    (ax, ay), (bx, by) = (map(float, pair.split(",")) for pair in line.split())
    labels = re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)" class="label small halo">(\w+)', drawn)
    assert len(labels) == 3
    for x, y, text in labels:
        left, right, top, bottom = float(x), float(x) + plot.text_width(text, 12), float(y) - 11, float(y) + 3
        for share in (0.2, 0.4, 0.6, 0.8):
            px, py = ax + share * (bx - ax), ay + share * (by - ay)
            assert not (left < px < right and top < py < bottom), text


def test_files_without_a_type_are_named_by_what_tells_them_apart() -> None:
    files = [{"file": name} for name in ("bot-q5_k_m.gguf", "bot-q4_0.gguf", "bot-int4-onnx")]
    assert list(charts.short_names({"files": files}).values()) == ["q5_k_m.gguf", "q4_0.gguf", "int4-onnx"]
    assert charts.short_names({"files": files[:1]}) == {"bot-q5_k_m.gguf": "bot-q5_k_m.gguf"}
