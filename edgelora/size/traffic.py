"""Bytes of weights that decoding one token reads: what bounds the speed of a small model, from the header alone."""

from __future__ import annotations

from pathlib import Path

from edgelora import size
from edgelora.gguf_header import base_of, read_header

_IDLE = ("metadata", "padding")  # never read while decoding


def bytes_per_token(path: Path) -> int:
    """Every weight once, but of an embedding table of its own just one row, and of experts only those that are used.

    Of a GGUF adapter those of the base beside it too.

    ModelError when the file is missing or damaged. Containers whose tensors bear no names (.pte, .litertlm) are taken whole.
    """
    return _gguf(path) if path.is_file() and path.suffix.lower() == ".gguf" else _grouped(path)


def _gguf(path: Path) -> int:
    header = read_header(path)
    tied = not any(t.name == "output.weight" for t in header.tensors)
    arch = header.metadata.get("general.architecture")
    experts, used = (header.metadata.get(f"{arch}.expert_{word}", 0) for word in ("count", "used_count"))
    total = 0
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight" and not tied:
            total += tensor.n_bytes // tensor.shape[1]
        elif "_exps." in tensor.name and experts:
            total += tensor.n_bytes * used // experts
        else:
            total += tensor.n_bytes
    base = base_of(path)
    return total + (_gguf(base) if base else 0)


def _grouped(path: Path) -> int:
    groups = size.read(path).by("group")
    idle = (*_IDLE, "embedding") if groups.get("output") else _IDLE  # with an output layer of its own, the table is only looked up
    return sum(n for group, n in groups.items() if group not in idle)
