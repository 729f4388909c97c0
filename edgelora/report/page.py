"""The document as one HTML file that a team can share: style, plots and text inside, no script, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgelora.report import comparison, plot, tables
from edgelora.report import figures as f
from edgelora.report.markup import Markup, join, language, tag, visible
from edgelora.report.schema import is_comparison
from edgelora.report.style import CSS

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_LONG_ANSWER, _ANSWER_START = 900, 600  # characters; the rest is folded away
_SERIES = 6  # colours in the style sheet
_NOTHING = Markup("")


def to_html(doc: Mapping[str, Any]) -> str:
    """The report or comparison as a whole HTML page. Every text of the document is escaped."""
    parts = _comparison(doc) if is_comparison(doc) else _report(doc)
    name = comparison.title(doc) if is_comparison(doc) else str(doc.get("name") or "report")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", name),
        tag("style", Markup(CSS)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *parts)), lang='en')}\n"


def _report(doc: Mapping[str, Any]) -> list[Markup]:
    return [
        _header(doc),
        _tiles(doc),
        _section("Training, size and quality", _training_plots(doc), _table(tables.files(doc))),
        _section("Loss before and after", _losses(doc), _table(tables.accuracy(doc))),
        _section("Speed on this machine", _latency(doc), _table(tables.bench(doc))),
        _section("Answers side by side", *_answers(doc)),
        _section("Which merge was kept", *_merge(doc)),
        _section("Checks", _table(tables.checks(doc))),
        _section("Training", _pairs(tables.training(doc)), _notes(tables.section(doc, "training"))),
        _section("Machine and versions", _machine(doc)),
        _section("Commands to repeat this", _commands(doc)),
        _section("Recipe", _recipe(doc)),
        _section("Notes", _notes(doc)),
    ]


def _comparison(doc: Mapping[str, Any]) -> list[Markup]:
    found = comparison.tables_of(doc)
    head = tag("header", tag("h1", comparison.title(doc)), _notes(doc))
    sections = [_section(name, _table(table)) for name, table in found]
    return [head, sections[0], _section("Size and quality", _comparison_plots(doc)), *sections[1:]]


def _section(title: str, *children: Markup) -> Markup:
    """A heading and what is below it; nothing at all when nothing is below."""
    return tag("section", tag("h2", title), *children) if any(children) else _NOTHING


def _header(doc: Mapping[str, Any]) -> Markup:
    machine = tables.section(doc, "machine").get("class")
    version, commit = doc.get("edgelora"), doc.get("commit")
    about = [doc.get("created"), machine, version and f"edgelora {version}", commit and f"commit {commit}"]
    line = " · ".join(part for part in about if part)
    headline = tables.headline(doc)
    return tag("header", tag("h1", doc.get("name") or ""), headline and tag("p", headline, class_="lead"), line and tag("p", line, class_="about"))


def _tiles(doc: Mapping[str, Any]) -> Markup:
    file, loss, bench = tables.shipped(doc)
    wide, size = tables.sixteen_bit_bytes(doc), file.get("size_bytes")
    of_wide = f"{f.percent(size / wide, 0)} of the 16-bit model ({f.size(wide)})" if f.known(wide) and f.known(size) and wide > 0 and wide != size else ""
    count, failed = len(tables.checks(doc).rows), tables.failed(doc)
    samples = tables.section(bench, "samples_ms").get("ttft") or ()
    measured = tables.section(tables.section(doc, "training"), "measured")
    change = f.within(loss.get("change"), loss.get("change_low"), loss.get("change_high"), f.change)
    tiles = [
        _tile(file.get("file") or "file that ships", f.size(size), of_wide),
        _tile(f"loss on {loss.get('set')} against the untuned base", f.change(loss.get("change")), _joined(change[len(f.change(loss.get("change"))) :].strip(), f.sample(loss.get("rows"), loss.get("tokens")))),
        _tile("KL to the trained model, nats a token", f.number(file.get("kl")), _joined(file.get("top1") is not None and f"same top token {f.percent(file['top1'])}", f.sample(None, file.get("tokens")))),
        _tile("decode", _suffixed(f.number(bench.get("decode_tok_per_s")), " tok/s"), comparison.bench_words(bench)),
        _tile("to the first token", f.ms(bench.get("ttft_ms")), _joined(f.known(bench.get("prompt_tokens")) and f"{bench['prompt_tokens']}-token prompt", samples and f"{len(samples)} runs")),
        _tile("peak memory while running", f.size(bench.get("peak_rss_bytes")), bench.get("runtime") or ""),
        _tile("training time", f.seconds(measured.get("seconds")), _suffixed(f.size(measured.get("peak_rss_bytes")), " peak memory")),
        _tile("checks passed", f"{count - failed} of {count}" if count else "", f"{tables.FAIL}{failed} failed" if failed else f"{tables.PASS}nothing failed", "fail" if failed else "pass"),
    ]
    return tag("div", *tiles, class_="tiles") if any(tiles) else _NOTHING


def _tile(name: str, value: str, note: str, style: str = "") -> Markup:
    if not value:
        return _NOTHING
    return tag("div", tag("div", name, class_="name"), tag("div", value, class_="value"), note and tag("div", note, class_="n"), class_=f"tile {style}".strip())


def _training_plots(doc: Mapping[str, Any]) -> Markup:
    return _figures(_curves(doc), _sizes(doc), _quality(doc))


def _curves(doc: Mapping[str, Any]) -> Markup:
    train = tables.section(doc, "training")
    named = (("train", train.get("curve")), ("valid", train.get("valid_curve")))
    series = []
    for name, rows in named:
        points = [(row["step"], row["loss"]) for row in rows or () if row and f.known(row.get("step")) and f.known(row.get("loss"))]
        if points:
            series.append((name, sorted(points)))
    if not series:
        return _NOTHING
    legend = [_key(f"s{i}", name) for i, (name, _) in enumerate(series)]
    return _figure("Loss during training", legend, plot.curves(series, "step", "loss, nats a token"))


def _sizes(doc: Mapping[str, Any]) -> Markup:
    series, rows = _series(doc), []
    files = [row for row in tables.rows(doc, "files") if f.known(row.get("size_bytes"))]
    wide = tables.sixteen_bit_bytes(doc)
    if f.known(wide) and not any(row["size_bytes"] == wide for row in files):
        rows.append(plot.Bar("16-bit model", wide, f.size(wide), "ref"))
    for row in files:
        expected = row.get("predicted_bytes")
        hint = f"{row.get('file')}: {f.size(row['size_bytes'])}" + (f", predicted: {f.size(expected)}" if f.known(expected) else "")
        rows.append(plot.Bar(row.get("file") or "", row["size_bytes"], f.size(row["size_bytes"]), series.get(row.get("file"), "s0"), (), expected if f.known(expected) else None, hint))
    if not files:
        return _NOTHING
    legend = [tag("span", tag("i", class_="dashed"), "predicted", class_="key")] if any(bar.expected for bar in rows) else []
    return _figure("Size of each file", legend, plot.bars(rows, "size of each file"))


def _quality(doc: Mapping[str, Any]) -> Markup:
    series, names = _series(doc), _short_names(doc)
    points = []
    for row in tables.rows(doc, "files"):
        size, kl = row.get("size_bytes"), row.get("kl")
        if f.known(size) and f.known(kl):
            shown = f.within(kl, row.get("kl_low"), row.get("kl_high"), f.number)
            hint = f"{row.get('file')}: {f.size(size)}, KL {shown}"
            points.append(plot.Point(names.get(row.get("file"), ""), size / 1e6, kl, row.get("kl_low"), row.get("kl_high"), series.get(row.get("file"), "s0"), hint))
    if not points:
        return _NOTHING
    return _figure("Distance to the trained model against size", [tag("span", "lower left is better")], plot.scatter(points, "size, MB", "KL, nats a token"))


def _losses(doc: Mapping[str, Any]) -> Markup:
    series, names = _series(doc), _short_names(doc)
    rows = []
    for row in tables.rows(doc, "losses"):
        before, after = (_measure(tables.section(row, key)) for key in ("before", "after"))
        if before or after:
            label = " · ".join(part for part in (row.get("set"), names.get(row.get("file"), row.get("file"))) if part)
            rows.append(plot.Pair(label, f.change(row.get("change")), before, after, series.get(row.get("file"), "s0")))
    table = _table(tables.losses(doc))
    if not rows:
        return table
    legend = [_key("ref", "untuned base"), *(_key(style, names[file]) for file, style in series.items() if file in names and any(r.get("file") == file for r in tables.rows(doc, "losses")))]
    figure = _figure("Loss on rows that training never saw", legend, plot.pairs(rows, "loss, nats a token; lower is better", f.loss))
    note = "Untuned base: the base model exported to the same type. Intervals in brackets and as bands: 95 % bootstrap; the change is paired by row."
    return join([tag("p", note, class_="caption"), tag("div", figure, table, class_="beside")])


def _measure(values: Mapping[str, Any]) -> tuple[float, float | None, float | None] | None:
    value = values.get("loss")
    return (value, values.get("low"), values.get("high")) if f.known(value) else None


def _latency(doc: Mapping[str, Any]) -> Markup:
    """Three panels with the same rows, so that the eye can go across."""
    series, rows = _series(doc), tables.rows(doc, "bench")
    labels = _bench_labels(doc, rows)

    def panel(title: str, key: str, show: Any, samples: str = "") -> Markup:
        bars = []
        for row, label in zip(rows, labels, strict=True):
            if f.known(row.get(key)):
                ticks = [s for s in tables.section(row, "samples_ms").get(samples) or () if f.known(s)]
                bars.append(plot.Bar(label, row[key], show(row[key]), series.get(row.get("file"), "s0"), ticks))
        legend = [tag("span", tag("i", class_="tick"), "each run", class_="key")] if any(bar.samples for bar in bars) else []
        return _figure(title, legend, plot.bars(bars, title)) if bars else _NOTHING

    figures = [
        panel("Time to the first token, lower is better", "ttft_ms", f.ms, "ttft"),
        panel("Prefill in tok/s, higher is better", "prefill_tok_per_s", f.number),
        panel("Decode in tok/s, higher is better", "decode_tok_per_s", f.number),
    ]
    return _figures(*figures)


def _bench_labels(doc: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The file, and of runtime, prompt and threads what differs between rows."""
    names = _short_names(doc)

    def differs(key: str) -> bool:
        return len({row.get(key) for row in rows}) > 1

    per_file = {row.get("file"): {r.get("runtime") for r in rows if r.get("file") == row.get("file")} for row in rows}
    labels = []
    for row in rows:
        file, prompt, threads = row.get("file"), row.get("prompt_tokens"), row.get("threads")
        parts = [names.get(file, file), len(per_file[file]) > 1 and row.get("runtime")]
        parts += [differs("prompt_tokens") and f.known(prompt) and f"{prompt} tokens"]
        parts += [differs("threads") and f.known(threads) and f"{threads} thread{'' if threads == 1 else 's'}"]
        labels.append(" · ".join(part for part in parts if part))
    return labels


