"""A prepared data set as a folder: train, valid and sealed rows as JSONL, the data card, and every change, finding and dropped row."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import IO, Any

from edgelora import artifact
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data import assign, card
from edgelora.data.card import Tally
from edgelora.data.clean import Messages, personal
from edgelora.data.prepare import Finished, Prepared, Spool, prepare, without_mending
from edgelora.data.row import Row
from edgelora.errors import DataError
from edgelora.progress import Progress

KIND = "data"
_SPOOL = ".spool"
_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode  # json.dumps makes an encoder at every call


def write(
    data: recipes.Data, folder: Path, out: Path, *, licence: str | None, processes: int, lenient: bool, progress: Progress
) -> Artifact:
    """Prepare the files that `data` names (relative to `folder`) into the new folder `out`; its facts are the data card.

    Killed at any point it leaves nothing under `out`. The same command on the same files finds the folder finished.
    """
    files = {"train": data.train, "valid": data.valid, "sealed": data.sealed, **data.held_out}
    named = {name: folder / file for name, file in files.items() if file is not None}
    for file in named.values():
        if not file.is_file():
            raise DataError(f"data file not found: {file}", "check the path")
    out.parent.mkdir(parents=True, exist_ok=True)
    return artifact.build_as(
        out,
        KIND,
        lambda work: _write(data, folder, work, out.name, licence, processes, lenient, progress),
        made_from={f"{name} {file.name}": artifact.sha256(file) for name, file in named.items()},
        recipe={**_settings(data), "licence": licence, "lenient": lenient},
        versions=artifact.versions_of("ftfy", "rensa", "symspellpy"),
        rows={name: card.SERVES.get(name, "report") for name in ("train", "valid", "sealed", *data.held_out)},
    )


def look(data: recipes.Data, folder: Path, *, licence: str | None, processes: int, lenient: bool, progress: Progress) -> dict[str, Any]:
    """The card of what `write` would do."""
    import tempfile

    with tempfile.TemporaryFile() as stream:
        prepared = prepare(data, folder, spool=Spool(stream), processes=processes, lenient=lenient, progress=progress)
        tally = Tally()
        for finished in prepared.finished(processes):
            tally.add(finished, data.task == "classify")
        return card.card(prepared, tally, licence)


def opened(data: recipes.Data, folder: Path) -> tuple[recipes.Data, list[str]]:
    """`data` with a prepared folder that it trains on taken apart into its files, which are used as they are; and notes."""
    path = folder / data.train
    if not path.is_dir():
        return data, []
    made = artifact.load(path)
    if made.kind != KIND:
        raise DataError(
            f"{data.train} is no data set: edgelora made it as {made.kind}", "name a file, or a folder that `edgelora data prepare` wrote"
        )

    def file(name: str) -> str | None:
        return str(Path(data.train) / f"{name}.jsonl") if f"{name}.jsonl" in made.files else None

    settled = dataclasses.replace(without_mending(data.clean), duplicates="none", near="none")
    plain = recipes.Data(
        train=file("train") or "",
        valid=data.valid or file("valid"),
        sealed=data.sealed or file("sealed"),
        held_out={**{name: str(Path(data.train) / f"{name}.jsonl") for name in made.recipe["held_out"]}, **data.held_out},
        task=made.recipe["task"],
        system=data.system,
        format="jsonl",
        layout="messages",
        encoding="utf-8",
        group="group",
        valid_share=data.valid_share,
        sealed_share=0.0,
        clean=settled,
    )
    changed = [name for name, digest in made.files.items() if name.endswith(".jsonl") and artifact.sha256(path / name) != digest]
    notes = [f"{path.name} was prepared before; its rows are used as they are."]
    return plain, notes + [f"{path.name}/{name} was changed after it was prepared." for name in changed]


def _settings(data: recipes.Data) -> dict[str, Any]:
    values = recipes.as_dict(data)
    return {name: value for name, value in values.items() if name not in ("train", "valid", "sealed")} | {"held_out": list(data.held_out)}


def _write(
    data: recipes.Data, folder: Path, work: Path, name: str, licence: str | None, processes: int, lenient: bool, progress: Progress
) -> dict[str, Any]:
    tally = Tally()
    with contextlib.ExitStack() as stack:

        def out(file: str) -> IO[str]:
            return stack.enter_context((work / file).open("w", encoding="utf-8", errors="surrogatepass", newline="\n"))

        spool = stack.enter_context((work / _SPOOL).open("w+b"))
        prepared = prepare(
            data, folder, spool=Spool(spool), processes=processes, lenient=lenient, progress=lambda share, text: progress(0.6 * share, text)
        )
        sets = {name: out(f"{name}.jsonl") for name, n in prepared.counts.items() if n}
        raw = {name: out(f"{name}-raw.jsonl") for name in sets if name not in ("train", "valid")}
        changes, findings = out("changes.jsonl"), out("findings.jsonl")
        total = max(1, sum(prepared.counts.values()))
        for number, finished in enumerate(prepared.finished(processes)):
            tally.add(finished, data.task == "classify")
            _line(sets[finished.set], _record(finished.row, finished.row.messages))
            if finished.set in raw:
                _line(raw[finished.set], _record(finished.row, _safe(finished.raw, data)))
            _listed(finished, changes, findings)
            if number % 1000 == 0:
                progress(0.6 + 0.4 * number / total, f"{number:,} of {total:,} rows written")
        _found_across(prepared, findings)
        _dropped(prepared, out("dropped.jsonl"))
        found = card.card(prepared, tally, licence)
    (work / _SPOOL).unlink()
    (work / "card.json").write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    (work / "card.md").write_text(card.markdown(found, name), encoding="utf-8")
    return found


def _record(row: Row, messages: Any) -> dict[str, Any]:
    record: dict[str, Any] = {"messages": [{"role": role, "content": content} for role, content in messages]}
    if row.is_text:
        record = {"text": messages[0][1]}
    return {**record, "line": row.line, **({"group": row.group} if row.group else {"group": f"line {row.line}"})}


def _listed(finished: Finished, changes: IO[str], findings: IO[str]) -> None:
    where = {"set": finished.set, "line": finished.row.line}
    for change in finished.changes:
        shown = change._replace(before="") if change.step == "personal" else change  # what was removed is not kept beside
        _line(changes, {**where, **shown._asdict()})
    for finding in finished.findings:
        _line(findings, {**where, **finding._asdict()})


def _found_across(prepared: Prepared, findings: IO[str]) -> None:
    """What only the whole data set shows: contradictions, near-duplicates, typos."""
    index = prepared.index
    for rows in assign.contradictions(index, prepared.assigned):
        _line(
            findings,
            {
                "set": "train",
                "line": index.line[rows[0]],
                "what": "the same question, another answer",
                "lines": [index.line[row] for row in rows],
            },
        )
    for row, like, similarity in prepared.near:
        where = {"set": card.index_set(prepared, row), "line": index.line[row]}
        _line(
            findings,
            {
                **where,
                "what": f"nearly the same as a row of {card.index_set(prepared, like)}",
                "like": index.line[like],
                "similarity": similarity,
            },
        )
    for typo in prepared.decided.typos:
        _line(findings, {"what": "likely typo", "text": typo.word, "suggestion": typo.suggestion, "count": typo.count})


def _dropped(prepared: Prepared, stream: IO[str]) -> None:
    index = prepared.index
    for name, record in prepared.unread:
        _line(
            stream,
            {
                "file": prepared.sources[name].path.name,
                "line": record.line,
                "reason": record.reason,
                "record": _safe_record(record.record, prepared.data),
            },
        )
    for row, why in sorted(prepared.assigned.left.items()):
        kept, raw = prepared.entry(row)
        source = prepared.sources[index.names[index.origin[row]]]
        like = {"like": index.line[why.like]} if why.like is not None else {}
        _line(
            stream,
            {"file": source.path.name, "line": index.line[row], "reason": why.reason, **like, **_record(kept, _safe(raw, prepared.data))},
        )


def _line(stream: IO[str], value: Any) -> None:
    stream.write(_encode(value) + "\n")


def _safe(messages: Messages, data: recipes.Data) -> Messages:
    """Raw text, less personal data where it is to be removed."""
    return tuple((role, personal.remove(content, [])) for role, content in messages) if data.clean.personal == "remove" else messages


def _safe_record(record: Any, data: recipes.Data) -> Any:
    if data.clean.personal != "remove":
        return record
    return personal.remove(record if isinstance(record, str) else json.dumps(record, ensure_ascii=False, default=str), [])
