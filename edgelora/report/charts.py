"""The figures of the page: the document's rows -> captioned plots. One colour a file, the same in every plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from edgelora.report import comparison, fronts, plot, summary, tables
from edgelora.report import figures as f
from edgelora.report.markup import NOTHING, Markup, tag

_COLOURS = 6  # s0 to s5 in the style sheet
_SIZE, _KL = "size, MB", "KL, nats a token"
_GROUPS = ("embedding", "attention", "feed-forward", "output", "norm")  # of tensors, in the order of the file; others follow
Doc = Mapping[str, Any]


def files(doc: Doc) -> Markup:
    """Size of each file, and quality against size and speed, side by side."""
    series, names = colours(doc), short_names(doc)
    return _together(_sizes(doc), fronts.size_quality(doc, series, names), fronts.speed_quality(doc, series, names))


def anatomy(doc: Doc) -> Markup:
    """Where the megabytes go: a bar a file, cut into what its tensors are for."""
    stacks: list[plot.Stack] = []
    shown: dict[str, str] = {}
    for row in tables.rows(doc, "files"):
        parts = tables.section(row, "parts")
        sizes = {group: tables.group_bytes(tables.section(parts, group)) for group in parts}
        if not sum(sizes.values()):
            continue
        order = sorted(sizes, key=lambda g: (g in tables.NO_WEIGHTS, _GROUPS.index(g) if g in _GROUPS else len(_GROUPS)))
        total = sum(sizes.values())
        cut = [(sizes[g] / 1e6, _group_colour(g), f"{g}: {f.size(sizes[g])}, {f.percent(sizes[g] / total, 0)}") for g in order]
        shown |= {g: _group_colour(g) for g in order if sizes[g] >= 0.005 * total}
        stacks.append(plot.Stack(row.get("file") or "", f.size(total), cut))
    if not stacks:
        return NOTHING
    legend = [_key(style, group) for group, style in shown.items()]
    return _figure("Bytes by what they are for", legend, plot.stacks(stacks, "bytes of each file by group"), len(stacks))


def losses(doc: Doc) -> Markup:
    """Before and after with intervals, a row each set and file."""
    series, names = colours(doc), short_names(doc)
    pairs, shown = [], {}
    for row in tables.rows(doc, "losses"):
        file = row.get("file")
        before, after = _measure(tables.section(row, "before")), _measure(tables.section(row, "after"))
        if before or after:
            label = _listed(row.get("set"), names.get(file, file))
            pairs.append(plot.Pair(label, f.change(row.get("change")), before, after, series[file]))
            shown[names.get(file, file)] = series[file]
    if not pairs:
        return NOTHING
    named = [_key(style, name) for name, style in shown.items() if name]
    legend = [_key("ref", "untuned base")] if any(pair.before for pair in pairs) else []
    legend += named if len(named) <= 4 else [tag("span", "in colour: the exported file")]
    drawing = plot.pairs(pairs, "loss, nats a token; lower is better", f.loss)
    title = "Loss on rows that training never saw" if summary.trained(doc) else "Loss on these rows"
    return _figure(title, legend, drawing, len(pairs))


def latency(doc: Doc) -> Markup:
    """Three panels with the same rows, so that the eye can go across."""
    series, rows = colours(doc), tables.rows(doc, "bench")
    labels = _bench_labels(doc, rows)

    def panel(title: str, better: str, key: str, show: Any, samples: str = "") -> Markup:
        bars = []
        for row, label in zip(rows, labels, strict=True):
            if f.known(row.get(key)):
                ticks = [s for s in tables.section(row, "samples_ms").get(samples) or () if f.known(s)]
                bars.append(plot.Bar(label, row[key], show(row[key]), series[row.get("file")], ticks))
        legend = [tag("span", better)]
        legend += [_key("tick", "each run")] if any(bar.samples for bar in bars) else []
        return _figure(title, legend, plot.bars(bars, title), len(bars)) if bars else NOTHING

    return _together(
        panel("Time to the first token", "lower is better", "ttft_ms", f.ms, "ttft"),
        panel("Prefill, tok/s", "higher is better", "prefill_tok_per_s", f.number),
        panel("Decode, tok/s", "higher is better", "decode_tok_per_s", f.number),
    )


def compared(doc: Doc) -> Markup:
    """Of a comparison: sizes, and quality against size; one colour a run."""
    runs, rows = tables.rows(doc, "runs"), tables.rows(doc, "rows")
    distances = {comparison.kind_of(row): row for row in rows if row.get("what") == comparison.KL}
    bars, points = [], []
    for row in rows:
        if row.get("what") != comparison.SIZE or row.get("type") == comparison.SHIPPED:
            continue
        kind = comparison.kind_of(row)
        for i, run in enumerate(runs):
            size = comparison.entry(row, "values", i)
            kl, low, high = (comparison.entry(distances.get(kind, {}), key, i) for key in ("values", "low", "high"))
            if f.known(size):
                bars.append(plot.Bar(f"{kind} · {run.get('label') or i + 1}", size, f.size(size), _colour(i)))
            if f.known(size) and f.known(kl):
                hint = f"{run.get('label') or i + 1}, {kind}: {f.size(size)}, KL {f.within(kl, low, high, f.number)}"
                points.append(plot.Point(row.get("type") or kind, size / 1e6, kl, low, high, _colour(i), hint))
    legend = [_key(_colour(i), run.get("label") or str(i + 1)) for i, run in enumerate(runs)]
    return _together(_size_figure(bars, legend), _quality_figure(points, legend))


def over_commits(doc: Doc) -> Markup:
    """Of a history: each measure over commits, a line a file type; nothing for a comparison of another kind."""
    if doc.get("over") != "commits":
        return NOTHING
    rows = tables.rows(doc, "rows")
    kinds = list(dict.fromkeys(map(comparison.kind_of, rows)))
    wanted = dict.fromkeys((row.get("what"), row.get("unit")) for row in rows)
    drawn = []
    for what, unit in wanted:
        series = []
        for row in rows:
            if (row.get("what"), row.get("unit")) == (what, unit):
                scale = 1e6 if unit == "bytes" else 1
                values = [(i + 1.0, v / scale) for i, v in enumerate(row.get("values") or ()) if f.known(v)]
                if values:
                    series.append((comparison.kind_of(row), values))
        if series:
            legend = [_key(_colour(i), name) for i, (name, _) in enumerate(series)] if len(kinds) > 1 else []
            label = f"{what}, {'MB' if unit == 'bytes' else unit}"
            drawn.append(_figure(str(what), legend, plot.curves(series, "commit, oldest first", label, at="commit"), len(series)))
    return _together(*drawn)


def colours(doc: Doc) -> dict[Any, str]:
    """Each file's class name in the style sheet."""
    names = dict.fromkeys(row.get("file") for section in ("files", "losses", "bench") for row in tables.rows(doc, section))
    return {name: _colour(i) for i, name in enumerate(names)}