def _answers(doc: Mapping[str, Any]) -> list[Markup]:
    series = _series(doc)
    shown = []
    for row in tables.rows(doc, "answers"):
        columns = [("ref", "Untuned base", row.get("before"))]
        columns += [(series.get(file, "ref"), file, said) for file, said in (row.get("after") or {}).items()]
        said = [_said(style, who, words) for style, who, words in columns if words is not None]
        if said:
            question = row.get("question") or ""
            head = tag("h3", tag("span", "Question", class_="n"), tag("bdi", question, lang=language(question)))
            shown.append(tag("article", head, tag("div", *said, class_="said"), class_="answer"))
    return shown


def _said(style: str, who: str, words: str) -> Markup:
    if len(words) > _LONG_ANSWER:
        rest = tag("details", tag("summary", f"{f.count(len(words) - _ANSWER_START)} more characters"), _words(words[_ANSWER_START:]))
        body = join([_words(words[:_ANSWER_START] + "…"), rest])
    else:
        body = _words(words) if words.strip() else tag("div", "(an empty answer)", class_="n")
    return tag("div", tag("div", tag("i", class_=style), tag("span", who), class_="who"), body)


def _words(words: str) -> Markup:
    return tag("div", words, class_="words", dir="auto", lang=language(words))


def _merge(doc: Mapping[str, Any]) -> list[Markup]:
    merge = tables.section(doc, "merge")
    kept, why = merge.get("kept"), merge.get("why")
    words = f"Kept: {tables.merge_name(kept)}. " if kept else ""
    said = (words + (why or "")).strip()
    return [tag("p", said) if said else _NOTHING, _table(tables.merge(doc))]


