"""Read a GGUF file's header with nothing but the standard library, trusting nothing in it.

    magic "GGUF" | version u32 | n_tensors u64 | n_kv u64
    n_kv times       key string | value type u32 | value
    n_tensors times  name string | n_dims u32 | dims u64[n_dims] | type u32 | offset u64
    zeros up to general.alignment, then the tensors' bytes

A string is a u64 length and UTF-8 bytes; an array is an element type u32, a count u64 and the elements; all is little
endian. Source: docs/gguf.md of https://github.com/ggml-org/ggml. Everything the file claims is checked against the
bytes that are there before it is believed, so a hostile file costs no more memory or time than its header is long.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, overload

from edgelora.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# ggml_type in the file -> its name, weights in a block, bytes a block takes (ggml.h, ggml-common.h).
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

# Far above any real file; they bound what a hostile one can make us hold.
_MAX_ENTRIES = 1 << 16  # metadata keys, tensors
_MAX_KEY = (1 << 16) - 1  # bytes, by the specification
_MAX_NAME = 63  # bytes; llama.cpp keeps 64 with the closing zero
_MAX_DIMS = 4
_MAX_TEXT = 64 << 20  # bytes of string values held at once
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies. `shape` is in ggml's order: the row length first. `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Array(Sequence[Any]):
    """An array of the metadata, left in the file until it is indexed or iterated (a vocabulary has 10^5 strings)."""

    path: Path
    type: int  # GGUF value type of the elements
    offset: int  # of the first element, from the file's start
    n_bytes: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.n_bytes)
        except OSError as error:
            raise ModelError(f"cannot read {self.path}: {error.strerror}", "check the path and its permissions") from error
        if len(data) != self.n_bytes:
            raise ModelError(f"{self.path} became shorter while it was read", "wait until it is fully written")
        if self.type == _STRING:
            return _strings(data, self.length)
        return iter(struct.unpack(f"<{self.length}{_SCALARS[self.type]}", data))

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself. Long arrays of `metadata` are lazy `Array`s."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def chat_template(self) -> str | None:
        """The default chat template (Jinja), None when the file has none."""
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file (version 2 or 3, little endian).

    ModelError when it is missing, truncated, damaged or of another kind: every string, array and tensor has to lie
    within the file, tensors must not overlap, names must not repeat.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
            if start != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: it starts with {start!r}", "export one with `edgelora export --format gguf`")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", "name a GGUF file that you may read") from error


def chat_template(path: Path) -> str | None:
    """The chat template inside a GGUF file, None when it has none."""
    return read_header(path).chat_template


def base_of(path: Path) -> Path | None:
    """The base beside a GGUF adapter, None for a whole model. ModelError when the base that the adapter names is not there."""
    values = read_header(path).metadata
    if values.get("general.type") != "adapter":
        return None
    name = str(values.get("general.base_model.0.name", ""))
    base = path.with_name(f"{Path(name).name}.gguf")
    if not name or not base.is_file():
        raise ModelError(
            f"{path} is an adapter, and its base {name or 'has no name'} is not beside it", "put the base's GGUF file into its folder"
        )
    return base


class _Reader:
    """A cursor over the file that never steps past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 4
        self.text = 0  # bytes of string values kept so far

    def header(self) -> Header:
        version = self.number("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big endian" if swapped in (1, 2, 3) else f"of version {version}"
            self.damaged(f"it is {kind}; versions 2 and 3, little endian, are read")
        n_tensors, n_kv = self.number("Q"), self.number("Q")
        for noun, count in (("tensors", n_tensors), ("metadata entries", n_kv)):
            if count > _MAX_ENTRIES:
                self.damaged(f"it claims {count} {noun}")
        metadata: dict[str, Any] = {}
        for _ in range(n_kv):
            key = self.name("key", _MAX_KEY)
            if key in metadata:
                self.damaged(f"the key {key!r} stands twice")
            metadata[key] = self.value(key, self.number("I"))
        tensors = [self.tensor() for _ in range(n_tensors)]
        return Header(self.path, version, metadata, self.placed(tensors, metadata.get("general.alignment", 32)))

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            n_bytes = self.length(self.number("Q"), key)
            self.text += n_bytes
            if self.text > _MAX_TEXT:
                self.damaged(f"its metadata holds more than {_MAX_TEXT >> 20} MiB of text")
            return self.take(n_bytes).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self.array(key)
        return self.number(self.scalar(key, kind))

    def array(self, key: str) -> Array:
        kind, count = self.number("I"), self.number("Q")
        start = self.at
        if kind == _STRING:
            self.length(8 * count, key)
            self.at = _after_strings(self.data, start, count)
            if self.at < 0:
                self.damaged(f"a string of {key!r} goes past the end of the file")
        else:
            self.at += self.length(count * struct.calcsize(self.scalar(key, kind)), key)
        return Array(self.path, kind, start, self.at - start, count)

    def tensor(self) -> Tensor:
        """`offset` still counts from where the tensor data starts."""
        name = self.name("tensor name", _MAX_NAME)
        n_dims = self.number("I")
        if n_dims > _MAX_DIMS:
            self.damaged(f"the tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dims))
        kind, offset = self.number("I"), self.number("Q")
        if kind not in BLOCKS:
            self.damaged(f"the tensor {name!r} is of the unknown type {kind}")
        type_name, weights, n_bytes = BLOCKS[kind]
        if 0 in shape or (shape[0] if shape else 1) % weights:
            self.damaged(f"the tensor {name!r} has the shape {shape}, which {type_name} cannot hold")
        return Tensor(name, shape, type_name, offset, math.prod(shape) // weights * n_bytes)

    def placed(self, tensors: Sequence[Tensor], alignment: Any) -> tuple[Tensor, ...]:
        """The tensors with offsets from the file's start, each seen to lie in the file and on no other."""
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            self.damaged(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.at // alignment) * alignment
        end, seen = 0, set()
        for t in sorted(tensors, key=lambda t: t.offset):
            if t.name in seen:
                self.damaged(f"the tensor {t.name!r} stands twice")
            if t.offset % alignment or t.offset < end:
                self.damaged(f"the tensor {t.name!r} is at {t.offset}, which is unaligned or inside another tensor")
            end = t.offset + t.n_bytes
            if start + end > self.size:
                self.damaged(f"the tensor {t.name!r} ends at byte {start + end}, the file at {self.size}; was it cut short?")
            seen.add(t.name)
        return tuple(Tensor(t.name, t.shape, t.type, start + t.offset, t.n_bytes) for t in tensors)

    def name(self, what: str, longest: int) -> str:
        n_bytes = self.number("Q")
        if not 0 < n_bytes <= longest:
            self.damaged(f"a {what} is {n_bytes} bytes long")
        try:
            return self.take(n_bytes).decode("utf-8")
        except UnicodeDecodeError:
            self.damaged(f"a {what} is not UTF-8")

    def scalar(self, key: str, kind: int) -> str:
        if kind not in _SCALARS:
            self.damaged(f"the value of {key!r} is of the unknown type {kind}")
        return _SCALARS[kind]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def take(self, n_bytes: int) -> bytes:
        self.length(n_bytes, "the header")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def length(self, n_bytes: int, what: str) -> int:
        if n_bytes > self.size - self.at:
            self.damaged(f"{what} goes past the end of the file ({self.size} bytes)")
        return n_bytes

    def damaged(self, why: str) -> NoReturn:
        raise ModelError(f"{self.path} is no usable GGUF file: {why}", "export or download it again")


def _after_strings(data: mmap.mmap, at: int, count: int) -> int:
    """Where `count` strings that start at `at` end; -1 when that is past the end. A tight loop: merges are 10^6 strings."""
    length, last = struct.Struct("<Q").unpack_from, len(data) - 8
    for _ in range(count):
        if at > last:
            return -1
        at += 8 + length(data, at)[0]
    return at if at <= len(data) else -1


def _strings(data: bytes, count: int) -> Iterator[str]:
    at = 0
    for _ in range(count):
        start = at + 8
        at = start + int.from_bytes(data[at:start], "little")
        yield data[start:at].decode("utf-8", "replace")
