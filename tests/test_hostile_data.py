"""Files made to break the reader: one clear line with its place, in bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

MIB = 1 << 20
MOST_BYTES = 600 * MIB  # of the reading process; pyarrow takes most of it
MOST_SECONDS = 60
READ = """
import pathlib, sys
from edgelora.data.source import open_source
from edgelora.errors import EdgeloraError
from edgelora.recipe import Reading
try:
    print(sum(1 for _ in open_source(pathlib.Path(sys.argv[1]), Reading()).rows()))
except EdgeloraError as error:
    print(error.message)
# not ru_maxrss: it begins with what the process that started this one held
status = pathlib.Path("/proc/self/status").read_text()
print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024)
"""


def write(file: Path, pieces: Iterable[bytes]) -> None:
    with file.open("wb") as stream:
        stream.writelines(pieces)


def sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2 << 30)


def archive(file: Path, parts: dict[str, Iterable[bytes]]) -> None:
    """A workbook whose parts are replaced or added to."""
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["question", "answer"])
    whole = file.with_suffix(".whole")
    book.save(whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if name not in parts:
                new.writestr(name, old.read(name))
        for name, pieces in parts.items():
            with new.open(name, "w", force_zip64=True) as stream:
                for piece in pieces:
                    stream.write(piece)


def entities(file: Path) -> None:
    """Each entity is ten of the one before: 10^9 letters in a kilobyte."""
    bomb = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "aaaaaaaaaa"}">' for n in range(10))
    sheet = (
        f'<?xml version="1.0"?><!DOCTYPE x [{bomb}]><worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
        '<sheetData><row r="1"><c r="A1" t="inlineStr"><is><t>&e9;</t></is></c></row></sheetData></worksheet>'
    )
    archive(file, {"xl/worksheets/sheet1.xml": [sheet.encode()]})


def repeated(file: Path) -> None:
    """A text of 4 MiB that stands once in the file and 100,000 times in the column."""
    import pyarrow
    import pyarrow.parquet

    index = pyarrow.array([0] * 100_000, pyarrow.int32())
    text = pyarrow.DictionaryArray.from_arrays(index, pyarrow.array(["x" * (4 * MIB)]))
    plain = pyarrow.array(["a"] * 100_000)
    pyarrow.parquet.write_table(pyarrow.table({"question": text, "answer": plain}), file, store_schema=False)


def cut_short(file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"question": [str(n) * 50 for n in range(5000)], "answer": ["a"] * 5000}), file)
    raw = bytearray(file.read_bytes())
    raw[200 : len(raw) // 2] = bytes(len(raw) // 2 - 200)
    file.write_bytes(bytes(raw))


HEAD = b"question,answer\nq,a\n"
LONG = [b"x" * MIB] * 2048
JAPANESE = [f"質問 {n},回答\n".encode() for n in range(100_000)]
ENGLISH = [b"q,a\n"] * 100_000

CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "2 GB in one line": ("a.csv", lambda file: write(file, [HEAD, *LONG]), "a.csv line 3 is longer than 8 Mi characters"),
    "one line of JSONL": ("a.jsonl", lambda file: write(file, [b'{"question": "', *LONG[:64]]), "line 1 is longer than 8 Mi"),
    "one value of JSON": ("a.json", lambda file: write(file, [b'[\n{"question": "', *LONG[:64]]), "line 2: a row of more than 8 Mi"),
    "one line of text": ("a.txt", lambda file: write(file, [HEAD, *LONG[:64]]), "a.txt line 3 is longer than 8 Mi characters"),
    "2 GB of nothing": ("a.csv", sparse, "a.csv line 1: a NUL byte"),
    "a NUL byte": (
        "a.jsonl",
        lambda file: write(file, [b'{"q": "1", "a": "2"}\n', b'{"q": "\0", "a": "2"}\n']),
        "a.jsonl line 2: a NUL byte",
    ),
    "not UTF-8 in row 90,000": (
        "a.csv",
        lambda file: write(file, [HEAD, *JAPANESE[:89_998], b"\xe3\x81,x\n", *JAPANESE]),
        "a.csv line 90001: byte 0xe3 is not utf-8",
    ),
    "not UTF-8 in row 90,000 of plain ASCII": (
        "a.csv",
        lambda file: write(file, [HEAD, *ENGLISH[:89_998], b"\xe9,x\n", *ENGLISH]),
        "a.csv line 90001: byte 0xe9 is not utf-8",
    ),
    "one cell of quotes": ("a.csv", lambda file: write(file, [HEAD, b'"', *[b'""' * MIB] * 64]), "a.csv line 3 is longer than 8 Mi"),
    "a quote that never ends": (
        "a.csv",
        lambda file: write(file, [HEAD, b'"', *[b"x,y\n" * MIB] * 16]),
        "line 3: field larger than field limit",
    ),
    "a cell for every quote": (
        "a.csv",
        lambda file: write(file, [HEAD, b'"', *[b'"\n' * MIB] * 16]),
        "more than 100,000 records make no row",
    ),
    "commas alone": ("a.csv", lambda file: write(file, [HEAD, *[b"," * MIB] * 64]), "a.csv line 3 is longer than 8 Mi characters"),
    "10,000 lists in each other": (
        "a.jsonl",
        lambda file: write(file, [b'{"q": "1", "a": "2"}\n', b'{"q": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n"]),
        "a.jsonl line 2: nested too deeply",
    ),
    "10,000 objects in each other": ("a.json", lambda file: write(file, [b'[{"a":' * 10_000]), "a.json line 1: nested too deeply"),
    "numbers for rows": ("a.json", lambda file: write(file, [b"[", *[b"1," * MIB] * 16]), "a.json row 1: expected an object, found int"),
    "a bomb of zeros in a workbook": (
        "a.xlsx",
        lambda file: archive(file, {"xl/sharedStrings.xml": [bytes(MIB)] * 256}),
        "a.xlsx: xl/sharedStrings.xml unpacks to more than",
    ),
    "a bomb of entities in a workbook": ("a.xlsx", entities, "a.xlsx is not a readable Excel file"),
    "a zip that is no workbook": ("a.xlsx", lambda file: zipfile.ZipFile(file, "w").close(), "a.xlsx is a zip file but no Excel workbook"),
    "a text repeated in Parquet": ("a.parquet", repeated, "its texts are 1000 times as large as the file"),
    "Parquet with a hole": ("a.parquet", cut_short, "a.parquet row 1: "),
    "Parquet in name only": ("a.parquet", lambda file: write(file, [b"PAR1", bytes(MIB), b"PAR1"]), "is not a readable Parquet file"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_in_bounded_memory(tmp_path: Path, case: str) -> None:
    name, make, message = CASES[case]
    make(tmp_path / name)
    try:
        done = subprocess.run(
            [sys.executable, "-c", READ, tmp_path / name], capture_output=True, text=True, timeout=MOST_SECONDS, check=False
        )
    finally:
        (tmp_path / name).unlink()  # some are 2 GB
    assert done.stderr == ""
    said, peak = done.stdout.splitlines()
    assert message in said
    assert int(peak) < MOST_BYTES


def test_formulas_in_cells_stay_text(tmp_path: Path) -> None:
    from edgelora.data.read import read

    cells = ['=cmd|"/C calc"!A0', "+1+cmd", "@SUM(1)", "-2"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"question": cell, "answer": cell}) + "\n" for cell in cells))
    assert [row.answer for row in read(file).rows] == cells
