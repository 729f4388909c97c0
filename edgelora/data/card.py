"""The data card: what a data set is made of, everything that was changed, left out or found. As JSON and as Markdown.

Meant to be shown: it names lines, never the personal data it counts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgelora import __version__, artifact
from edgelora import recipe as recipes
from edgelora.data import assign, gaps, keys
from edgelora.data.prepare import Finished, Prepared

_MOST = 20  # examples and lines listed of anything
_MOST_KINDS = 50_000  # different changes told apart while counting
SCHEMA = 1


@dataclass
class Tally:
    """What the second pass did, counted row by row."""

    changes: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    examples: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (step, before, after)
    findings: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    labels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, finished: Finished, classify: bool) -> None:
        self.changes.update(change.step for change in finished.changes)
        self.rows.update({change.step for change in finished.changes})
        for change in finished.changes:
            example = (change.step, _short(change.before), _short(change.after))
            if example in self.examples or len(self.examples) < _MOST_KINDS:
                self.examples[example] += 1
        for finding in finished.findings:
            self.findings[finding.what] += 1
            if len(self.lines[finding.what]) < _MOST:
                self.lines[finding.what].append(finished.row.line)
        if classify:
            self.labels[finished.set][finished.row.answer] += 1


def card(prepared: Prepared, tally: Tally, licence: str | None) -> dict[str, Any]:
    """The document. Everything in it is a JSON value; texts in it are short excerpts of changes and words, no personal data."""
    index, data = prepared.index, prepared.data
    left = Counter(why.reason for why in prepared.assigned.left.values())
    left.update(record.reason for _, record in prepared.unread)
    disagreeing = assign.contradictions(index, prepared.assigned)
    cut = gaps.cut_length(prepared.lengths) if data.task == "chat" else None
    across = [pair for pair in prepared.near if index_set(prepared, pair[0]) != index_set(prepared, pair[1])]
    return {
        "schema": SCHEMA,
        "edgelora": __version__,
        "licence": licence,
        "sources": [_source(prepared, name) for name in prepared.sources],
        "normalization": keys.VERSION,
        "rows_read": len(index) + len(prepared.unread),
        "rows": prepared.counts,
        "dropped": dict(left.most_common()),
        "changes": {
            step: {
                "changes": n,
                "rows": tally.rows[step],
                "most": [[b, a, c] for (s, b, a), c in tally.examples.most_common() if s == step][:_MOST],
            }
            for step, n in tally.changes.most_common()
            if step != "personal"
        }
        | ({"personal": {"changes": n, "rows": tally.rows["personal"], "most": []}} if (n := tally.changes["personal"]) else {}),
        "spellings": [{"kind": c.kind, "spellings": dict(c.spellings), "chosen": c.chosen} for c in prepared.decided.choices],
        "typos": [{"word": typo.word, "suggestion": typo.suggestion, "count": typo.count} for typo in prepared.decided.typos],
        "findings": {what: {"count": n, "lines": tally.lines[what]} for what, n in tally.findings.most_common()},
        "cut_length": {"characters": cut[0], "answers": cut[1]} if cut else None,
        "contradictions": {
            "questions": len(disagreeing),
            "lines": [[index.line[row] for row in rows[:_MOST]] for rows in disagreeing[:_MOST]],
        },
        "near_duplicates": {
            "rows": len(prepared.near),
            "across_sets": len(across),
            "most": [_pair(prepared, pair) for pair in (across or prepared.near)[:_MOST]],
        },
        "shortfalls": _shortfalls(tally) if data.task == "classify" else [],
        "settings": {**recipes.as_dict(data.clean), "valid_share": data.valid_share, "sealed_share": data.sealed_share},
    }


def index_set(prepared: Prepared, row: int) -> str:
    """The set of a row; of one that was left out the set of its file."""
    home = prepared.assigned.home[row]
    return prepared.index.names[home if home >= 0 else prepared.index.origin[row]]


def lines(found: Mapping[str, Any]) -> list[str]:
    """The card in a few lines for a terminal."""
    told = [f"rows: {found['rows_read']:,} read; " + ", ".join(f"{n:,} {name}" for name, n in found["rows"].items())]
    told += [f"left out: {n:,} {reason}" for reason, n in found["dropped"].items()]
    told += [f"changed: {step}, {entry['changes']:,} times in {entry['rows']:,} rows" for step, entry in found["changes"].items()]
    told += [f"found: {entry['count']:,} x {what}" for what, entry in found["findings"].items()]
    if undecided := [c for c in found["spellings"] if c["chosen"] is None]:
        shown = "; ".join(" / ".join(f"{s} {n}" for s, n in c["spellings"].items()) for c in undecided[:5])
        told.append(
            f"found: {len(undecided)} words with divided spelling, left as they are ({shown}{'; ...' if len(undecided) > 5 else ''})"
        )
    if found["typos"]:
        shown = ", ".join(f"{t['word']} ({t['suggestion']}?)" for t in found["typos"][:5])
        told.append(f"found: {len(found['typos'])} likely typos: {shown}{', ...' if len(found['typos']) > 5 else ''}")
    if found["contradictions"]["questions"]:
        told.append(f"found: {found['contradictions']['questions']:,} questions with different answers")
    if found["near_duplicates"]["rows"]:
        near = found["near_duplicates"]
        told.append(
            f"found: {near['rows']:,} rows nearly the same as another"
            + (f", {near['across_sets']:,} of them in another set" if near["across_sets"] else "")
        )
    if found["cut_length"]:
        told.append(
            f"found: {found['cut_length']['answers']} answers of exactly {found['cut_length']['characters']} characters: cut at a limit?"
        )
    told += [f"note: {shortfall}" for shortfall in found["shortfalls"]]
    return told


def markdown(found: Mapping[str, Any], title: str) -> str:
    """The card as a page."""
    parts = [f"# {title}", "", f"Prepared by edgelora {found['edgelora']}. Licence of the data: {found['licence'] or 'not stated'}.", ""]
    parts += ["## Sources", ""]
    for source in found["sources"]:
        details = ", ".join(str(v) for v in (source["format"], source["encoding"], source["layout"]) if v)
        parts.append(f"- {source['set']}: `{source['file']}` ({source['bytes']:,} bytes; {details}), SHA-256 `{source['sha256']}`")
    parts += ["", "## Rows", "", "| set | rows | serves to |", "| --- | --- | --- |"]
    parts += [f"| {name} | {n:,} | {SERVES.get(name, 'report')} |" for name, n in found["rows"].items()]
    parts += [
        "",
        f"{found['rows_read']:,} records were read. The set of a row is a hash of its raw text (normalization {found['normalization']}).",
    ]
    parts += [f"- left out: {n:,} × {reason}" for reason, n in found["dropped"].items()]
    parts += [f"- {shortfall}" for shortfall in found["shortfalls"]]
    if found["changes"]:
        parts += ["", "## What was changed", "", "| step | changes | rows | most often |", "| --- | --- | --- | --- |"]
        for step, entry in found["changes"].items():
            most = ", ".join(f"`{_cell(b)}` → `{_cell(a)}` ({n})" for b, a, n in entry["most"][:4])
            parts.append(f"| {step} | {entry['changes']:,} | {entry['rows']:,} | {most} |")
        parts += ["", "Every change with its line is in `changes.jsonl`."]
    if found["spellings"]:
        parts += ["", "## Spellings", "", "| kind | found | written |", "| --- | --- | --- |"]
        parts += [
            f"| {c['kind']} | {', '.join(f'{s} {n}' for s, n in c['spellings'].items())} | {c['chosen'] or 'as it was: no clear majority'} |"
            for c in found["spellings"]
        ]
    told = [line for line in lines(found) if line.startswith("found:")]
    if told:
        parts += [
            "",
            "## What was found and left as it is",
            "",
            *(f"- {line.removeprefix('found: ')}" for line in told),
            "",
            "With lines in `findings.jsonl`.",
        ]
    return "\n".join(parts) + "\n"


SERVES = {"train": "train", "valid": "select"}


def _source(prepared: Prepared, name: str) -> dict[str, Any]:
    source = prepared.sources[name]
    return {
        "set": name,
        "file": source.path.name,
        "bytes": source.path.stat().st_size,
        "sha256": artifact.sha256(source.path),
        "format": source.format,
        "layout": source.layout,
        "encoding": source.encoding,
        "columns": dict(source.mapping),
    }


def _shortfalls(tally: Tally) -> list[str]:
    """Labels of which a held-out set has no row. The hash gives every label its share only roughly."""
    told = []
    for name in ("valid", "sealed"):
        missing = [label for label in sorted(set().union(*tally.labels.values())) if not tally.labels[name][label]]
        if missing:
            told.append(
                f"{name} has no row of {len(missing)} labels: {', '.join(_short(m) for m in missing[:10])}{', ...' if len(missing) > 10 else ''}"
            )
    return told


def _pair(prepared: Prepared, pair: tuple[int, int, float]) -> dict[str, Any]:
    row, like, similarity = pair
    index = prepared.index
    return {
        "set": index_set(prepared, row),
        "line": index.line[row],
        "like_set": index_set(prepared, like),
        "like_line": index.line[like],
        "similarity": similarity,
    }


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _cell(text: str) -> str:
    """Text for a table's cell in backticks."""
    return text.replace("\n", "⏎").replace("|", "\\|").replace("`", "'").replace(" ", "␣") or "nothing"
