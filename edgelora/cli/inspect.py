"""The command that looks into data files: data inspect."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.output import PATH, Output, calm_libraries, command
from edgelora.cli.reading import reading
from edgelora.data.oddities import LINE_ENDS

if TYPE_CHECKING:
    from edgelora.recipe import Reading

_WIDE = 96  # columns of text in a line of lists
_MOST = 700  # characters of an example's run that a terminal shows; --json gives all
_LANGUAGES = 0.01  # share below which a language is more likely a mistake of the detector
_BYTES = 1000


@click.command()
@click.argument("file", type=PATH)
@click.option("--against", type=PATH, help="A file whose rows must not stand in this one, for instance the test set: finds leaks.")
@click.option("--base", help="Base model whose tokens are counted; default the embedded one where it is installed.")
@click.option("--near/--no-near", default=True, show_default=True, help="Look for questions that are nearly the same.")
@reading()
@command
def inspect(echo: Output, file: Path, against: Path | None, base: str | None, near: bool, reading: Reading) -> None:
    """Look at a data file: format, rows, lengths, languages, labels, repeats, leaks, oddities, and what a model sees of it.

    Nothing is written. Trained tokens of the examples are highlighted; without a terminal they stand between ⟦ and ⟧.

    \b
    Example:  edgelora data inspect faq.csv --against test.csv
    """
    from edgelora.data.inspect import inspect as look
    from edgelora.data.source import open_source

    open_source(file, reading, lenient=True)  # a file that cannot be read ends here, before a tokenizer is loaded
    calm_libraries()
    with echo.progress() as progress:
        name, tokenizer = _tokenizer(base)
        found = look(
            file,
            reading,
            against=against,
            tokenizer=tokenizer,
            base=name,
            near=near,
            progress=lambda share, text: progress("inspect", share, text),
        )
    echo.result(found, *describe(found, colour=sys.stdout.isatty()))


def _tokenizer(base: str | None) -> tuple[str | None, Any]:
    """A base's name and its tokenizer; of the default one nothing where it is not installed."""
    from importlib.util import find_spec

    from edgelora import models
    from edgelora.suggest import EMBEDDED

    if base is None:
        package = EMBEDDED.removeprefix("package:").partition("/")[0]
        if find_spec("transformers") is None or find_spec(package) is None:
            return None, None
    reference = base or EMBEDDED
    return models.shown(reference).split("/")[-1], models.tokenizer_of(reference, Path())


def describe(found: dict[str, Any], *, colour: bool) -> list[str]:
    """The document as lines for a terminal."""
    lines = [f"{found['file']}  {_size(found['size_bytes'])}", *_form(found)]
    unit = found["counts"]
    if found["layout"] is None:
        lines.append(_row("records", f"{found['records']:,}"))
        lines += _left_out(found["left_out"], unit)
        lines += _repeats(found["repeats"], unit)
        lines += _odd(found)
        return [*lines, "", f"no rows to train on: {found['why'].partition(': ')[2]}; name columns with --question and --answer"]
    lines.append(_row("rows", f"{found['rows']:,}" + (f" in {found['groups']:,} groups" if found.get("groups") else "")))
    lines += _left_out(found["left_out"], unit)
    if not found["rows"]:
        return [*lines, "", "no rows to train on: name other columns with --question and --answer"]
    lines += _lengths(found)
    lines += _labels(found["labels"])
    lines += _repeats(found["repeats"], unit, labels=bool(found["labels"]))
    if found.get("near", {}).get("rows"):
        near = found["near"]
        lines.append(
            _row("near", f"{_count(near['rows'], 'question')} nearly the same as another  ({_pairs(near['lines'], unit, near['rows'])})")
        )
    if "against" in found:
        lines += _against(found, unit)
    lines += _odd(found)
    if "tokens" not in found:
        return [*lines, "", "tokens and examples need a base model: name one with --base"]
    lines += _tokens(found["tokens"], unit)
    return lines + (_examples(found["examples"], unit, colour=colour) if found["examples"] else [])


