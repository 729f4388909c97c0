"""The builder's graph made fit to ship: nothing private, a cache whose head size can be read, the embedding in few bits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx

from edgelora.errors import ModelError
from edgelora.runtime.onnx_folder import GRAPH

BLOCK = 32  # weights that share a scale
_DATA = f"{GRAPH}.data"
_LARGE, _PAGE = 1 << 20, 1 << 16
TABLE = "model.embed_tokens.weight_quantized"


@dataclass(frozen=True)
class Attention:
    """What a layer attends to: `window` tokens up to its own, -1 for all; and whether queries and keys are rotated."""

    window: int = -1
    rotates: bool = True


Read = Callable[[str], np.ndarray]  # name of a stored tensor -> its bytes, uint8


def tidy(
    folder: Path,
    type: str,
    tied: bool,
    attention: Sequence[Attention] = (),
    rounding: Callable[[onnx.GraphProto, Read], dict[str, np.ndarray]] | None = None,
) -> None:
    """Strip what tells where and when the graph was made, name the cache's head size, hold the embedding in few bits.

    The builder stamps the commit of whatever git checkout it runs in into producer_version. It leaves the cache's last
    dimension symbolic, where transformers.js and our runtime want to read the head size. `attention` says
    what every layer attends to, which the builder does not always carry over; `rounding` gives the tensors that are stored with other
    bytes than the builder's.
    """
    path = folder / GRAPH
    model = onnx.load(path, load_external_data=False)
    model.producer_version = model.producer_version.partition("+")[0]
    head_size = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]["head_size"]
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    nodes = {node.name: node for node in model.graph.node}
    for layer, wanted in enumerate(attention):
        _attend(nodes[f"/model/layers.{layer}/attn/GroupQueryAttention"], wanted)
    arrays = _quantize_embedding(model.graph, folder, tied) if type != "fp32" else {}
    if rounding is not None:
        tensors = {t.name: t for t in model.graph.initializer}
        arrays |= rounding(model.graph, lambda name: _external_array(tensors[name], folder).reshape(-1).view(np.uint8))
        head = next(n for n in model.graph.node if n.name.startswith("/lm_head/"))
        if tied and TABLE in tensors and head.input[1] in arrays:
            arrays[TABLE] = arrays[head.input[1]]
    repack(model.graph, folder, folder, arrays)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _attend(node: onnx.NodeProto, wanted: Attention) -> None:
    """Set a GroupQueryAttention's window, and take its rotation away: inputs 7 and 8 are cosines and sines (ONNX Runtime's ContribOperators.md)."""
    for attribute in node.attribute:
        if attribute.name == "local_window_size":
            attribute.i = wanted.window
        elif attribute.name == "do_rotary" and not wanted.rotates:
            attribute.i = 0
            node.input[7] = node.input[8] = ""


def _quantize_embedding(graph: onnx.GraphProto, folder: Path, tied: bool) -> dict[str, np.ndarray]:
    """Look embeddings up in a quantized table; returns the arrays that are to be written.

    Tied: the head's own table under a second name (two initializers, the same bytes of the data file). The builder
    reshapes the head's table at run time instead, which ONNX Runtime folds into a second copy in memory, or keeps the
    whole table in float32 beside it (int8). Untied: 8 bits in blocks of 32, q = round(w / s) + 128, s = max|w| / 127.
    """
    lookup = next((n for n in graph.node if n.name.startswith("/model/embed_tokens/") and "input_ids" in n.input), None)
    head = next((n for n in graph.node if n.name.startswith("/lm_head/") and n.op_type == "MatMulNBits"), None)
    tensors = {t.name: t for t in graph.initializer}
    settings = {a.name: a.i for a in head.attribute} if head else {}
    if (
        lookup is None or head is None or settings["K"] % max(BLOCK, settings["block_size"])
    ):  # padded rows: the builder's own lookup cuts the padding off
        return {}
    arrays: dict[str, np.ndarray] = {}
    if tied:
        alias = onnx.TensorProto()
        alias.CopyFrom(tensors[head.input[1]])
        alias.name = TABLE
        alias.dims[:] = [settings["N"], settings["K"] * settings["bits"] // 8]
        names, bits, block = [alias.name, *head.input[2:]], settings["bits"], settings["block_size"]
        graph.initializer.append(alias)
    else:
        bits, block = 8, BLOCK
        table, scales = _round_rows(_external_array(tensors[lookup.input[0]], folder), block)
        arrays = {TABLE: table, "model.embed_tokens.weight_scales": scales}
        names = list(arrays)
        for name, array in arrays.items():
            graph.initializer.add(name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    _remove(graph, lookup.input[0])
    quantized = onnx.helper.make_node(
        "GatherBlockQuantized",
        [names[0], "input_ids", *names[1:]],
        [lookup.output[0]],
        "/model/embed_tokens/GatherBlockQuantized",
        domain="com.microsoft",
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    lookup.CopyFrom(quantized)
    return arrays


def _round_rows(weight: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, width) float32 -> uint8 of the same shape and float32 scales (rows, width / block)."""
    rows, width = weight.shape
    table, scales = np.empty((rows, width), np.uint8), np.empty((rows, width // block), np.float32)
    for start in range(0, rows, 4096):  # a vocabulary of 262k rows is not held in float32
        part = np.asarray(weight[start : start + 4096]).reshape(-1, width // block, block)
        scale = np.abs(part).max(axis=-1) / np.float32(127)
        steps = np.rint(part / np.where(scale == 0, np.float32(1), scale)[..., None]) + 128
        table[start : start + 4096], scales[start : start + 4096] = steps.reshape(-1, width), scale
    return table, scales


def _external_array(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    entry = {e.key: e.value for e in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / entry["location"], dtype, "r", int(entry["offset"]), tuple(tensor.dims))


def _remove(graph: onnx.GraphProto, name: str) -> None:
    """Take the initializer `name`, or the node that makes it, out of the graph."""
    for tensor in [t for t in graph.initializer if t.name == name]:
        graph.initializer.remove(tensor)
    for node in [n for n in graph.node if name in n.output]:
        graph.node.remove(node)
    for value in [v for v in graph.value_info if v.name == name]:
        graph.value_info.remove(value)


def aligned(length: int) -> int:
    """What a tensor of `length` bytes takes in the data file: those of a mebibyte and more start at a multiple of 64 KiB, so
    that every system can map them into memory, the others at one of 64 bytes."""
    step = _PAGE if length >= _LARGE else 64
    return -(-length // step) * step


def repack(graph: onnx.GraphProto, source: Path, folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the data file of `folder` with what the graph names, from `arrays` or else `source`'s; equal spans are written once.

    Large tensors come first, so none takes more than `aligned` says.
    """
    target = folder / f"{_DATA}.new"
    written: dict[tuple[object, str], int] = {}
    entries = {tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in graph.initializer}
    lengths = {name: arrays[name].nbytes if name in arrays else int(entry["length"]) for name, entry in entries.items()}
    with (source / _DATA).open("rb") as old, target.open("wb") as new:
        for tensor in sorted(graph.initializer, key=lambda tensor: lengths[tensor.name] < _LARGE):
            entry, array, length = entries[tensor.name], arrays.get(tensor.name), lengths[tensor.name]
            span = (id(array), "") if array is not None else (entry["offset"], entry["length"])
            if span not in written:
                new.seek(-new.tell() % (_PAGE if length >= _LARGE else 64), os.SEEK_CUR)
                written[span] = new.tell()
                if array is None:
                    old.seek(int(entry["offset"]))
                    _copy(old, new, length)
                else:
                    new.write(array.data)
            tensor.ClearField("raw_data")
            del tensor.external_data[:]
            for key, value in (("location", _DATA), ("offset", written[span]), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            tensor.data_location = onnx.TensorProto.EXTERNAL
    target.replace(folder / _DATA)


def _copy(old: BinaryIO, new: BinaryIO, length: int) -> None:
    while length:
        block = old.read(min(length, 1 << 22))
        if not block:
            raise ModelError("the ONNX builder wrote a data file that is too short", "run the export again")
        new.write(block)
        length -= len(block)
