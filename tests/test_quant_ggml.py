"""Block quantizers and the choice of types, against closed formulas and llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from edgelora.errors import ModelError
from edgelora.export import gguf as export
from edgelora.quant import ggml, gguf_types
from tests.tiny_models import tiny_model

QUANTIZED = [name for name, kind in gguf_types.FILE_TYPES.items() if kind.base not in (Type.F32, Type.F16, Type.BF16)]


def quiet(share: float, what: str) -> None:
    assert 0 <= share <= 1


def llama_quantize(source: Path, target: Path, name: str, importance: dict[str, np.ndarray] | None = None) -> Path:
    """llama.cpp's own quantizer on a file."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(gguf_types.FILE_TYPES[name].code)
    params.nthread = 1
    if importance:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # ended by an entry without a name
        for entry, (tensor, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = tensor.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return target


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    mine, other = tensors(ours), tensors(theirs)
    assert {name: t.tensor_type.name for name, t in mine.items()} == {name: t.tensor_type.name for name, t in other.items()}
    assert [name for name in mine if not np.array_equal(mine[name].data, other[name].data)] == []


# ---- block formats ----


def test_q8_0_is_scale_and_rounded_values() -> None:
    values = np.linspace(-127, 127, 32, dtype=np.float32)[None]
    block = ggml.quantize(values, Type.Q8_0)
    assert block.shape == (1, 34)
    assert block[0, :2].view(np.float16)[0] == 1.0
    assert np.array_equal(block[0, 2:].view(np.int8), np.round(values[0]).astype(np.int8))


def test_q4_0_packs_low_then_high_half() -> None:
    """x = d (q - 8) with d = largest / -8; byte j holds q of weight j below and of weight j + 16 above."""
    levels = np.arange(32) % 16
    values = (levels - 8).astype(np.float32)[None]
    block = ggml.quantize(values, Type.Q4_0)
    assert block[0, :2].view(np.float16)[0] == 1.0
    assert np.array_equal(block[0, 2:] & 15, levels[:16])
    assert np.array_equal(block[0, 2:] >> 4, levels[16:])


@pytest.mark.parametrize("type", [Type.Q4_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS])
def test_zeros_stay_zero_and_sizes_hold(type: Type) -> None:
    packed = ggml.quantize(np.zeros((3, 512), dtype=np.float32), type)
    assert packed.shape == (3, ggml.row_bytes(type, 512))
    assert not gguf.quants.dequantize(packed, type).any()


def test_row_ranges_give_the_bytes_of_the_whole() -> None:
    values = np.random.default_rng(0).standard_normal((6, 256), dtype=np.float32)
    parts = [ggml.quantize(values[i : i + 2], Type.Q4_K) for i in range(0, 6, 2)]
    assert np.array_equal(np.concatenate(parts), ggml.quantize(values, Type.Q4_K))


def test_importance_lowers_the_error_where_it_is_high() -> None:
    values = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    importance = np.where(np.arange(256) % 8 == 0, 100, 0.01).astype(np.float32)

    def error(packed: np.ndarray) -> float:
        return float((((gguf.quants.dequantize(packed, Type.Q4_0) - values) ** 2) * importance).sum())

    assert error(ggml.quantize(values, Type.Q4_0, importance)) < 0.9 * error(ggml.quantize(values, Type.Q4_0))


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="100 columns are not a multiple of Q4_K's block of 256"):
        ggml.row_bytes(Type.Q4_K, 100)
    with pytest.raises(ValueError, match="importance of shape"):
        ggml.quantize(np.ones((1, 32), dtype=np.float32), Type.Q4_0, np.ones(31, dtype=np.float32))
    with pytest.raises(ModelError, match="values up to 1e\\+08 do not fit Q8_0"):
        ggml.quantize(np.full((1, 32), 1e8, dtype=np.float32), Type.Q8_0)


# ---- which type ----

SHAPES: dict[str, dict[str, Any]] = {
    "blocks of 256": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "blocks of 32": {"hidden_size": 96, "intermediate_size": 160, "tie_word_embeddings": False},
    "odd rows": {"hidden_size": 48, "intermediate_size": 256, "num_key_value_heads": 4},
}


