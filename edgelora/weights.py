"""The weights of a model, read from safetensors a range of rows at a time: as they are stored, or with an adapter added on the way.

So a model is never in memory as a whole. A tensor is seen as a matrix (-1, last dimension); a vector is one row.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.errors import ModelError

VALUES_AT_ONCE = 1 << 18  # values of one range: 1 MiB in float32, what a core's own cache holds
_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}  # numpy has no bfloat16: read as its bits
_SHARD_BYTES = 4 << 30
_PRODUCTS = 1 << 18  # multiplications that a BLAS library does in the thread it is called from, without starting its own
_BLOCK = 64  # of NF4, bitsandbytes' default
_LINEAR = re.compile(r".*\.layers\.\d+\..*_proj\.weight")  # what training holds in 4 bits: not the embedding, not the head
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])\.weight|(magnitude)_vector)")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: `offset` in bytes from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values [start, stop) in the stored order, float32."""
        stored = _TYPES[self.dtype]
        found = np.fromfile(self.file, stored, stop - start, offset=self.offset + start * stored.itemsize)
        if len(found) != stop - start:
            raise ModelError(f"{self.file} ends too early", "copy the model again")
        if self.dtype != "BF16":
            return found.astype(np.float32, copy=False)
        bits = found.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)


class Checkpoint:
    """The safetensors files of `folder`. Headers are read at once; `rows` may be called from several threads.

    Raises ModelError for files that are missing or damaged and for weights that are not 16- or 32-bit floats.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        for file, names in _shards(folder).items():
            found = _places(file)
            for name in found if names is None else names:
                if name not in found:
                    raise ModelError(f"{file} lacks the tensor {name} that the index promises", "copy the model again")
                self._places[name] = found[name]

    @property
    def unties(self) -> bool:
        """Whether the head holds other weights than the embedding, although the configuration ties the two."""
        return False

    def shared(self) -> contextlib.AbstractContextManager[None]:
        """To be held while several threads read side by side."""
        return contextlib.nullcontext()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places.items()}

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows [first, last) of a tensor, float32, shape (rows, columns)."""
        shape = self._places[name].shape
        columns = shape[-1]
        end = math.prod(shape[:-1]) if last is None else last
        return self._values(name, first * columns, end * columns).reshape(-1, columns)

    def _values(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._places[name].read(start, stop)


class Base(Checkpoint):
    """What an adapter is added to: the weights of `folder` as they are ("16bit"), or as QLoRA training holds them ("nf4").

    `arithmetic`: torch's name of the type that training computes in. It rounds the weights to that before 4 bits are left of
    them: of a float16 checkpoint trained in bfloat16 every twentieth value is another one.
    """

    def __init__(self, folder: Path, held: str, arithmetic: str = "float32") -> None:
        super().__init__(folder)
        self.held, self.arithmetic = held, arithmetic
        self._lock = threading.Lock()
        self._rounded: tuple[str, _Nf4] | None = None  # of one tensor: ranges are asked for tensor by tensor

    def shared(self) -> contextlib.AbstractContextManager[None]:
        return _one_thread_each() if self.held == "nf4" else contextlib.nullcontext()

    def _values(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.held == "nf4" and _LINEAR.fullmatch(name):
            return self._nf4(name).values(start, stop)
        return super()._values(name, start, stop)

    def _nf4(self, name: str) -> _Nf4:
        with self._lock:
            if self._rounded is None or self._rounded[0] != name:
                self._rounded = None  # free it before the next one is made
                self._rounded = name, _Nf4(self._places[name], self.arithmetic)
            return self._rounded[1]


class Merged(Base):
    """W' = W + (alpha / r) B A, with W the base's own weights (`into` "16bit") or their NF4 form written out ("nf4").

    DoRA then gives every row of W' the length that it learnt.

    `adapter` is a folder in PEFT's format. Raises ModelError for one that holds anything but plain LoRA on matrices
    of this base.
    """

    def __init__(self, folder: Path, adapter: Path, into: str, arithmetic: str = "float32") -> None:
        super().__init__(folder, into, arithmetic)
        tied = _HEAD not in self._places
        if tied and _EMBEDDING in self._places:
            self._places[_HEAD] = self._places[_EMBEDDING]
        self.low_rank = low_rank(adapter, self.shapes)
        if tied and _HEAD not in self.low_rank:
            self._places.pop(_HEAD, None)

    @property
    def unties(self) -> bool:
        """An adapter on a head that shares the embedding's weights changes the head alone."""
        return _HEAD in self.low_rank

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        values = super().rows(name, first, last)
        if name in self.low_rank:
            b, a, lengths = self.low_rank[name]
            _add_product(values, b[first:last], a)
            if lengths is not None:
                values *= (lengths[first:last] / np.linalg.norm(values, axis=1))[:, None]
        return values


def _add_product(values: np.ndarray, b: np.ndarray, a: np.ndarray) -> None:
    """values += b a, in squares so small that BLAS stays in this thread: whoever merges has as many threads as there are cores."""
    side = max(1, math.isqrt(_PRODUCTS // len(a)))
    for top in range(0, len(b), side):
        for left in range(0, a.shape[1], side):
            values[top : top + side, left : left + side] += b[top : top + side] @ a[:, left : left + side]


class _Nf4:
    """A tensor as QLoRA training holds it: 4 bits a value, a scale a block, the scales in 8 bits (Dettmers et al. 2023).

    The steps are those of bitsandbytes.functional.quantize_4bit(compress_statistics=True), with bitsandbytes' own
    kernels, so the values are bit for bit what it dequantizes. Only the scales depend on the whole tensor, and only they are
    kept: the codes of a range are made when it is asked for, by whoever asks.
    """

    def __init__(self, place: _Place, arithmetic: str) -> None:
        import bitsandbytes.functional as bnb
        import torch

        self._place, self._arithmetic, self._columns = place, arithmetic, place.shape[-1]
        size = math.prod(place.shape)
        pieces = [(start, min(start + VALUES_AT_ONCE, size)) for start in range(0, size, VALUES_AT_ONCE)]
        # bitsandbytes' CPU kernel goes by rows: where blocks cross their ends, only the whole tensor gives what training saw.
        crossing = self._columns % _BLOCK > 0
        if crossing:
            codes, scale = (torch.cat(part) for part in zip(*(self._codes(*piece) for piece in pieces), strict=True))
        else:
            scale = torch.cat([self._read(*piece).reshape(-1, _BLOCK).abs().amax(1) for piece in pieces])
        mean = scale.mean()
        self._scales = bnb.dequantize_blockwise(*bnb.quantize_blockwise(scale - mean, blocksize=256)) + mean
        self._whole = self._written_out(codes, self._scales, size) if crossing else None

    def values(self, start: int, stop: int) -> np.ndarray:
        """Values [start, stop), which are whole rows."""
        if self._whole is not None:
            return self._whole[start:stop].copy()  # callers may add to it in place
        codes, _ = self._codes(start, stop)
        return self._written_out(codes, self._scales[start // _BLOCK : stop // _BLOCK], stop - start)

    def _read(self, start: int, stop: int) -> Any:
        import torch

        return torch.from_numpy(self._place.read(start, stop)).to(getattr(torch, self._arithmetic)).float()

    def _codes(self, start: int, stop: int) -> tuple[Any, Any]:
        """Two values a byte, and the largest of each block."""
        import torch

        codes, largest = torch.ops.bitsandbytes.quantize_4bit.default(self._read(start, stop), _BLOCK, "nf4", torch.uint8)
        return codes.reshape(-1), largest

    def _written_out(self, codes: Any, scales: Any, size: int) -> np.ndarray:
        import torch

        shape = (size // self._columns, self._columns)
        values = torch.ops.bitsandbytes.dequantize_4bit.default(codes, scales, _BLOCK, "nf4", shape, torch.float32)
        return np.asarray(values.reshape(-1).numpy())


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch would start as many threads in each of those that call it, and wait for them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write(source: Checkpoint, folder: Path, progress: Callable[[float, str], None], dtype: str = "BF16") -> None:
    """Write `source` into `folder` as safetensors of `dtype` (BF16, F16 or F32), a range of rows at a time; several files above 4 GiB."""
    width = _TYPES[dtype].itemsize
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in source.shapes.items():
        n_bytes = width * math.prod(shape)
        if shards[-1] and size + n_bytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    files = (
        ["model.safetensors"] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    total, done = sum(math.prod(shape) for shape in source.shapes.values()), 0
    for file, names in zip(files, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            begin, end = end, end + width * math.prod(source.shapes[name])
            header[name] = {"dtype": dtype, "shape": source.shapes[name], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                progress(done / total, name)
                for first, last in ranges(source.shapes[name]):
                    stream.write(_packed(source.rows(name, first, last), dtype))
                done += math.prod(source.shapes[name])
            stream.flush()
            os.fsync(stream.fileno())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": width * total},
            "weight_map": {n: f for f, names in zip(files, shards, strict=True) for n in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def ranges(shape: tuple[int, ...], multiple: int = 1, values: int = 0) -> Iterator[tuple[int, int]]:
    """Row ranges (first, last) of about `values` values (0: VALUES_AT_ONCE) that begin at a multiple of `multiple`."""
    rows, step = math.prod(shape[:-1]), multiple * max(1, (values or VALUES_AT_ONCE) // max(1, shape[-1] * multiple))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _packed(values: np.ndarray, dtype: str) -> bytes:
    if dtype != "BF16":
        return values.astype(_TYPES[dtype], copy=False).tobytes()
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy().tobytes()


def low_rank(adapter: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Weight name -> (scaled B, A, DoRA's magnitudes or None), float32, shapes (rows, r), (r, columns) and (rows,)."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        kind = config["peft_type"]
        strange = [key for key in ("fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
        alpha = float(config["lora_alpha"])
        rooted, dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        cause = " ".join(str(error).split())[:300]
        raise ModelError(f"{adapter.name} cannot be read: {cause}", "it is damaged: remove the folder and train again") from error
    if kind != "LORA" or strange:
        raise ModelError(
            f"{adapter.name} has {', '.join(strange)}, which is not merged here"
            if kind == "LORA"
            else f"{adapter.name} is {kind}, not LoRA",
            "train it as `edgelora finetune` does, or merge it with PEFT and export the folder that gives",
        )
    halves: dict[str, dict[str, np.ndarray]] = {}
    for key, place in _places(adapter / "adapter_model.safetensors").items():
        match = _LORA.fullmatch(key)
        if match is None or len(place.shape) != (1 if match[3] else 2):
            raise ModelError(f"{adapter.name}: {key} is not a matrix of a LoRA adapter", "a plain LoRA adapter can be merged")
        halves.setdefault(f"{match[1]}.weight", {})[match[2] or match[3]] = place.read(0, math.prod(place.shape)).reshape(place.shape)
    found = {}
    for name, half in halves.items():
        a, b, lengths = half.get("A"), half.get("B"), half.get("magnitude")
        if (
            a is None
            or b is None
            or len(a) != b.shape[1]
            or shapes.get(name) != (len(b), a.shape[1])
            or (None if lengths is None else len(lengths)) != (len(b) if dora else None)
        ):
            raise ModelError(f"{adapter.name} does not fit this base: {name}", "name the base that it was trained on")
        found[name] = (b * np.float32(alpha / (len(a) ** 0.5 if rooted else len(a))), a, lengths)
    return found


def _places(file: Path) -> dict[str, _Place]:
    """Every tensor of a file. safetensors itself judges the header: lengths, overlaps, shapes."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        raise ModelError(f"{file} is missing", "copy the model again: weights are read from safetensors files only")
    try:
        with safe_open(file, framework="np"):
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged: {error}", "copy the model again") from error
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in _TYPES:
            raise ModelError(
                f"{name} is stored as {entry['dtype']}", "export needs 16- or 32-bit weights: merge or dequantize the model first"
            )
        places[name] = _Place(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
    return places


def _shards(model: Path) -> dict[Path, list[str] | None]:
    """Each safetensors file and the tensors wanted from it (None: all)."""
    index = model / "model.safetensors.index.json"
    if not index.exists():
        return {model / "model.safetensors": None}
    shards: dict[Path, list[str] | None] = {}
    try:
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if Path(file).name != file:
                raise ModelError(f"{index} names {file!r}, which is not a file of its folder", "do not use this model")
            names = shards.setdefault(model / file, [])
            if names is not None:
                names.append(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged: {error}", "copy the model again") from error
    return shards