def _form(found: dict[str, Any]) -> list[str]:
    encoding = {"utf-8-sig": "UTF-8 with a byte order mark", "utf-8": "UTF-8", "cp932": "cp932 (Shift_JIS)"}.get(
        found["encoding"], found["encoding"]
    )
    delimiter = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}.get(found["delimiter"], repr(found["delimiter"]))
    header = {None: None, 0: "no header"}.get(found["header"], f"header in {found['counts']} {found['header']}")
    parts = [
        found["format"],
        encoding,
        f"delimiter {delimiter}" if found["delimiter"] else None,
        f"sheet {found['sheet']!r}" if found["sheet"] else None,
        header if found["header"] != 1 else None,
        f"{len(found['skipped'])} lines of notes before it" if found["skipped"] else None,
    ]
    lines = [_row("format", ", ".join(part for part in parts if part)), *_wrapped("columns", found["columns"])]
    if found["layout"]:
        meant = [f"{what} = {column}" for what, column in found["mapping"].items()]
        lines.append(_row("layout", f"{found['layout']}: " + ", ".join(meant if len(meant) <= 5 else [*meant[:3], "...", meant[-1]])))
    return lines


def _left_out(left: dict[str, Any], unit: str) -> list[str]:
    return [_row("left out", f"{one['rows']:,}: {reason}  ({_places(one['lines'], unit, one['rows'])})") for reason, one in left.items()]


