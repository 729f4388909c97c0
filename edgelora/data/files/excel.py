"""Excel workbooks (.xlsx). Formulas are never evaluated: a cell gives the value that Excel stored when the file was saved."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from edgelora.data.files import Opened
from edgelora.data.files.delimited import FIRST, header_of
from edgelora.data.row import Broken, Record
from edgelora.errors import DataError, ToolMissing
from edgelora.recipe import Reading

_MAX_BYTES = 1 << 30  # of a workbook's parts, unpacked
_MAX_RATIO = 200  # unpacked to packed; spreadsheets pack 5 to 30 fold
_SMALL = 1 << 24  # bytes; below this any ratio is harmless
_CHUNK = 1 << 20
_FORMULA = (b"<f>", b"<f ", b"<f/>")


def open_file(path: Path, reading: Reading) -> Opened:
    formulas = _inspect(path)
    sheet, first = _first_rows(path, reading.sheet)
    line, columns = header_of(path, first, reading)
    return Opened(
        columns=columns,
        records=lambda: _records(path, sheet, columns, line, formulas),
        skipped=tuple(number for number, cells in first if number < line and any(cells)),
        header=line,
        counts="row",
        sheet=sheet,
    )


def _inspect(path: Path) -> bool:
    """Whether the workbook holds formulas. DataError for what is no workbook, or unpacks to more than a workbook does."""
    try:
        with zipfile.ZipFile(path) as archive:
            if "xl/workbook.xml" not in archive.namelist():
                raise DataError(f"{path.name} is a zip file but no Excel workbook", "unpack it, or save the sheet as .xlsx or .csv")
            total, formulas = 0, False
            for part in archive.infolist():
                with archive.open(part) as stream:
                    size, found = _scan(path, cast(BinaryIO, stream), part, _MAX_BYTES - total)
                total += size
                formulas |= found and part.filename.startswith("xl/worksheets/")
            return formulas
    except FileNotFoundError:
        from edgelora.data.lines import not_found

        raise not_found(path) from None
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise DataError(f"{path.name} is not a readable Excel file: {error}", "save it again as .xlsx, without a password") from error


def _scan(path: Path, stream: BinaryIO, part: zipfile.ZipInfo, most: int) -> tuple[int, bool]:
    """Size of a part as it really unpacks, and whether it holds a formula."""
    size, tail, found = 0, b"", False
    while chunk := stream.read(_CHUNK):
        size += len(chunk)
        if size > most or (size > _SMALL and size > _MAX_RATIO * max(part.compress_size, 1)):
            raise DataError(
                f"{path.name}: {part.filename} unpacks to more than {size >> 20} MiB from {part.compress_size} bytes",
                "this is a zip bomb, or no table for training; save the sheet as .csv",
            )
        found = found or any(mark in tail + chunk for mark in _FORMULA)
        tail = chunk[-4:]
    return size, found


def _first_rows(path: Path, wanted: str | None) -> tuple[str, list[tuple[int, list[str]]]]:
    """The sheet's name (the first visible one that holds cells) and its first rows that hold any."""
    with _book(path, values=True) as book:
        sheets = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"]
        if wanted is not None:
            sheets = [sheet for sheet in book.worksheets if sheet.title == wanted]
            if not sheets:
                names = ", ".join(sheet.title for sheet in book.worksheets)
                raise DataError(f"{path.name} has no sheet {wanted!r}", f"its sheets: {names}; set data.sheet")
        for sheet in sheets:
            first = list(islice(((line, [_text(cell) for cell in cells]) for line, cells in _cells(path, sheet)), FIRST))
            if first:
                return str(sheet.title), first
    raise DataError(f"{path.name} holds no rows", "put one question and answer on each line below the header")


def _records(path: Path, name: str, columns: Sequence[str], header_line: int, formulas: bool) -> Iterator[tuple[int, Record]]:
    with contextlib.ExitStack() as stack:
        books = [stack.enter_context(_book(path, values=values)) for values in ((True, False) if formulas else (True,))]
        blank: list[int] = []  # told only when a row follows: sheets often end in thousands of formatted, empty ones
        for (line, cells), *written in zip(*(_cells(path, book[name], blank=True) for book in books), strict=False):
            if line <= header_line:
                continue
            formula = _open_formula(written[0][1], cells) if written else None
            if formula is not None:
                address = f"{_letters(formula)}{line}"
                yield line, Broken(line, f"cell {address} is a formula whose value was not saved", "", "open the file in Excel and save it")
            elif all(cell in (None, "") for cell in cells):
                blank.append(line)
            else:
                yield from ((number, dict.fromkeys(columns, "")) for number in blank)
                blank.clear()
                yield line, {column: _text(cell) for column, cell in zip(columns, cells, strict=False)}


def _cells(path: Path, sheet: Any, *, blank: bool = False) -> Iterator[tuple[int, Sequence[Any]]]:
    """Row number and values; rows without any are left out unless `blank`."""
    from xml.etree.ElementTree import ParseError

    sheet.reset_dimensions()  # some programs write a wrong size
    try:
        for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
            if blank or any(cell not in (None, "") for cell in cells):
                yield number, cells
    except (ParseError, ValueError, KeyError, TypeError, IndexError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name} is damaged: {' '.join(str(error).split())[:200]}", "save it again as .xlsx or .csv") from error


@contextlib.contextmanager
def _book(path: Path, *, values: bool) -> Iterator[Any]:
    """The opened workbook, with the stored values of its formulas or with the formulas themselves."""
    try:
        import openpyxl
    except ImportError as error:
        raise ToolMissing(
            "Excel files need the package openpyxl", 'pip install -c constraints.txt -e ".[data]", or save the sheet as .csv'
        ) from error
    with path.open("rb") as stream:
        try:
            book = openpyxl.load_workbook(stream, read_only=True, data_only=values, keep_links=False)
        except Exception as error:  # whatever a stranger's XML makes the library raise
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path.name} is not a readable Excel file: {reason}", "save it again as .xlsx or .csv") from error
        try:
            yield book
        finally:
            book.close()


def _open_formula(written: Sequence[Any], values: Sequence[Any]) -> int | None:
    """Index of the first cell that holds a formula and no value."""
    formulas = (i for i, cell in enumerate(written) if isinstance(cell, str) and cell.startswith("="))
    return next((i for i in formulas if i >= len(values) or values[i] is None), None)


def _letters(column: int) -> str:
    from openpyxl.utils import get_column_letter

    return str(get_column_letter(column + 1))


def _text(value: Any) -> str:
    """A cell as text: whole numbers without a point, dates as ISO 8601."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == time() else value.isoformat(sep=" ")
    if isinstance(value, (date, time)):
        return value.isoformat()
    return str(value)
