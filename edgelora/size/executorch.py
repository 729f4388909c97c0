"""The parts of an ExecuTorch program (.pte), as far as its header tells.

A flatbuffer with the identifier ET12 at byte 4. At byte 8 may follow, little-endian: "eh00", u32 length of this header,
u64 size of the program, u64 offset of the segments (weights). Source: runtime/executor and docs/source/pte-file-format.md
of https://github.com/pytorch/executorch.
"""

from __future__ import annotations

import struct
from pathlib import Path

from edgelora.errors import ModelError
from edgelora.size import METADATA, Part, filled


def parts(path: Path) -> tuple[Part, ...]:
    """The program and the segments; without the extended header one part."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(32)
    if len(head) < 8 or head[4:6] != b"ET":
        raise ModelError(f"{path} is no ExecuTorch program: it lacks the mark ET", "download or export it again")
    if head[8:12] != b"eh00" or len(head) < 32:
        return (Part("program", METADATA, "flatbuffer", size),)
    program, segments = struct.unpack("<QQ", head[16:32])
    if program > size or segments > size or (segments and segments < program):
        raise ModelError(
            f"{path} is damaged: {program} bytes of program, segments at {segments}, {size} bytes in all", "download or export it again"
        )
    inside = [(Part("segments", "other", "-", size - segments), segments)] if segments else []
    return filled(path, size, inside, [Part("program", METADATA, "flatbuffer", program)], program)
