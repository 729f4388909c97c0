"""Where the bytes of a model file are, from its header alone: no torch, no numpy, and no weight is read.

Every byte of a file belongs to exactly one part: a tensor, a piece of metadata, or the padding between them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.errors import ModelError

# suffix -> the module that reads the container: `parts(path)` gives every Part of the file
READERS = {
    ".gguf": "edgelora.size.gguf",
    ".safetensors": "edgelora.size.safetensors",
    ".onnx": "edgelora.size.onnx",
    ".pte": "edgelora.size.executorch",
    ".litertlm": "edgelora.size.litertlm",
}
METADATA, PADDING = "metadata", "padding"

# What a tensor is for, by its name in GGUF, in a checkpoint or in an ONNX graph; the first that fits.
_GROUPS = (
    ("norm", re.compile(r"norm|layernorm|ln_\w")),
    ("embedding", re.compile(r"token_embd|embed_tokens|wte|embedding")),
    ("output", re.compile(r"^output\.|lm_head")),
    ("attention", re.compile(r"attn|attention|[qkvo]_proj|qkv")),
    ("feed-forward", re.compile(r"ffn|mlp|feed_forward|gate_proj|up_proj|down_proj")),
)
_LAYER = re.compile(r"(?:^|[./_])(?:blk|layers?|h)[./](\d+)(?=[./_]|$)")


@dataclass(frozen=True)
class Part:
    """Some bytes of a file. `group` says what they are for, `type` how they are stored."""

    name: str
    group: str
    type: str
    n_bytes: int

    @property
    def layer(self) -> str:
        """'layer 3', or the group of what belongs to no layer."""
        found = _LAYER.search(self.name)
        return f"layer {int(found[1])}" if found and self.group not in (METADATA, PADDING) else self.group


@dataclass(frozen=True)
class Anatomy:
    """A file or folder and all its parts; their bytes add up to `size_bytes`."""

    name: str
    size_bytes: int
    parts: tuple[Part, ...]

    def by(self, what: str) -> dict[str, int]:
        """Bytes a `group`, `type`, `layer` or `name`, largest first."""
        totals: dict[str, int] = {}
        for part in self.parts:
            key = str(getattr(part, what))
            totals[key] = totals.get(key, 0) + part.n_bytes
        return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))


def group_of(tensor: str) -> str:
    """What a tensor of that name is for; 'other' when the name does not tell."""
    lower = tensor.lower()
    return next((group for group, pattern in _GROUPS if pattern.search(lower)), "other")


def read(path: Path) -> Anatomy:
    """The anatomy of a model file, or of all files of a folder.

    ModelError when it is missing, empty or damaged. A file of a kind without a reader is one part.
    """
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            if not files:
                raise ModelError(f"{path} is an empty folder", "name a model file, or a folder that holds one")
            return _folder(path, files)
        if not path.is_file():
            raise ModelError(f"model not found: {path}", "name a .gguf, .onnx or .safetensors file, or a folder")
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "name a file that you may read") from error
    return Anatomy(path.name, size, _parts(path, size))


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """name -> (bytes before, bytes after) of what differs, the largest change first."""
    names = {name: (before.get(name, 0), after.get(name, 0)) for name in {*before, *after}}
    moved = {name: pair for name, pair in names.items() if pair[0] != pair[1]}
    return dict(sorted(moved.items(), key=lambda item: (-abs(item[1][1] - item[1][0]), item[0])))


def filled(path: Path, size: int, tensors: Iterable[tuple[Part, int]], metadata: Iterable[Part], start: int) -> tuple[Part, ...]:
    """All parts of a file whose tensors are (part, offset): `metadata` before `start`, then tensors and the gaps between them.

    ModelError when tensors overlap or lie outside of the file.
    """
    parts, at = list(metadata), start
    gaps = 0
    for part, offset in sorted(tensors, key=lambda item: (item[1], item[0].n_bytes)):
        if offset < at or offset + part.n_bytes > size:
            raise ModelError(
                f"{path} is damaged: {part.name!r} lies outside of the file or inside another tensor", "download or export it again"
            )
        gaps += offset - at
        at = offset + part.n_bytes
        parts.append(part)
    rest = gaps + size - at
    return (*parts, Part("padding", PADDING, "-", rest)) if rest else tuple(parts)


def _parts(path: Path, size: int) -> tuple[Part, ...]:
    if not size:
        raise ModelError(f"{path} is empty", "download or export it again")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        return (Part(path.name, METADATA if path.suffix.lower() in (".json", ".txt", ".jinja", ".model") else "other", "-", size),)
    module: Any = importlib.import_module(reader)
    found: tuple[Part, ...] = module.parts(path)
    return found


def _folder(path: Path, files: list[Path]) -> Anatomy:
    """All files; the weights that an ONNX graph keeps in a file beside it are parts of their own."""
    from edgelora.size import onnx

    sizes = {file: file.stat().st_size for file in files}
    beside: dict[Path, dict[tuple[int, int], Part]] = {}  # bytes that several tensors share are counted once
    for graph in files:
        if graph.suffix.lower() == ".onnx" and sizes[graph]:
            for part, (location, offset) in onnx.external(graph):
                data = graph.parent / location
                if data in sizes:
                    beside.setdefault(data, {}).setdefault((offset, part.n_bytes), part)
    parts: list[Part] = []
    for file in files:
        if file in beside:
            parts += filled(file, sizes[file], [(part, offset) for (offset, _), part in beside[file].items()], [], 0)
        elif sizes[file]:
            parts += _parts(file, sizes[file])
    return Anatomy(path.name, sum(sizes.values()), tuple(parts))
