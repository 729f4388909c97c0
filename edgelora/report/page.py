"""The document as one HTML file that a team can share: style, plots and text inside, nothing fetched.

One small script sorts tables; the page's policy names its hash and allows no other, and the page is whole without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgelora.report import agreement, charts, comparison, confusion, differences, estimates, sorting, summary, tables, turns
from edgelora.report import figures as f
from edgelora.report.markup import NOTHING, Markup, breakable, language, tag
from edgelora.report.schema import is_comparison
from edgelora.report.style import CSS

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src '{hash}'; img-src data:; base-uri 'none'; form-action 'none'"
_LONG_ANSWER, _ANSWER_START = 900, 600  # characters; the rest is folded away
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w.-]*")
_STACKED = re.compile(r"([^(\[]+) (\[[^\]]*\])? ?(\(.*\))?")  # a figure, its interval, and what is said of it


def to_html(doc: Mapping[str, Any]) -> str:
    """The report or comparison as a whole HTML page. Every text of the document is escaped."""
    parts = _comparison(doc) if is_comparison(doc) else _report(doc)
    name = comparison.title(doc) if is_comparison(doc) else str(doc.get("name") or "report")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY.format(hash=sorting.HASH)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", name),
        tag("style", Markup(CSS)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *parts), tag('script', Markup(sorting.SCRIPT))), lang='en')}\n"


def _report(doc: Mapping[str, Any]) -> list[Markup]:
    return [
        _header(doc),
        _tiles(doc),
        _section(
            "Size, quality and speed" if tables.rows(doc, "bench") else "Size and quality", charts.files(doc), _table(tables.files(doc))
        ),
        _section("Size against loss", *charts.frontiers(doc), _table(tables.plans(doc))),
        _section("Where the MB go", _beside(charts.anatomy(doc), _table(tables.anatomy(doc)))),
        _section("Loss before and after" if _has_before(doc) else "Loss", *_losses(doc)),
        _section("Labels", _table(tables.accuracy(doc)), _beside(confusion.drawing(doc), _table(confusion.mistakes(doc)))),
        _section(_speed_title(doc), charts.latency(doc), _table(tables.bench(doc)), _list(tables.disturbances(doc))),
        _section("Which file is faster", *_in_turns(doc)),
        _section("The same file in a browser", *_agreement(doc)),
        _section("Devices", _table(tables.devices(doc))),
        _section("Estimates for other devices", *_estimates(doc)),
        _section("Answers side by side", *_answers(doc)),
        _section("Which merge was kept", *_merge(doc)),
        _section("Checks", _table(tables.checks(doc))),
        _section("Training", _beside(charts.training(doc), _pairs(tables.training(doc))), _notes(tables.section(doc, "training"))),
        _section("Machine and versions", _machine(doc)),
        _section("Commands to repeat this", _commands(doc)),
        _section("Recipe", _recipe(doc)),
        _section("Notes", _notes(doc)),
    ]


def _comparison(doc: Mapping[str, Any]) -> list[Markup]:
    found = comparison.tables_of(doc)
    head = tag("header", tag("h1", comparison.title(doc)), _notes(doc))
    said = comparison.findings(doc)
    verdicts = [
        _section("What really differs", _list(said[differences.REAL])),
        _section("What is noise", _folded(said[differences.NOISE])),
        _section("What cannot be told", _folded(said[differences.UNKNOWN])),
    ]
    sections = [_section(name, _table(table)) for name, table in found]
    middle = _section("Over commits", charts.over_commits(doc)) or _section("Size and quality", charts.compared(doc))
    return [head, *verdicts, sections[0], middle, *sections[1:]]


def _section(title: str, *children: Markup) -> Markup:
    """A heading and what is below it; nothing at all when nothing is below."""
    return tag("section", tag("h2", title), *children) if any(children) else NOTHING


def _header(doc: Mapping[str, Any]) -> Markup:
    machine = tables.section(doc, "machine").get("class")
    version, commit = doc.get("edgelora"), doc.get("commit")
    about = (doc.get("created"), machine, f.labelled("edgelora ", version or ""), f.labelled("commit ", commit or ""))
    line, headline = " · ".join(part for part in about if part), summary.headline(doc)
    lead = tag("p", headline, class_="lead") if headline else None
    return tag("header", tag("h1", doc.get("name") or ""), lead, tag("p", line, class_="about") if line else None)


def _tiles(doc: Mapping[str, Any]) -> Markup:
    """The figures to look at first, of the file that ships."""
    file, loss, bench = summary.shipped(doc)
    measured = tables.section(tables.section(doc, "training"), "measured")
    top1, prompt = f.percent(file.get("top1")), f.count(bench.get("prompt_tokens"))
    runs = f.count(len(tables.section(bench, "samples_ms").get("ttft") or ()) or None)
    changed = f.ends(loss.get("change_low"), loss.get("change_high"), f.change)
    tiles = [
        _tile(f.size(file.get("size_bytes")), file.get("file") or "the file that ships", _against_16bit(doc, file)),
        _tile(
            f.change(loss.get("change")),
            f"loss on {loss.get('set') or 'held-out rows'}, against the untuned base",
            _joined(changed, f.sample(loss.get("rows"), loss.get("tokens"))),
        ),
        _tile(
            f.number(file.get("kl")),
            f"KL to {summary.reference(doc)}, nats a token",
            _joined(f.labelled("same top token ", top1), f.sample(file.get("rows"), file.get("tokens"))),
        ),
        _tile(
            f.suffixed(f.number(bench.get("decode_tok_per_s")), "tok/s"),
            "decode",
            _joined(comparison.bench_words(bench), "disturbed" if tables.disturbed(bench) else ""),
        ),
        _tile(f.ms(bench.get("ttft_ms")), "to the first token", _joined(f.suffixed(prompt, "prompt tokens"), f.suffixed(runs, "runs"))),
        _tile(f.size(bench.get("peak_rss_bytes")), "peak memory while running", bench.get("runtime") or ""),
        _tile(f.seconds(measured.get("seconds")), "training time", f.suffixed(f.size(measured.get("peak_rss_bytes")), "peak memory")),
        _checks_tile(doc),
    ]
    return tag("div", *tiles, class_="tiles") if any(tiles) else NOTHING


def _against_16bit(doc: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    wide, size = summary.sixteen_bit_bytes(doc), file.get("size_bytes")
    if not f.known(wide) or not f.known(size) or wide <= 0 or wide == size:
        return ""
    return f"{f.percent(size / wide, 0)} of the 16-bit model ({f.size(wide)})"


def _checks_tile(doc: Mapping[str, Any]) -> Markup:
    passed, failed, unjudged = summary.tally(doc)
    count = passed + failed + unjudged
    style = "fail" if failed else "" if unjudged else "pass"
    return _tile(f"{passed} of {count}", "checks passed", summary.tally_words(doc), style) if count else NOTHING


def _tile(value: str, name: str, note: str, style: str = "") -> Markup:
    if not value:
        return NOTHING
    parts = [tag("div", value, class_="value"), tag("div", name, class_="name"), tag("div", note, class_="n") if note else None]
    return tag("div", *parts, class_=f"tile {style}".strip())


def _losses(doc: Mapping[str, Any]) -> list[Markup]:
    figure, table = charts.losses(doc), _table(tables.losses(doc))
    if not figure:
        return [table]
    note = "In brackets and as bands: 95 % intervals."
    if _has_before(doc):
        note = f"Untuned base: the base model exported to the same type. {note}"
    return [tag("p", note, class_="caption"), _beside(figure, table)]


def _has_before(doc: Mapping[str, Any]) -> bool:
    return any(tables.section(row, "before") for row in tables.rows(doc, "losses"))


def _speed_title(doc: Mapping[str, Any]) -> str:
    machine = tables.section(doc, "machine").get("class")
    elsewhere = [bool(row.get("device")) for row in tables.rows(doc, "bench")]
    if any(elsewhere):
        return "Speed on other devices" if all(elsewhere) else "Speed on this machine and on other devices"
    return f"Speed on this machine ({machine})" if machine else "Speed on this machine"


def _estimates(doc: Mapping[str, Any]) -> list[Markup]:
    """The table, and that nothing in it was measured; nothing where there is no estimate."""
    table = _table(estimates.table(doc))
    note = (
        "Nothing here was measured. An estimate is the device's memory bandwidth by its data sheet, times the share of it that the runtime "
        "reached in figures that others published, over the bytes that one token reads; in brackets the range for 19 of 20 devices. It knows "
        "nothing of heat, of other apps, or of the time to the first token."
    )
    return [tag("p", note, class_="caption"), table, _list(estimates.trust(doc))] if table else []


def _in_turns(doc: Mapping[str, Any]) -> list[Markup]:
    table = _table(turns.table(doc))
    note = (
        "Measured in turns, repeat by repeat, and compared pair by pair: the middle pair says by how much; p is the chance that two equal "
        "files look so different (signed-rank test)."
    )
    return [tag("p", note, class_="caption"), table] if table else []


def _beside(figure: Markup, table: Markup) -> Markup:
    if figure and table:
        return tag("div", figure, table, class_="beside")
    return tag("div", figure, class_="figures") if figure else table


def _answers(doc: Mapping[str, Any]) -> list[Markup]:
    series = charts.colours(doc)
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


def _agreement(doc: Mapping[str, Any]) -> list[Markup]:
    """The table, and greedy answers that differ: rounding alone can turn a word, and then the rest follows it."""
    shown = []
    for prompt, said in agreement.differing(doc):
        head = tag("h3", tag("span", "Prompt", class_="n"), tag("bdi", prompt, lang=language(prompt)))
        shown.append(tag("article", head, tag("div", *(_said("ref", who, words) for who, words in said), class_="said"), class_="answer"))
    table = _table(agreement.table(doc))
    note = (
        "Loss and top token on the same answers, written token by token in both; then greedy answers of at most 16 tokens. "
        "Those that are not the same are shown."
    )
    return [tag("p", note, class_="caption"), table, *shown] if table else []


def _said(style: str, who: str, words: str) -> Markup:
    if len(words) > _LONG_ANSWER:
        rest = tag("details", tag("summary", f"{f.count(len(words) - _ANSWER_START)} more characters"), _words(words[_ANSWER_START:]))
        body = [_words(words[:_ANSWER_START] + "…"), rest]
    else:
        body = [_words(words) if words.strip() else tag("div", "(an empty answer)", class_="words n")]
    return tag("div", tag("div", tag("i", class_=style), tag("span", who), class_="who"), *body)


def _words(words: str) -> Markup:
    return tag("div", words, class_="words", dir="auto", lang=language(words))


def _merge(doc: Mapping[str, Any]) -> list[Markup]:
    return [*(tag("p", words) for words in tables.merge_words(doc)), _table(tables.merge(doc))]


def _machine(doc: Mapping[str, Any]) -> Markup:
    versions = [(name, str(version)) for name, version in tables.section(doc, "versions").items() if version]
    found = [_pairs(tables.machine(doc)), _pairs(versions)]
    return tag("div", *found, class_="two") if any(found) else NOTHING


def _commands(doc: Mapping[str, Any]) -> Markup:
    lines = [command for command in doc.get("commands") or () if command]
    return tag("pre", tag("code", "\n".join(lines))) if lines else NOTHING


def _recipe(doc: Mapping[str, Any]) -> Markup:
    recipe = tables.section(doc, "recipe")
    if not recipe:
        return NOTHING
    lines = "\n".join(_yaml(recipe, ""))
    return tag("details", tag("summary", "The resolved recipe, every default filled in"), tag("pre", tag("code", lines)))


def _yaml(value: Any, indent: str) -> Iterable[str]:
    """Lines of YAML; scalars are written as JSON, which YAML contains."""
    named = isinstance(value, Mapping)
    for key, item in value.items() if named else ((None, item) for item in value):
        sign = f"{key if _PLAIN_KEY.fullmatch(str(key)) else json.dumps(key)}:" if named else "-"
        if isinstance(item, (Mapping, list, tuple)) and item:
            yield f"{indent}{sign}"
            yield from _yaml(item, indent + "  ")
        else:
            yield f"{indent}{sign} {json.dumps(item, ensure_ascii=False, default=str)}"


def _notes(doc: Mapping[str, Any]) -> Markup:
    return _list([note for note in doc.get("notes") or () if note])


def _folded(lines: Sequence[str]) -> Markup:
    """A list that is opened by those who want it: its length says most."""
    words = f"{f.count(len(lines))} figure{'' if len(lines) == 1 else 's'}"
    return tag("details", tag("summary", words), _list(lines)) if lines else NOTHING


def _list(lines: Sequence[str]) -> Markup:
    return tag("ul", *(tag("li", line) for line in lines), class_="notes") if lines else NOTHING


def _table(table: tables.Table) -> Markup:
    """A table in a box of its own that scrolls sideways; what stands in brackets goes on lines below its figure."""
    if not table:
        return NOTHING
    align = ["right" if right else None for right in table.numeric]
    head = tag("tr", *(tag("th", *breakable(title), class_=a, scope="col") for title, a in zip(table.titles, align, strict=True)))
    keys = table.keys or [(None,) * len(align)] * len(table.rows)
    body = [
        tag("tr", *(_cell(cell, a, key) for cell, a, key in zip(row, align, by, strict=True)))
        for row, by in zip(table.rows, keys, strict=True)
    ]
    sortable = "sortable" if len(table.rows) > 1 else None
    whole = tag("table", tag("thead", head), tag("tbody", *body), class_=sortable)
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label="table")


def _cell(cell: str, align: str | None, key: float | None) -> Markup:
    verdict = {tables.PASS: "good", tables.FAIL: "bad", tables.UNJUDGED: "unsure"}.get(cell[:2])
    if verdict:
        return tag("td", cell, class_=verdict)
    stacked = _STACKED.fullmatch(cell) if align else None
    if stacked and (stacked[2] or stacked[3]):
        below = [tag("span", words, class_="below") for words in stacked.groups()[1:] if words]
        return tag("td", stacked[1], *below, class_=align, data_by=key)
    return tag("td", *breakable(cell), class_=align or ("long" if len(cell) > 48 else None), lang=language(cell), data_by=key)


def _pairs(pairs: Sequence[tuple[str, str]]) -> Markup:
    if not pairs:
        return NOTHING
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in pairs]
    return tag("div", tag("table", tag("tbody", *rows), class_="pairs"), class_="scroll")


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
