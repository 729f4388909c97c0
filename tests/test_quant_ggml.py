"""Block quantizers and the choice of types, against closed formulas and llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from edgelora.errors import ModelError
from edgelora.export import gguf as export
from edgelora.gguf_header import read_header
from edgelora.quant import ggml, gguf_types
from edgelora.quant.ggml import Type
from tests.tiny_models import tiny_model

QUANTIZED = [name for name, kind in gguf_types.FILE_TYPES.items() if kind.base not in (Type.F32, Type.F16, Type.BF16)]
# What llama.cpp refuses to make of a model with rows of 256 when there is no importance matrix.
BY_IMPORTANCE = ["iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"]


def quiet(share: float, what: str) -> None:
    assert 0 <= share <= 1


def llama_quantize(
    source: Path, target: Path, name: str, importance: Mapping[str, np.ndarray] | None = None, by_hand: Sequence[str] = ()
) -> bool:
    """llama.cpp's own quantizer on a file; whether it made one."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf_types.FILE_TYPES[name].code
    params.nthread = 1
    if importance:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # ended by an entry without a name
        for entry, (tensor, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = tensor.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    if by_hand:
        types = (llama_cpp.llama_model_tensor_override * (len(by_hand) + 1))()  # ended the same way
        for entry, text in zip(types, by_hand, strict=False):
            pattern, _, kind = text.rpartition("=")
            entry.pattern, entry.type = pattern.encode(), Type[kind.upper()]
        params.tt_overrides = ctypes.cast(types, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    return llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor; gguf's own reader does not know all types."""
    data = path.read_bytes()
    return {t.name: (t.type, data[t.offset : t.offset + t.n_bytes]) for t in read_header(path).tensors}


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    mine, other = tensors(ours), tensors(theirs)
    assert {name: kind for name, (kind, _) in mine.items()} == {name: kind for name, (kind, _) in other.items()}
    assert [name for name in mine if mine[name] != other[name]] == []
    assert ours.stat().st_size == theirs.stat().st_size


def random_importance(source: Path) -> dict[str, np.ndarray]:
    """A mean for every column of every matrix that llama.cpp would find one for."""
    random = np.random.default_rng(1)
    rows = {t.name: t.shape[0] for t in read_header(source).tensors if t.name.startswith("blk.") and len(t.shape) == 2}
    return {name: random.exponential(size=columns).astype(np.float32) for name, columns in rows.items()}


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


@pytest.mark.parametrize("type", Type)
def test_zeros_stay_zero_and_sizes_hold(type: Type) -> None:
    packed = ggml.quantize(np.zeros((3, 512), dtype=np.float32), type, np.ones(512, dtype=np.float32))
    assert packed.shape == (3, ggml.row_bytes(type, 512))
    assert not ggml.dequantize(packed, type).any()


@pytest.mark.parametrize("type", Type)
def test_types_are_ggmls(type: Type) -> None:
    traits = ggml._library().ggml_get_type_traits(type).contents
    assert traits.type_name.decode().upper() == type.name
    assert ggml.block_size(type) == traits.blck_size
    assert ggml.row_bytes(type, 512) * traits.blck_size == 512 * traits.type_size


@pytest.mark.parametrize("type", [Type.F16, Type.Q8_0, Type.Q4_1, Type.Q5_K, Type.IQ4_XS, Type.TQ1_0, Type.MXFP4])
def test_dequantized_values_are_those_of_gguf(type: Type) -> None:
    packed = ggml.quantize(np.random.default_rng(0).standard_normal((3, 512), dtype=np.float32), type)
    expected = packed.view(np.float16).astype(np.float32) if type == Type.F16 else gguf.quants.dequantize(packed, type)
    np.testing.assert_allclose(ggml.dequantize(packed, type), expected, rtol=1e-6)


@pytest.mark.parametrize("type", Type)
def test_which_quantizers_look_at_the_importance(type: Type) -> None:
    values = np.random.default_rng(0).standard_normal((4, 256), dtype=np.float32)
    flat, steep = np.ones(256, dtype=np.float32), np.geomspace(1e-3, 1e3, 256, dtype=np.float32)
    same = np.array_equal(ggml.quantize(values, type, flat), ggml.quantize(values, type, steep))
    assert same == (type in ggml.UNWEIGHTED)


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
    "blocks of 256": {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2},
    "blocks of 32": {"hidden_size": 96, "intermediate_size": 160, "tie_word_embeddings": False},
    "odd rows": {"hidden_size": 48, "intermediate_size": 256, "num_key_value_heads": 4},
}


@pytest.fixture(scope="module")
def f16_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files = {}
    for shape, changes in SHAPES.items():
        folder = tiny_model("llama", tmp_path_factory.mktemp("shape"), num_hidden_layers=1, **changes)
        files[shape] = export.write(folder, "f16", folder, "tiny", quiet)
    return files


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_tensor_has_the_type_and_bytes_of_llama_quantize(name: str, shape: str, f16_files: dict[str, Path], tmp_path: Path) -> None:
    source = f16_files[shape]
    if not llama_quantize(source, tmp_path / "theirs.gguf", name):
        with pytest.raises(ModelError, match=r"without an importance matrix is noise|not a multiple of q1_0's blocks of 128"):
            export.write(source.parent, name, tmp_path, "tiny", quiet)
        assert name in BY_IMPORTANCE or (name, shape) in (("q1_0", "blocks of 32"), ("q1_0", "odd rows"))
        return
    assert name not in BY_IMPORTANCE or shape != "blocks of 256"
    assert_same_tensors(export.write(source.parent, name, tmp_path, "tiny", quiet), tmp_path / "theirs.gguf")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_importance_matrix_gives_the_bytes_of_llama_quantize(name: str, shape: str, f16_files: dict[str, Path], tmp_path: Path) -> None:
    source = f16_files[shape]
    importance = random_importance(source)
    if not llama_quantize(source, tmp_path / "theirs.gguf", name, importance):
        assert (name, shape) in (("q1_0", "blocks of 32"), ("q1_0", "odd rows"))
        return
    ours = export.write(source.parent, name, tmp_path, "tiny", quiet, importance)
    assert_same_tensors(ours, tmp_path / "theirs.gguf")
    assert export.predict_bytes(source.parent, name, "tiny", importance) == ours.stat().st_size


@pytest.mark.parametrize(
    "by_hand",
    [
        ["ffn_down=q6_k"],
        ["attn_[qk]=iq3_s", "attn=q8_0"],  # of several the first counts
        [r"blk\.0\.ffn=mxfp4", "token_embd=q4_0"],
        ["ATTN_V=nvfp4", "attn_output=bf16", "ffn_gate=f32"],
        ["ffn_up=q2_0", "ffn_gate=iq1_s", "attn_q=iq2_xxs"],
    ],
    ids=" ".join,
)
def test_types_by_hand_are_those_of_llama_quantize(by_hand: list[str], f16_files: dict[str, Path], tmp_path: Path) -> None:
    source = f16_files["blocks of 256"]
    importance = random_importance(source)
    lower = [entry.lower() for entry in by_hand]  # llama-quantize lowers a pattern before it hands it over
    assert llama_quantize(source, tmp_path / "theirs.gguf", "q4_k_m", importance, lower)
    ours = export.write(source.parent, "q4_k_m", tmp_path, "tiny", quiet, importance, by_hand)
    assert_same_tensors(ours, tmp_path / "theirs.gguf")
    assert export.predict_bytes(source.parent, "q4_k_m", "tiny", importance, by_hand) == ours.stat().st_size


@pytest.mark.parametrize(
    ("by_hand", "message", "hint"),
    [
        (["ffn_down"], "tensor type 'ffn_down' is not PATTERN=TYPE", "for instance ffn_down=q6_k"),
        (["ffn_down=q6k"], "unknown type 'q6k'", "q6_k"),
        (
            ["ffn_dwn=q6_k"],
            "'ffn_dwn=q6_k' matches no matrix of this model",
            "its matrices: token_embd, attn_q, attn_k, attn_v, attn_output, ffn_",
        ),
        (["attn_norm=q6_k"], "matches no matrix", "ffn_down"),
        (["ffn=q8_0", "ffn_down=q6_k"], "'ffn_down=q6_k' changes nothing: earlier entries took all", "before"),
        (["ffn_(=q8_0"], "the pattern is no regular expression", "for instance"),
    ],
)
def test_a_type_by_hand_that_has_no_effect_is_an_error(by_hand: list[str], message: str, hint: str, f16_files: dict[str, Path]) -> None:
    with pytest.raises(ModelError) as raised:
        export.predict_bytes(f16_files["blocks of 256"].parent, "q4_k_m", "tiny", None, by_hand)
    assert message in raised.value.message
    assert hint in raised.value.hint


def test_noise_is_refused_when_it_is_planned(f16_files: dict[str, Path]) -> None:
    """So a run stops before it trains. An empty importance matrix stands for one that will be measured."""
    model = f16_files["blocks of 256"].parent
    with pytest.raises(ModelError, match=r"iq2_xs without an importance matrix is noise \(blk\.0\.attn_q\.weight would be IQ2_XS\)"):
        export.predict_bytes(model, "iq2_xs", "tiny")
    assert export.predict_bytes(model, "iq2_xs", "tiny", {}) > 0


def test_importance_of_another_model_is_refused(f16_files: dict[str, Path], tmp_path: Path) -> None:
    other = random_importance(f16_files["blocks of 32"])
    with pytest.raises(ModelError, match=r"is of another model: its blk\.0\.attn_q\.weight has 96 columns"):
        export.write(f16_files["blocks of 256"].parent, "q4_0", tmp_path, "tiny", quiet, other)


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
    source, target = tmp_path / "f16.gguf", tmp_path / "theirs.gguf"
    random = random_importance(source)
    for name in ("q4_k_m", "q3_k_m", "q3_k_s", "iq2_m", "iq3_s") if shape.layers == 80 else QUANTIZED:
        for importance in ({}, random):
            if llama_quantize(source, target, name, importance):
                theirs = {key: kind for key, (kind, _) in tensors(target).items()}
                plan = gguf_types.plan(shapes, name, shape, bool(importance))
                assert {key: choice.type.name for key, choice in plan.items()} == theirs, name
            else:
                assert name == "q1_0" or (name in BY_IMPORTANCE and not importance)


def test_fallbacks_are_visible() -> None:
    shapes = {"token_embd.weight": (1000, 576), "blk.0.attn_q.weight": (576, 576), "blk.0.attn_norm.weight": (576,)}
    plan = gguf_types.plan(shapes, "q4_k_m", gguf_types.Shape(30, 9, 3, "llama"))
    assert plan["blk.0.attn_q.weight"] == gguf_types.Choice(type=Type.Q5_0, wanted=Type.Q4_K)
    assert plan["token_embd.weight"] == gguf_types.Choice(type=Type.Q8_0, wanted=Type.Q8_0)
    assert plan["blk.0.attn_norm.weight"].type == Type.F32


@pytest.mark.parametrize(
    ("given", "near"),
    [("q4km", "q4_k_m"), ("Q4_K_M", "q4_k_m"), ("int8", "known types"), ("mxfp4_moe", "models of experts"), ("nvfp4", "single tensors")],
)
def test_unknown_type(given: str, near: str) -> None:
    with pytest.raises(ModelError, match=f"GGUF type '{given}'") as raised:
        gguf_types.file_type(given)
    assert near in raised.value.hint