def _machine(doc: Mapping[str, Any]) -> Markup:
    versions = [(name, str(version)) for name, version in tables.section(doc, "versions").items() if version]
    found = [_pairs(tables.machine(doc)), _pairs(versions)]
    return tag("div", *found, class_="two") if any(found) else _NOTHING


def _commands(doc: Mapping[str, Any]) -> Markup:
    lines = [command for command in doc.get("commands") or () if command]
    return tag("pre", tag("code", "\n".join(lines))) if lines else _NOTHING


def _recipe(doc: Mapping[str, Any]) -> Markup:
    recipe = tables.section(doc, "recipe")
    return tag("details", tag("summary", "The resolved recipe, every default filled in"), tag("pre", tag("code", "\n".join(_yaml(recipe, ""))))) if recipe else _NOTHING


def _yaml(value: Any, indent: str) -> Iterable[str]:
    """Lines of YAML; scalars are written as JSON, which YAML contains."""
    entries = value.items() if isinstance(value, Mapping) else (("-", item) for item in value)
    for key, item in entries:
        sign = "-" if key == "-" and not isinstance(value, Mapping) else f"{key}:"
        if isinstance(item, (Mapping, list, tuple)) and item:
            yield f"{indent}{sign}"
            yield from _yaml(item, indent + "  ")
        else:
            yield f"{indent}{sign} {json.dumps(item, ensure_ascii=False, default=str)}"


