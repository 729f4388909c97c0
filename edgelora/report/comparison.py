"""Several reports -> one comparison. Rows are joined by file type (gguf q4_k_m with gguf q4_k_m); a speed only where runtime,
threads and prompt length agree too. Where the runs ship different files, or run them differently, these are compared as well.
Every later run is set against the first, and `differences` says what of it is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from edgelora.errors import UsageError
from edgelora.report import differences
from edgelora.report import figures as f
from edgelora.report.differences import Cell
from edgelora.report.schema import SCHEMA, is_comparison
from edgelora.report.tables import Column, Row, Table, rows, section, tabulate, text

_SHOW = {
    "bytes": f.size,
    "nats": lambda v: f.loss(v) if f.known(v) and abs(v) >= 1 else f.number(v),
    "share": f.percent,
    "tok/s": lambda v: f.number(v) and f"{f.number(v)} tok/s",
    "ms": f.ms,
}
SIZE, KL = "size", "KL to the trained model"
SHIPPED = "the file that ships"
_Key = tuple[str, str, str, str]  # format, type, what, unit


def compare(docs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A comparison document of two or more reports, which `to_markdown`, `to_html`, `to_json` and `write` take as well.

    Each row holds one measure of one file type: ``values``, ``low``, ``high`` and ``n`` have one entry a run, null where
    a run has no such figure. UsageError for fewer than two reports.
    """
    if len(docs) < 2:
        raise UsageError(f"a comparison needs two or more reports, found {len(docs)}", "name several report.json files or run folders")
    if any(map(is_comparison, docs)):
        raise UsageError("a comparison cannot be compared again", "name the reports that it was made from")
    ways = [_shipping(doc) for doc in docs]
    shipped = len(set(ways)) > 1
    measures = [list(_measures(doc, shipped)) for doc in docs]
    found: list[dict[_Key, Cell]] = [dict(reversed(cells)) for cells in measures]  # of two equal keys the first counts
    keys = list(dict.fromkeys(key for cells in measures for key, _ in cells))
    order = {kind: i for i, kind in enumerate(dict.fromkeys(key[:2] for key in keys))}
    classes = [section(doc, "machine").get("class") for doc in docs]
    joined = []
    for key in sorted(keys, key=lambda key: order[key[:2]]):  # a stable sort: measures keep their order
        cells = [doc.get(key) for doc in found]
        row: dict[str, Any] = dict(zip(("format", "type", "what", "unit"), key, strict=True))
        row |= {name: [getattr(cell, attribute, None) for cell in cells] for name, attribute in _COLUMNS}
        row["verdicts"] = [
            # what ships is judged where it differs; elsewhere the file's own rows say the same
            differences.verdict(key[3], cells[0], cell, (_class(cells[0], classes[0]), _class(cell, classes[i])))
            if i and (key[1] != SHIPPED or ways[i] != ways[0])
            else None
            for i, cell in enumerate(cells)
        ]
        joined.append(row)
    labels = _labels(docs)
    runs = [
        {"label": label, **{key: doc.get(key) for key in ("name", "created", "edgelora", "commit", "machine")}}
        for label, doc in zip(labels, docs, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "kind": "comparison",
        "name": " / ".join(labels),
        "runs": runs,
        "rows": joined,
        "notes": list(_warnings(docs, joined)),
    }


def over_commits(versions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A comparison of the versions of one baseline, oldest first: `over` says that the runs are a series in time."""
    doc = compare([*versions, *versions] if len(versions) == 1 else versions)
    doc["runs"] = [{**run, "label": version["commit"]} for run, version in zip(doc["runs"], versions, strict=False)]
    for row in doc["rows"]:
        row.pop("verdicts")  # a series in time is no comparison with its first entry
        row.update({name: row[name][: len(versions)] for name, _ in _COLUMNS})
    return {**doc, "name": str(versions[-1].get("name") or "baseline"), "over": "commits"}


def _class(cell: Cell | None, own: Any) -> Any:
    """The class of machines that a figure was measured on: that of the row's device, else its report's own."""
    return (cell.row or {}).get("device_class") or own if cell else own


_COLUMNS = (("values", "value"), ("low", "low"), ("high", "high"), ("n", "n"))  # of a joined row, and the cell's attribute


def findings(doc: Row) -> dict[str, list[str]]:
    """What really differs, what is noise and what cannot be told: sentences, by these words."""
    said: dict[str, list[str]] = {word: [] for word in (differences.REAL, differences.NOISE, differences.UNKNOWN)}
    for word, sentence in differences.findings(rows(doc, "runs"), rows(doc, "rows"), kind_of, _shown):
        said.setdefault(word, []).append(sentence)
    return said


def _shown(unit: str, value: Any) -> str:
    return str(_SHOW.get(unit, f.number)(value))


def title(doc: Row) -> str:
    if doc.get("over") == "commits":
        return f"{doc.get('name') or ''} over {len(rows(doc, 'runs'))} commits"
    return f"Comparison of {len(rows(doc, 'runs'))} runs: {doc.get('name') or ''}"


def tables_of(doc: Row) -> list[tuple[str, Table]]:
    """The runs, then one table a file type: a measure a row, a run a column."""
    runs = rows(doc, "runs")
    listed = tabulate(
        runs,
        [
            Column("Run", text("label"), numeric=False),
            Column("Date", text("created"), numeric=False),
            Column("edgelora", text("edgelora"), numeric=False),
            Column("Commit", text("commit"), numeric=False),
            Column("Machine", lambda run: section(run, "machine").get("class") or "", numeric=False),
        ],
    )
    columns = [Column("Measure", text("what"), numeric=False)]
    columns += [Column(run.get("label") or f"run {i + 1}", partial(_cell, i)) for i, run in enumerate(runs)]
    kinds: dict[str, list[Row]] = {}
    for row in rows(doc, "rows"):
        kinds.setdefault(kind_of(row), []).append(row)
    return [("Runs", listed)] + [(_title(kind), tabulate(joined, columns)) for kind, joined in kinds.items()]


def _title(kind: str) -> str:
    return kind.capitalize() if kind == SHIPPED else kind


def kind_of(row: Row) -> str:
    return " ".join(filter(None, (row.get("format"), row.get("type"))))


def entry(row: Row, key: str, i: int) -> Any:
    """The i-th run's entry of a list that may be missing or short."""
    values = row.get(key) or ()
    return values[i] if i < len(values) else None


def _cell(i: int, row: Row) -> str:
    """'98.4 MB (-6.7 %)': the figure, its interval, and how far it is from the first run's."""
    show = _SHOW.get(row.get("unit") or "", f.number)
    value, first = entry(row, "values", i), entry(row, "values", 0)
    shown = f.within(value, entry(row, "low", i), entry(row, "high", i), show)
    if not i or not shown or not f.known(first):
        return shown
    verdict = (entry(row, "verdicts", i) or {}).get("word")
    word = f", {verdict}" if verdict and row.get("what") != SIZE else ""
    if row.get("unit") == "share":  # a change of a share in percent would read like the share itself
        return f"{shown} ({f.change(value - first).removesuffix(' %')} points{word})"
    return f"{shown} ({f.change((value - first) / abs(first))}{word})" if abs(first) > 1e-12 else shown


def _measures(doc: Row, shipped: bool) -> Iterator[tuple[_Key, Cell]]:
    """Every figure of a report that can be joined with another report's; with `shipped` those of its first file once more."""
    files = rows(doc, "files")
    if shipped and files:
        yield from _of_file(doc, files[0], ("", SHIPPED), lambda row: bench_words({"prompt_tokens": row.get("prompt_tokens")}))
    for file in files:
        yield from _of_file(doc, file, (file.get("format") or "", file.get("type") or file.get("file") or ""), bench_words)


def _of_file(doc: Row, file: Row, kind: tuple[str, str], words: Callable[[Row], str]) -> Iterator[tuple[_Key, Cell]]:
    yield from _measure(kind, SIZE, "bytes", file.get("size_bytes"))
    yield from _measure(kind, KL, "nats", file.get("kl"), file.get("kl_low"), file.get("kl_high"), file.get("tokens"))
    yield from _measure(kind, "same top token", "share", file.get("top1"), n=file.get("tokens"))
    for row in _rows_of(doc, "losses", file):
        after, n = section(row, "after"), row.get("tokens")
        what = f"loss on {row.get('set') or 'held-out rows'}"
        yield from _measure(kind, what, "nats", after.get("loss"), after.get("low"), after.get("high"), n)
    for row in _rows_of(doc, "accuracy", file):
        what = f"accuracy on {row.get('set') or 'held-out rows'}"
        yield from _measure(kind, what, "share", row.get("after"), row.get("low"), row.get("high"), row.get("rows"))
    for row in _rows_of(doc, "bench", file):
        with_ = words(row)
        yield from _measure(kind, f"decode ({with_})", "tok/s", row.get("decode_tok_per_s"), row=row, samples="decode")
        yield from _measure(kind, f"first token ({with_})", "ms", row.get("ttft_ms"), row=row, samples="ttft")
        yield from _measure(kind, f"peak memory ({with_})", "bytes", row.get("peak_rss_bytes"), row=row)


def _rows_of(doc: Row, name: str, file: Row) -> list[Row]:
    return [row for row in rows(doc, name) if row.get("file") == file.get("file")]


def _shipping(doc: Row) -> tuple[Any, ...]:
    """What a report's first file is and how it was run."""
    file = next(iter(rows(doc, "files")), {})
    ways = {(row.get("device"), row.get("runtime"), row.get("threads")) for row in _rows_of(doc, "bench", file)}
    return file.get("format"), file.get("type") or file.get("file"), frozenset(ways)


def bench_words(row: Row) -> str:
    """'llama.cpp, 1 thread, 128-token prompt', with the device where it was another one."""
    threads, prompt = row.get("threads"), row.get("prompt_tokens")
    parts = [
        row.get("device") or row.get("device_class"),
        row.get("runtime"),
        f.known(threads) and f"{threads} thread{'' if threads == 1 else 's'}",
        f.known(prompt) and f"{prompt}-token prompt",
    ]
    return ", ".join(part for part in parts if part)


def _measure(kind: tuple[str, str], what: str, unit: str, value: Any, *interval: Any, **more: Any) -> Iterator[tuple[_Key, Cell]]:
    """The key and the cell (value, low, high, n, ...) of a figure that was measured; nothing of another."""
    if f.known(value):
        yield (*kind, what, unit), Cell(value, *interval, **more)


def _labels(docs: Sequence[Row]) -> list[str]:
    """The shortest names that tell the runs apart."""
    names = [str(doc.get("name") or "run") for doc in docs]
    for key in ("", "commit", "created"):
        labels = [f"{name} {doc.get(key) or ''}".strip() for name, doc in zip(names, docs, strict=True)]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{i}: {name}" for i, name in enumerate(names, 1)]


def _warnings(docs: Sequence[Row], joined: Sequence[Row]) -> Iterator[str]:
    machines = list(dict.fromkeys(section(doc, "machine").get("class") or "unknown" for doc in docs))
    if len(machines) > 1:
        yield f"The runs come from different machines ({', '.join(machines)}): their speeds and memory do not compare."
    if any(row["type"] == SHIPPED for row in joined):
        for label, doc in zip(_labels(docs), docs, strict=True):
            yield f"{label} ships {_ship_words(doc)}."
    for row in joined:
        if row["type"] == SHIPPED or any(said and said["word"] == differences.UNKNOWN for said in row["verdicts"]):
            continue  # that is said where it belongs
        counts = list(dict.fromkeys(n for n in row["n"] if f.known(n)))
        if len(counts) > 1:
            sizes = ", ".join(map(f.count, counts))
            yield f"{kind_of(row)}, {row['what']}: the runs measured different samples (n = {sizes}), so they do not compare row by row."


def _ship_words(doc: Row) -> str:
    """'q4.gguf (llama.cpp, 2 threads)'."""
    file = next(iter(rows(doc, "files")), {})
    ways = dict.fromkeys(bench_words({**row, "prompt_tokens": None}) for row in _rows_of(doc, "bench", file))
    return f.aside(file.get("file") or "no file", "; ".join(way for way in ways if way))
