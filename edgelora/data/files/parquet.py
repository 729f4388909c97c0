"""Parquet: rows from columns, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgelora.data.files import Opened
from edgelora.data.lines import MAX_LINE, not_found
from edgelora.data.row import Broken, Record
from edgelora.errors import DataError, ToolMissing
from edgelora.recipe import Reading

_BATCH = 256  # rows
_MAX_CHUNK = 1 << 30  # bytes of one column in one row group, unpacked
_MAX_RATIO = 1000  # characters a byte of the file; real texts have up to 30
_SMALL = 1 << 29  # characters; below this any ratio is harmless
_MAX_HEADER = 1 << 27  # bytes and entries of the file's own description


def open_file(path: Path, reading: Reading) -> Opened:
    file = _file(path, [])
    columns = tuple(str(name) for name in file.schema_arrow.names)
    strings = [field.name for field in file.schema_arrow if str(field.type) in ("string", "large_string", "binary", "large_binary")]
    _check_sizes(path, file.metadata)
    file.close()
    return Opened(columns, lambda: _records(path, strings), counts="row")


def _records(path: Path, strings: list[str]) -> Iterator[tuple[int, Record]]:
    import pyarrow

    number = characters = 0
    most = max(_SMALL, _MAX_RATIO * path.stat().st_size)
    file = _file(path, strings)  # these stay references into their dictionary: a text repeated a million times is held once
    try:
        for batch in file.iter_batches(batch_size=_BATCH):
            for row in range(batch.num_rows):
                number += 1
                record = _record(number, batch, row)
                characters += 0 if isinstance(record, Broken) else sum(len(value) for value in record.values() if isinstance(value, str))
                if characters > most:
                    raise DataError(
                        f"{path.name} row {number}: its texts are {_MAX_RATIO} times as large as the file",
                        "the same long text in every row?",
                    )
                yield number, record
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{path.name} row {number + 1}: {_first_line(error)}", "the file is damaged; write it again") from error
    finally:
        file.close()


def _record(number: int, batch: Any, row: int) -> Record:
    found = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        value = column[row].as_py()
        if isinstance(value, bytes):
            try:
                value = value.decode("utf-8")
            except UnicodeDecodeError:
                value = None  # a picture or the like
        if isinstance(value, str) and len(value) > MAX_LINE:
            return Broken(number, f"column {name!r} has {len(value)} characters", value[:200], "a row of data is far shorter")
        found[str(name)] = value
    return found


def _check_sizes(path: Path, metadata: Any) -> None:
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if column.total_uncompressed_size > _MAX_CHUNK:
                raise DataError(
                    f"{path.name}: column {column.path_in_schema!r} of row group {group} unpacks to {column.total_uncompressed_size >> 20} MiB",
                    "write it in row groups of at most 1 GiB",
                )


def _file(path: Path, as_dictionary: list[str]) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ToolMissing(
            "Parquet files need the package pyarrow", 'pip install -c constraints.txt -e ".[data]", or write JSONL'
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(
            path,
            read_dictionary=as_dictionary,
            pre_buffer=False,
            thrift_string_size_limit=_MAX_HEADER,
            thrift_container_size_limit=_MAX_HEADER,
        )
    except FileNotFoundError:
        raise not_found(path) from None
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{path.name} is not a readable Parquet file: {_first_line(error)}", "write it again, or use JSONL") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
