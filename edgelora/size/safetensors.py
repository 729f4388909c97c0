"""The parts of a safetensors file: u64 length of the header, the header as JSON, then the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgelora.errors import ModelError
from edgelora.size import METADATA, Part, filled, group_of

_MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader


def parts(path: Path) -> tuple[Part, ...]:
    """Every tensor, and the header as one part. ModelError for a damaged or hostile file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ModelError(f"{path} is no safetensors file: its header would be {length} bytes long", "download or export it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
        tensors = [_tensor(name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is no safetensors file: its header cannot be read ({error})", "download or export it again") from error
    return filled(path, size, tensors, [Part("header", METADATA, "JSON", 8 + length)], 8 + length)


def _tensor(name: str, entry: dict[str, Any], start: int) -> tuple[Part, int]:
    begin, end = entry["data_offsets"]
    if not (type(begin) is int and type(end) is int and 0 <= begin <= end):
        raise ValueError(f"{name!r} lies at {begin!r} to {end!r}")
    return Part(name, group_of(name), str(entry["dtype"]), end - begin), start + begin