def short_names(doc: Doc) -> dict[Any, str]:
    """A file's type where no other has it, else format and type, else its name without the words that all begin with."""
    files = tables.rows(doc, "files")
    types = Counter(row.get("type") for row in files)
    both = Counter((row.get("format"), row.get("type")) for row in files)

    def short(row: Doc) -> str:
        if row.get("type") and types[row["type"]] == 1:
            return str(row["type"])
        if row.get("type") and row.get("format") and both[row["format"], row["type"]] == 1:
            return f"{row['format']} {row['type']}"
        return str(row.get("file") or "")[same:]

    words = [str(row.get("file") or "").split("-")[:-1] for row in files] if len(files) > 1 else []
    same = sum(len(one[0]) + 1 for one in takewhile(lambda one: len(set(one)) == 1, zip(*words, strict=False)))
    return {row.get("file"): short(row) for row in files}


def training(doc: Doc) -> Markup:
    """Loss over steps."""
    train = tables.section(doc, "training")
    series = []
    for name, key in (("train", "curve"), ("valid", "valid_curve")):
        points = [(row["step"], row["loss"]) for row in tables.rows(train, key) if f.known(row.get("step")) and f.known(row.get("loss"))]
        if points:
            series.append((name, sorted(points)))
    if not series:
        return NOTHING
    legend = [_key(_colour(i), name) for i, (name, _) in enumerate(series)]
    return _figure("Loss during training", legend, plot.curves(series, "step", "loss, nats a token"))


