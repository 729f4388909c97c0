"""The document as Markdown that fits a pull-request comment: headline, files, losses, checks, and the rest folded away."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgelora.report import agreement, comparison, estimates, summary, tables, turns
from edgelora.report.markup import visible
from edgelora.report.schema import is_comparison

MAX_CHARACTERS = 60_000  # GitHub refuses a comment above 65,536
# An interval such as [0.1, 0.2] stays as it is, and so does the underscore inside a word.
_SPECIAL = re.compile(r"[\\`*~$|]|\[(?![\u2212\d., ]+\](?![(\[:]))|(?<!\w)_|_(?!\w)")
_PLAIN_CODE = re.compile(r"[^`|<>&@\n\\]+")


def to_markdown(doc: Mapping[str, Any]) -> str:
    """The report or comparison as GitHub-flavoured Markdown, at most 60,000 characters: whole blocks are left out from the end."""
    if is_comparison(doc):
        blocks = [f"### {escape(comparison.title(doc))}", *_notes(doc)]
        said = comparison.findings(doc)
        listed = {word: _list(found) for word, found in said.items()}
        blocks += ["#### What really differs", listed["real"]] if listed["real"] else []
        blocks += [_folded("What is noise", [listed["noise"]]), _folded("What cannot be told", [listed["cannot tell"]])]
        for name, table in comparison.tables_of(doc):
            blocks += [f"#### {escape(name)}", _table(table)]
        return _fitting(blocks)
    blocks = [f"### {escape(doc.get('name') or '')}", escape(summary.headline(doc)), _verdict(doc)]
    checks, (_, failed, unjudged) = _table(tables.checks(doc)), summary.tally(doc)
    blocks += [checks if failed or unjudged else ""]
    blocks += [_table(tables.files(doc)), _table(tables.losses(doc)), _table(tables.accuracy(doc)), _table(turns.table(doc))]
    blocks += [_folded("Checks", [checks]) if not (failed or unjudged) else ""]
    blocks += [_folded("Speed and memory", [_table(tables.bench(doc)), _list(tables.disturbances(doc)), _table(tables.devices(doc))])]
    blocks += [_folded("The same file in a browser", [_table(agreement.table(doc))])]
    blocks += [
        _folded(
            "Estimates for other devices (nothing here was measured)",
            [_table(estimates.table(doc)), _list(estimates.trust(doc))],
        )
    ]
    blocks += [_folded("Where the MB go", [_table(tables.anatomy(doc))])]
    blocks += [_folded("Merge", [_table(tables.merge(doc)), *map(escape, tables.merge_words(doc))])]
    train = [_pairs(tables.training(doc)), *_notes(tables.section(doc, "training"))]
    blocks += [_folded("Training", train)]
    versions = tables.section(doc, "versions")
    blocks += [
        _folded("Machine and versions", [_pairs(tables.machine(doc)), escape(", ".join(f"{k} {v}" for k, v in versions.items() if v))])
    ]
    blocks += [_folded("Commands to repeat this", [_commands(doc.get("commands") or ())])]
    return _fitting([*blocks, *_notes(doc)])


def escape(text: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line; an @ does not notify anyone."""
    line = " ".join(visible(text).split())
    line = re.sub(r"<(?=[\w/!?])", "&lt;", re.sub(r"&(?=[#\w])", "&amp;", line))
    line = _SPECIAL.sub(r"\\\g<0>", line)
    line = re.sub(r"^([-+=#>]|\d+[.)](?=\s|$))", r"\\\1", line)
    return line.replace("@", "@\u200b").replace("://", ":\u200b//")


def _code(text: str) -> str:
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) and visible(text) == text else escape(text)


def _verdict(doc: Mapping[str, Any]) -> str:
    words = summary.tally_words(doc)
    return f"**{words}.**" if words else ""


def _table(table: tables.Table) -> str:
    if not table:
        return ""
    code = {i for i, title in enumerate(table.titles) if title in ("File", "SHA-256")}
    lines = [_line(map(escape, table.titles)), _line("--:" if right else ":--" for right in table.numeric)]
    lines += [_line(_code(cell) if i in code and cell else escape(cell) for i, cell in enumerate(row)) for row in table.rows]
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {escape(name)}: {escape(value)}" for name, value in pairs)


def _notes(doc: Mapping[str, Any]) -> list[str]:
    return [_list([note for note in doc.get("notes") or () if note])]


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _commands(commands: Sequence[str]) -> str:
    lines = [" ".join(visible(command).split()) for command in commands if command]
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}sh", *lines, fence]) if lines else ""


def _folded(title: str, blocks: Sequence[str]) -> str:
    inside = "\n\n".join(block for block in blocks if block)
    return f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>" if inside else ""


def _fitting(blocks: Sequence[str]) -> str:
    left_out = "The rest did not fit into a comment: see report.html."
    kept: list[str] = []
    for block in filter(None, blocks):
        if sum(len(b) + 2 for b in kept) + len(block) > MAX_CHARACTERS - len(left_out) - 4:
            kept.append(left_out)
            break
        kept.append(block)
    return "\n\n".join(kept) + "\n"
