"""The document as one HTML file that a team can share: style, plots and text inside, no script, nothing fetched."""

from __future__ import annotations

import json
import re
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
_STACKED = re.compile(r"([^(\[]+) ([(\[].*[)\]])")
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
    return tag(
        "header", tag("h1", doc.get("name") or ""), headline and tag("p", headline, class_="lead"), line and tag("p", line, class_="about")
    )


def _tiles(doc: Mapping[str, Any]) -> Markup:
    file, loss, bench = tables.shipped(doc)
    wide, size = tables.sixteen_bit_bytes(doc), file.get("size_bytes")
    of_wide = (
        f"{f.percent(size / wide, 0)} of the 16-bit model ({f.size(wide)})"
        if f.known(wide) and f.known(size) and wide > 0 and wide != size
        else ""
    )
    count, failed = len(tables.checks(doc).rows), tables.failed(doc)
    samples = tables.section(bench, "samples_ms").get("ttft") or ()
    measured = tables.section(tables.section(doc, "training"), "measured")
    change = f.within(loss.get("change"), loss.get("change_low"), loss.get("change_high"), f.change)
    tiles = [
        _tile(file.get("file") or "file that ships", f.size(size), of_wide),
        _tile(
            f"loss on {loss.get('set')}, against the untuned base",
            f.change(loss.get("change")),
            _joined(change[len(f.change(loss.get("change"))) :].strip(), f.sample(loss.get("rows"), loss.get("tokens"))),
        ),
        _tile(
            "KL to the trained model, nats a token",
            f.number(file.get("kl")),
            _joined(file.get("top1") is not None and f"same top token {f.percent(file['top1'])}", f.sample(None, file.get("tokens"))),
        ),
        _tile("decode", _suffixed(f.number(bench.get("decode_tok_per_s")), " tok/s"), comparison.bench_words(bench)),
        _tile(
            "to the first token",
            f.ms(bench.get("ttft_ms")),
            _joined(f.known(bench.get("prompt_tokens")) and f"{bench['prompt_tokens']}-token prompt", samples and f"{len(samples)} runs"),
        ),
        _tile("peak memory while running", f.size(bench.get("peak_rss_bytes")), bench.get("runtime") or ""),
        _tile("training time", f.seconds(measured.get("seconds")), _suffixed(f.size(measured.get("peak_rss_bytes")), " peak memory")),
        _tile(
            "checks passed",
            f"{count - failed} of {count}" if count else "",
            f"{tables.FAIL}{failed} failed" if failed else f"{tables.PASS}nothing failed",
            "fail" if failed else "pass",
        ),
    ]
    return tag("div", *tiles, class_="tiles") if any(tiles) else _NOTHING


def _tile(name: str, value: str, note: str, style: str = "") -> Markup:
    if not value:
        return _NOTHING
    return tag(
        "div",
        tag("div", value, class_="value"),
        tag("div", name, class_="name"),
        note and tag("div", note, class_="n"),
        class_=f"tile {style}".strip(),
    )


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
        body = _words(words) if words.strip() else tag("div", "(an empty answer)", class_="words n")
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
    return (
        tag(
            "details", tag("summary", "The resolved recipe, every default filled in"), tag("pre", tag("code", "\n".join(_yaml(recipe, ""))))
        )
        if recipe
        else _NOTHING
    )


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


def _table(table: tables.Table) -> Markup:
    """A table in a box of its own that scrolls sideways; what stands in brackets goes on a line below its figure."""
    if not table:
        return _NOTHING
    align = ["right" if right else None for right in table.numeric]
    head = tag("tr", *(tag("th", title, class_=a, scope="col") for title, a in zip(table.titles, align, strict=True)))
    body = [tag("tr", *(_cell(cell, a) for cell, a in zip(row, align, strict=True))) for row in table.rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex=0, role="region", aria_label="table")


def _cell(cell: str, align: str | None) -> Markup:
    if cell.startswith((tables.PASS, tables.FAIL)):
        return tag("td", cell, class_="good" if cell.startswith(tables.PASS) else "bad")
    stacked = _STACKED.fullmatch(cell) if align else None
    if stacked:
        return tag("td", stacked[1], tag("span", stacked[2], class_="below"), class_=align)
    return tag("td", cell, class_=align or ("long" if len(cell) > 48 else None), lang=language(cell))


def _pairs(pairs: Sequence[tuple[str, str]]) -> Markup:
    if not pairs:
        return _NOTHING
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in pairs]
    return tag("div", tag("table", tag("tbody", *rows), class_="pairs"), class_="scroll")


def _joined(*parts: Any) -> str:
    return ", ".join(part for part in parts if part)


def _suffixed(figure: str, unit: str) -> str:
    return figure and figure + unit
