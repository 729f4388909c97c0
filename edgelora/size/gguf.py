"""The parts of a GGUF file; the header is read and checked by `edgelora.gguf_header`."""

from __future__ import annotations

from pathlib import Path

from edgelora import gguf_header
from edgelora.size import METADATA, Part, filled, group_of


def parts(path: Path) -> tuple[Part, ...]:
    """Long metadata (texts and arrays) by key, the short keys and the table of tensors together, then every tensor."""
    header = gguf_header.read_header(path)
    size = path.stat().st_size
    start = min((t.offset for t in header.tensors), default=size)
    long = []
    for key, value in header.metadata.items():
        if isinstance(value, gguf_header.Array):
            long.append(Part(key, METADATA, "array", 24 + len(key.encode()) + value.n_bytes))
        elif isinstance(value, str):
            long.append(Part(key, METADATA, "text", 20 + len(key.encode()) + len(value.encode("utf-8", "surrogatepass"))))
    rest = start - sum(part.n_bytes for part in long)
    if rest < 0:  # text that is no UTF-8 was replaced by longer marks
        long, rest = [], start
    tensors = [(Part(t.name, group_of(t.name), t.type, t.n_bytes), t.offset) for t in header.tensors]
    return filled(path, size, tensors, [*long, Part("keys and tensor table", METADATA, "-", rest)], start)