def _notes(doc: Mapping[str, Any]) -> Markup:
    notes = [note for note in doc.get("notes") or () if note]
    return tag("ul", *(tag("li", note) for note in notes), class_="notes") if notes else _NOTHING


def _comparison_plots(doc: Mapping[str, Any]) -> Markup:
    runs, rows = tables.rows(doc, "runs"), tables.rows(doc, "rows")
    sizes = {comparison.kind_of(row): row for row in rows if row.get("what") == "size"}
    distances = {comparison.kind_of(row): row for row in rows if row.get("unit") == "nats" and str(row.get("what")).startswith("KL")}
    bars, points = [], []
    for kind, row in sizes.items():
        for i, run in enumerate(runs):
            size, style = comparison.entry(row, "values", i), f"s{i % _SERIES}"
            if not f.known(size):
                continue
            bars.append(plot.Bar(f"{kind} · {run.get('label')}", size, f.size(size), style))
            kl, low, high = (comparison.entry(distances.get(kind, {}), key, i) for key in ("values", "low", "high"))
            if f.known(kl):
                points.append(plot.Point(str(row.get("type") or kind), size / 1e6, kl, low, high, style, f"{run.get('label')}, {kind}: {f.size(size)}, KL {f.number(kl)}"))
    legend = [_key(f"s{i % _SERIES}", run.get("label") or "") for i, run in enumerate(runs)]
    return _figures(
        _figure("Size of each file", legend, plot.bars(bars, "size of each file")) if bars else _NOTHING,
        _figure("Distance to the trained model against size", legend, plot.scatter(points, "size, MB", "KL, nats a token")) if points else _NOTHING,
    )


def _series(doc: Mapping[str, Any]) -> dict[Any, str]:
    """One colour a file, the same in every plot."""
    names = dict.fromkeys(row.get("file") for section in ("files", "losses", "bench") for row in tables.rows(doc, section))
    return {name: f"s{i % _SERIES}" for i, name in enumerate(names)}


def _short_names(doc: Mapping[str, Any]) -> dict[Any, str]:
    """A file's type where that is unambiguous, else format and type, else its name."""
    files = tables.rows(doc, "files")

    def short(row: Mapping[str, Any]) -> str:
        same = [r for r in files if r.get("type") == row.get("type")]
        if row.get("type") and len(same) == 1:
            return str(row["type"])
        if row.get("type") and row.get("format") and sum(r.get("format") == row["format"] for r in same) == 1:
            return f"{row['format']} {row['type']}"
        return row.get("file") or ""

    return {row.get("file"): short(row) for row in files}


def _table(table: tables.Table) -> Markup:
    """A table in a box of its own that scrolls sideways; an interval goes on a line below its figure."""
    if not table:
        return _NOTHING
    align = ["right" if right else None for right in table.numeric]
    head = tag("tr", *(tag("th", title, class_=a, scope="col") for title, a in zip(table.titles, align, strict=True)))
    body = [tag("tr", *(_cell(cell, a) for cell, a in zip(row, align, strict=True))) for row in table.rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex=0, role="region", aria_label="table")


def _cell(cell: str, align: str | None) -> Markup:
    if cell.startswith((tables.PASS, tables.FAIL)):
        return tag("td", cell, class_="good" if cell.startswith(tables.PASS) else "bad")
    if align and cell.endswith("]") and " [" in cell:
        figure, _, interval = cell.rpartition(" [")
        return tag("td", figure, tag("span", f"[{interval}", class_="interval-text"), class_=align)
    return tag("td", cell, class_=align or ("long" if len(cell) > 48 else None), lang=language(cell))


def _pairs(pairs: Sequence[tuple[str, str]]) -> Markup:
    if not pairs:
        return _NOTHING
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in pairs]
    return tag("div", tag("table", tag("tbody", *rows), class_="pairs"), class_="scroll")


def _figure(title: str, legend: Sequence[Markup], drawing: Markup) -> Markup:
    return tag("figure", tag("figcaption", title, tag("span", *legend, class_="legend") if legend else None), drawing)


def _figures(*figures: Markup) -> Markup:
    return tag("div", *figures, class_="figures") if any(figures) else _NOTHING


def _key(style: str, name: str) -> Markup:
    return tag("span", tag("i", class_=style), tag("span", name), class_="key")


def _joined(*parts: Any) -> str:
    return ", ".join(part for part in parts if part)


def _suffixed(figure: str, unit: str) -> str:
    return figure and figure + unit
