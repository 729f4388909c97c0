"""Damaged and hostile weight files: a good one, and what is done to its bytes. Used by the tests and by bench/fuzz.py."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from edgelora import gguf_header, weights
from edgelora.errors import ModelError

_EDGES = (0, 1, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def small_gguf() -> bytes:
    """A GGUF file with every kind of value, and three tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    values = [
        ("general.architecture", 8, text("llama")),
        ("general.alignment", 4, struct.pack("<I", 32)),
        ("llama.block_count", 4, struct.pack("<I", 1)),
        ("llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
        ("tokenizer.ggml.add_bos_token", 7, b"\1"),
        ("tokenizer.chat_template", 8, text("{{ messages[0]['content'] }}")),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 3) + text("a") + text("b") + text("c")),
        ("tokenizer.ggml.token_type", 9, struct.pack("<IQ3i", 5, 3, 1, 1, 3)),
        ("an.array", 9, struct.pack("<IQ4d", 12, 4, 1, 2, 3, 4)),
        ("a.long", 11, struct.pack("<q", -5)),
    ]
    tensors = [("token_embd.weight", (32, 3), 0, 384), ("blk.0.ffn_up.weight", (64, 2), 2, 72), ("output_norm.weight", (32,), 0, 128)]
    header, offset, data = b"", 0, b""
    for name, dims, kind, size in tensors:
        header += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        data += bytes(size) + bytes(-size % 32)
        offset = len(data)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    head += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in values) + header
    return head + bytes(-len(head) % 32) + data


def small_safetensors() -> bytes:
    tensors = {"model.embed_tokens.weight": np.ones((5, 4), np.float16), "model.norm.weight": np.ones(4, np.float32)}
    return save(tensors, {"format": "pt"})


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes after one to three strokes: cut off, overwritten with an edge of some integer, flipped, doubled, moved."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(max(1, min(len(found), 1200)))
        stroke = chance.randrange(7)
        if stroke == 0:
            del found[at:]
        elif stroke == 1:
            found[at : at + 8] = struct.pack("<Q", chance.choice(_EDGES))
        elif stroke == 2:
            found[at : at + 4] = struct.pack("<I", chance.choice(_EDGES) & 0xFFFFFFFF)
        elif stroke == 3:
            found[at : at + 1] = bytes([chance.randrange(256)])
        elif stroke == 4:
            found[at:at] = found[at : at + chance.randrange(1, 64)]
        elif stroke == 5:
            del found[at : at + chance.randrange(1, 64)]
        else:  # a number written in digits, as in the header of a safetensors file
            digits = [i for i, byte in enumerate(found[:1200]) if 48 <= byte <= 57]
            if digits:
                place = chance.choice(digits)
                found[place : place + 1] = str(chance.choice((*_EDGES, "-1", "1e9"))).encode()
    return bytes(found)


def read_gguf(file: Path) -> bool:
    """Everything that edgelora looks at in a header; False when it was refused as it should be."""
    try:
        header = gguf_header.read_header(file)
    except ModelError:
        return False
    for value in header.metadata.values():
        if isinstance(value, gguf_header.Array):
            list(value)
    size = file.stat().st_size
    assert all(0 < t.offset <= t.offset + t.n_bytes <= size for t in header.tensors)
    return True


def read_safetensors(folder: Path) -> bool:
    """Every weight of a folder; False when it was refused as it should be."""
    try:
        found = weights.Checkpoint(folder)
        for name in found.shapes:
            found.rows(name)
    except ModelError:
        return False
    return True