def frontiers(doc: Doc) -> list[Markup]:
    """Of every file that was planned: what sizes near its own would cost, predicted, and what files that were written really cost."""
    figures = []
    for row in tables.rows(doc, "files"):
        size, plan = row.get("size_bytes"), tables.section(row, "plan")
        if not f.known(size):
            continue
        lines = []
        for name, section, key in (("predicted", "frontier", "predicted_kl"), ("measured", "candidates", "kl")):
            points = [
                (p["size_bytes"] / 1e6, p[key]) for p in tables.rows(plan, section) if f.known(p.get("size_bytes")) and f.known(p.get(key))
            ]
            near = sorted((x, y) for x, y in points if abs(x * 1e6 - size) < 0.45 * size)
            if near:
                lines.append((name, near))
        if lines:
            legend = [_key(_colour(i), name) for i, (name, _) in enumerate(lines)]
            title = f"What another size would cost: {row.get('file') or 'file'}"
            figures.append(_figure(title, legend, plot.curves(lines, _SIZE, _KL, at="MB")))
    return figures


def _sizes(doc: Doc) -> Markup:
    """A bar each file, a dashed line where its size was predicted, and the 16-bit model to compare with."""
    series, wide = colours(doc), summary.sixteen_bit_bytes(doc)
    bars = []
    for row in tables.rows(doc, "files"):
        size, predicted = row.get("size_bytes"), row.get("predicted_bytes")
        if f.known(size):
            name, shown = row.get("file") or "", f.size(size)
            hint = f"{name}: {f.aside(shown, f.labelled('predicted: ', f.size(predicted)))}"
            bars.append(plot.Bar(name, size, shown, series[row.get("file")], expected=predicted if f.known(predicted) else None, hint=hint))
    if bars and f.known(wide) and all(bar.value != wide for bar in bars):
        bars.insert(0, plot.Bar("16-bit model", wide, f.size(wide), "ref"))
    return _size_figure(bars, [_key("dashed", "predicted")] if any(bar.expected is not None for bar in bars) else [])


def _size_figure(bars: Sequence[plot.Bar], legend: Sequence[Markup]) -> Markup:
    return _figure("Size of each file", legend, plot.bars(bars, "size of each file"), len(bars)) if bars else NOTHING


def _quality_figure(points: Sequence[plot.Point], legend: Sequence[Markup]) -> Markup:
    return (
        _figure("Distance to the trained model against size", legend, plot.scatter(points, _SIZE, _KL), len(points)) if points else NOTHING
    )


def _bench_labels(doc: Doc, rows: Sequence[Doc]) -> list[str]:
    """The file, and of runtime, prompt and threads what differs between rows."""
    names = short_names(doc)
    differs = {key: len({row.get(key) for row in rows}) > 1 for key in ("prompt_tokens", "threads", "device")}
    runtimes = Counter(file for file, _ in {(row.get("file"), row.get("runtime")) for row in rows})
    labels = []
    for row in rows:
        file, prompt, threads = row.get("file"), row.get("prompt_tokens"), row.get("threads")
        runtime = fronts.short_runtime(row.get("runtime")) if runtimes[file] > 1 else None
        length = f"{prompt} tokens" if differs["prompt_tokens"] and f.known(prompt) else None
        workers = f"{threads} thread{'' if threads == 1 else 's'}" if differs["threads"] and f.known(threads) else None
        device = (row.get("device") or "this machine") if differs["device"] else None
        labels.append(_listed(names.get(file, file), device, runtime, length, workers))
    return labels


def _measure(values: Doc) -> plot.Measure | None:
    value = values.get("loss")
    return (value, values.get("low"), values.get("high")) if f.known(value) else None


def _figure(title: str, legend: Sequence[Markup], drawing: Markup, rows: int = 0) -> Markup:
    if rows > plot.MOST_ROWS:
        legend = [*legend, tag("span", f"the first {plot.MOST_ROWS} of {f.count(rows)}")]
    return tag("figure", tag("figcaption", title, tag("span", *legend, class_="legend") if legend else None), drawing)


def _together(*figures: Markup) -> Markup:
    return tag("div", *figures, class_="figures") if any(figures) else NOTHING


def _key(style: str, name: str) -> Markup:
    return tag("span", tag("i", class_=style), tag("span", name), class_="key")


def _group_colour(group: str) -> str:
    return "ref" if group in tables.NO_WEIGHTS else _colour(_GROUPS.index(group) if group in _GROUPS else len(_GROUPS))


def _colour(i: int) -> str:
    return f"s{i % _COLOURS}"


def _listed(*parts: str | None) -> str:
    return " · ".join(part for part in parts if part)