def _lengths(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for what, one in found["characters"].items():
        label = "text" if found["layout"] == "text" else what
        if found["layout"] != "text" or what == "answer":
            what_they_are = "  (shortest / median / 95 % / longest)" if not lines else ""
            lines.append(_row(label, f"{_spread(one)} characters{what_they_are}"))
    turns = found["turns"]
    if set(turns) - {1, 2}:
        lines.append(_row("turns", ", ".join(f"{count:,} rows of {number}" for number, count in turns.items())))
    if found["languages"] is None:
        lines.append(_row("languages", 'unknown; pip install -c constraints.txt -e ".[data]"'))
    elif found["languages"]["texts"]:
        shares = {name: share for name, share in found["languages"]["shares"].items() if share >= _LANGUAGES}
        lines.append(_row("languages", ", ".join(f"{name} {share:.0%}" for name, share in shares.items())))
    return lines


def _labels(labels: dict[str, int] | None) -> list[str]:
    if not labels:
        return []
    named = [f"{label} {count:,}" for label, count in labels.items()]
    shown = named if len(named) <= 8 else [*named[:4], "...", *named[-2:]]
    return _wrapped("labels", [f"{len(labels)}: {shown[0]}", *shown[1:]])


def _repeats(repeats: dict[str, Any], unit: str, labels: bool = False) -> list[str]:
    says = {
        "same": "repeat an earlier row word for word",
        "alike": "repeat one but for case and spaces",
        "question": "repeat an earlier question",
        "answer": "repeat an earlier answer",
    }
    lines: list[str] = []
    for kind, text in says.items():
        one = repeats.get(kind)
        if not one or not one["rows"] or (kind == "alike" and one["rows"] == repeats["same"]["rows"]) or (kind == "answer" and labels):
            continue
        if kind == "question" and (against := repeats["contradicted_questions"]):
            text += f", {_count(against, 'question')} with different answers"
        lines.append(_row("" if lines else "repeats", f"{_count(one['rows'], 'row')} {text}  ({_pairs(one['lines'], unit, one['rows'])})"))
    return lines


def _against(found: dict[str, Any], unit: str) -> list[str]:
    one = found["against"]
    lines = [_row("against", f"{one['file']}, {_count(one['rows'], 'row')}")]
    widest = one["letters"]
    if widest["rows"]:
        lines.append(
            _row(
                "LEAK",
                f"{widest['rows']:,} of its questions stand in this file: {one['same']['rows']:,} but for case and spaces, "
                f"{one['unpunctuated']['rows']:,} but for punctuation too  ({_pairs(widest['lines'], unit, widest['rows'])})",
            )
        )
    else:
        lines.append(_row("", "none of its questions stands in this file"))
    near = found.get("near_against")
    if near and near["rows"]:
        lines.append(_row("near leak", f"{near['rows']:,} more are nearly the same  ({_pairs(near['lines'], unit, near['rows'])})"))
    return lines


def _odd(found: dict[str, Any]) -> list[str]:
    """Line ends are odd in the cells of a table alone."""
    lines: list[str] = []
    unit = found["counts"]
    for name, one in found["odd"].items():
        if name == LINE_ENDS and found["format"] not in ("csv", "tsv", "xlsx"):
            continue
        texts = f"{one['count']:,} in {_count(one['texts'], 'text')}" if one["count"] != one["texts"] else _count(one["texts"], "text")
        lines.append(_row("odd" if not lines else "", f"{name}: {texts}  ({_places(one['lines'], unit, one['texts'])})"))
    return lines


def _tokens(tokens: dict[str, Any], unit: str) -> list[str]:
    lines: list[str] = []
    if tokens["row"]:
        over = [f"{count:,} over {limit}" for limit, count in tokens["over"].items() if count]
        counted = f", counted on {tokens['rows']:,} rows spread over the file" if tokens["sampled"] else ""
        lines.append(_row("tokens", f"{_spread(tokens['row'])} of {tokens['base']}" + (f"; {', '.join(over)}" if over else "") + counted))
    for reason, one in tokens["refused"].items():
        lines.append(_row("refused", f"{one['rows']:,}: {reason}  ({_places(one['lines'], unit, one['rows'])})"))
    return lines


def _examples(examples: list[dict[str, Any]], unit: str, *, colour: bool) -> list[str]:
    lines = ["", "what the model sees, trained tokens " + (click.style("like this", fg="green", bold=True) if colour else "⟦like this⟧")]
    for example in examples:
        lines += ["", click.style(f"--- {unit} {example['line']}", dim=True) if colour else f"--- {unit} {example['line']}"]
        text = ""
        for piece, trained in example["pieces"]:
            short = _visible(piece)
            text += (click.style(short, fg="green", bold=True) if colour else f"⟦{short}⟧") if trained else short
        lines.append(text)
    return lines


def _visible(text: str) -> str:
    """Without what would move a terminal's cursor, and without the middle of a long text."""
    text = "".join(c if c == "\n" or c.isprintable() or c == "\u3000" else f"\\x{ord(c):02x}" for c in text)
    if len(text) <= _MOST:
        return text
    return f"{text[: _MOST // 2]}[... {len(text) - _MOST:,} characters ...]{text[-_MOST // 2 :]}"


def _row(label: str, text: str) -> str:
    return f"  {label:<10}{_visible(text)}"


def _wrapped(label: str, items: list[str]) -> list[str]:
    """A list over several lines."""
    rows = [""]
    for number, item in enumerate(items):
        piece = item + (", " if number < len(items) - 1 else "")
        if rows[-1] and len(rows[-1]) + len(piece) > _WIDE:
            rows.append("")
        rows[-1] += piece
    return [_row(label if not number else "", row.rstrip()) for number, row in enumerate(rows)]


def _places(lines: list[int], unit: str, count: int) -> str:
    shown = ", ".join(map(str, lines[:5]))
    return f"{unit} {shown}" + (", ..." if count > len(lines[:5]) else "")


def _pairs(pairs: list[list[int]], unit: str, count: int) -> str:
    shown = ", ".join(f"{pair[0]} like {pair[1]}" for pair in pairs[:3])
    return f"{unit} {shown}" + (", ..." if count > len(pairs[:3]) else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _spread(one: dict[str, Any]) -> str:
    return " / ".join(f"{one[name]:,}" for name in ("least", "median", "p95", "most"))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / _BYTES:.1f} kB"
