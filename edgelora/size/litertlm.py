"""The parts of a LiteRT-LM bundle (.litertlm), as far as its fixed header tells.

"LITERTLM" | version 3 x u32 | pad | u64 at byte 24: where the header ends | a flatbuffer from byte 32 | sections, in blocks of 16 KiB

Source: schema/core of https://github.com/google-ai-edge/LiteRT-LM.
"""

from __future__ import annotations

from pathlib import Path

from edgelora.errors import ModelError
from edgelora.size import METADATA, Part, filled

_START, _BLOCK = 32, 16 * 1024


def parts(path: Path) -> tuple[Part, ...]:
    """The header, the sections (models, tokenizer) together, and the padding before them."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(_START)
    end = int.from_bytes(head[24:32], "little")
    if head[:8] != b"LITERTLM" or not _START <= end <= size:
        raise ModelError(f"{path} is no LiteRT-LM bundle: its header would end at byte {end} of {size}", "download or export it again")
    first = min(-(-end // _BLOCK) * _BLOCK, size)
    inside = [(Part("sections", "other", "-", size - first), first)] if size > first else []
    return filled(path, size, inside, [Part("header", METADATA, "flatbuffer", end)], end)