@pytest.fixture(scope="module")
def f16_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files = {}
    for shape, changes in SHAPES.items():
        folder = tiny_model("llama", tmp_path_factory.mktemp("shape"), **changes)
        files[shape] = export.write(folder, "f16", folder, "tiny", quiet)
    return files


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_tensor_has_the_type_and_bytes_of_llama_quantize(name: str, shape: str, f16_files: dict[str, Path], tmp_path: Path) -> None:
    ours = export.write(f16_files[shape].parent, name, tmp_path, "tiny", quiet)
    theirs = llama_quantize(f16_files[shape], tmp_path / "theirs.gguf", name)
    assert_same_tensors(ours, theirs)
    assert ours.stat().st_size == theirs.stat().st_size


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q4_k_m", "iq4_xs", "q3_k_m"])
def test_importance_matrix_gives_the_bytes_of_llama_quantize(name: str, f16_files: dict[str, Path], tmp_path: Path) -> None:
    source = f16_files["blocks of 256"]
    random = np.random.default_rng(1)
    rows = {key: int(t.shape[0]) for key, t in tensors(source).items() if key.startswith("blk.") and len(t.shape) == 2}
    importance = {key: random.exponential(size=columns).astype(np.float32) for key, columns in rows.items()}
    ours = export.write(source.parent, name, tmp_path, "tiny", quiet, importance)
    assert_same_tensors(ours, llama_quantize(source, tmp_path / "theirs.gguf", name, importance))
    assert export.predict_bytes(source.parent, name, "tiny", importance) == ours.stat().st_size


def skeleton(path: Path, shape: gguf_types.Shape, columns: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """A file with a model's hyper-parameters and matrices of two rows: enough for llama.cpp to choose types."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_block_count(shape.layers)
    writer.add_context_length(32)
    writer.add_embedding_length(columns)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    kinds = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    if shape.architecture == "phi3":
        kinds = ["attn_qkv", "attn_output", "ffn_up", "ffn_down"]
    names = ["token_embd.weight", *(f"blk.{i}.{kind}.weight" for i in range(shape.layers) for kind in kinds)]
    names += [] if tied else ["output.weight"]
    for name in names:
        writer.add_tensor(name, np.ones((2, columns), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict.fromkeys(names, (2, columns))


@pytest.mark.parametrize(
    ("shape", "columns", "tied"),
    [
        (gguf_types.Shape(34, 8, 2, "llama"), 256, True),
        (gguf_types.Shape(17, 8, 4, "llama"), 256, False),
        (gguf_types.Shape(9, 8, 2, "llama"), 96, True),
        (gguf_types.Shape(9, 8, 2, "llama"), 80, False),
        (gguf_types.Shape(80, 8, 4, "llama"), 256, True),
        (gguf_types.Shape(80, 8, 8, "llama"), 256, True),
        (gguf_types.Shape(80, 8, 4, "qwen2"), 256, True),
        (gguf_types.Shape(32, 8, 8, "phi3"), 256, False),
        (gguf_types.Shape(26, 4, 1, "gemma3"), 256, True),
    ],
    ids=str,
)
def test_types_are_those_of_llama_quantize(shape: gguf_types.Shape, columns: int, tied: bool, tmp_path: Path) -> None:
    """Depth, shared heads, row length and tied embeddings all change the mixture (80 layers: llama.cpp's 70B rule)."""
    shapes = skeleton(tmp_path / "f16.gguf", shape, columns, tied)
    for name in ("q4_k_m", "q3_k_m", "q2_k") if shape.layers == 80 else QUANTIZED:
        theirs = tensors(llama_quantize(tmp_path / "f16.gguf", tmp_path / "theirs.gguf", name))
        plan = gguf_types.plan(shapes, name, shape)
        assert {key: choice.type.name for key, choice in plan.items()} == {key: t.tensor_type.name for key, t in theirs.items()}, name


def test_fallbacks_are_visible() -> None:
    shapes = {"token_embd.weight": (1000, 576), "blk.0.attn_q.weight": (576, 576), "blk.0.attn_norm.weight": (576,)}
    plan = gguf_types.plan(shapes, "q4_k_m", gguf_types.Shape(30, 9, 3, "llama"))
    assert plan["blk.0.attn_q.weight"] == gguf_types.Choice(type=Type.Q5_0, wanted=Type.Q4_K)
    assert plan["token_embd.weight"] == gguf_types.Choice(type=Type.Q8_0, wanted=Type.Q8_0)
    assert plan["blk.0.attn_norm.weight"].type == Type.F32


@pytest.mark.parametrize(("given", "near"), [("q4km", "q4_k_m"), ("Q4_K_M", "q4_k_m"), ("int8", "known types")])
def test_unknown_type(given: str, near: str) -> None:
    with pytest.raises(ModelError, match=f"unknown GGUF type '{given}'") as raised:
        gguf_types.file_type(given)
    assert near in raised.value.hint
