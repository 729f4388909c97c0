"""The importance matrix: measured on training rows, against a plain computation, and as llama.cpp reads it."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgelora import artifact
from edgelora import recipe as recipes
from edgelora.data.chat import Encoded
from edgelora.data.row import Row
from edgelora.data.split import Dataset
from edgelora.errors import ModelError
from edgelora.export import gguf as export
from edgelora.quant import importance
from tests.test_quant_ggml import assert_same_tensors, llama_quantize, quiet
from tests.tiny_models import ARCHITECTURES, tiny_model

ROWS = [Encoded(tuple(range(5, 5 + n)), tuple(i >= n // 2 for i in range(n))) for n in (30, 11, 57)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sums_are_those_of_a_plain_forward_pass(arch: str, tmp_path: Path) -> None:
    """Row by row, in float32, every position weighed by hand: no padding, no batches, no bfloat16 weights."""
    folder = tiny_model(arch, tmp_path, dtype=torch.bfloat16)
    opened = importance.open_model(folder)
    before = {name: weight.clone() for name, weight in opened.named_parameters()}
    sums = importance.collect(opened, ROWS, 4, quiet)

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0]}))
    expected: dict[str, np.ndarray] = {}
    for row in ROWS:
        plain(torch.tensor([row.ids]))
        weight = np.where(row.trained, 4.0, 1.0)
        for name, inputs in seen.items():
            expected[name] = expected.get(name, 0) + weight @ inputs[0].detach().double().numpy() ** 2

    from edgelora.export import architectures

    sources = architectures.of(arch).tensors(plain.config)
    head = "output.weight" if "output.weight" in sources else "token_embd.weight"
    assert set(sums.squares) == {n for n, s in sources.items() if s.name.removesuffix(".weight") in expected and n.startswith("blk")} | {
        head
    }
    assert sums.weight == sum(len(row.ids) + 3 * row.n_trained for row in ROWS)
    for name, squares in sums.squares.items():
        module = "lm_head" if name == head else sources[name].name.removesuffix(".weight")
        np.testing.assert_allclose(squares, expected[module], rtol=1e-4, err_msg=name)
    assert all(torch.equal(weight, before[name]) and weight.dtype == torch.bfloat16 for name, weight in opened.named_parameters())


def test_llama_quantize_reads_the_file_and_makes_our_bytes(tmp_path: Path) -> None:
    """The means as llama-quantize computes them from the file (tools/quantize, load_imatrix), handed to its library."""
    folder = tiny_model("llama", tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=1, dtype=torch.bfloat16)
    file = tmp_path / "imatrix.gguf"
    importance.write(file, importance.collect(importance.open_model(folder), ROWS, 4, quiet), "llama")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    means = {
        name.removesuffix(".in_sum2"): (sums / np.float32(round(float(stored[name.replace("in_sum2", "counts")][0, 0])))).reshape(-1)
        for name, sums in stored.items()
        if name.endswith(".in_sum2")
    }
    source = export.write(folder, "f16", tmp_path, "tiny", quiet)
    for name in ("q4_k_m", "iq2_xs"):
        assert llama_quantize(source, tmp_path / "theirs.gguf", name, means)
        assert_same_tensors(export.write(folder, name, tmp_path, "tiny", quiet, importance.read(file)), tmp_path / "theirs.gguf")
    fields = gguf.GGUFReader(file).fields
    assert fields["general.type"].contents() == "imatrix"
    assert {"imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"} <= set(fields)  # llama-quantize wants all three


def dataset(n: int) -> Dataset:
    train = tuple(Row((("user", f"question {i}?"), ("assistant", f"answer {i}")), i) for i in range(n))
    return Dataset(train, train[:1], {"sealed": train[:1]}, (), ("question", "answer"))


def test_the_stage_reads_train_rows_once(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "model")
    section = recipes.Importance(rows=8)
    made = importance.measure(folder, "key", section, dataset(40), 512, tmp_path, quiet)
    assert made.rows == {"train": "train"}
    assert made.facts["rows"] == 8
    assert made.facts["answer_tokens"] < made.facts["tokens"]
    assert (
        artifact.measured_on(tmp_path, "importance", "key")
        == importance.measure(folder, "key", section, dataset(40), 512, tmp_path, quiet)
        == made
    )
    assert artifact.measured_on(tmp_path, "importance", "another") is None
    assert str(tmp_path) not in (made.path / importance.FILE).read_bytes().decode("latin-1")
    more = importance.measure(folder, "key", recipes.Importance(rows=9), dataset(40), 512, tmp_path, quiet)
    assert more.path != made.path


def test_an_adapter_counts(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    tuned = get_peft_model(importance.open_model(folder), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    plain = importance.collect(importance.open_model(folder), ROWS, 1, quiet)
    changed = importance.collect(importance.open_model(folder, tmp_path / "adapter"), ROWS, 1, quiet)
    assert np.array_equal(plain.squares["blk.0.attn_q.weight"], changed.squares["blk.0.attn_q.weight"])  # before any adapter
    assert not np.allclose(plain.squares["blk.0.ffn_down.weight"], changed.squares["blk.0.ffn_down.weight"], rtol=0.01)


def test_rows_are_spread_over_the_whole_set() -> None:
    assert importance.spread(range(100), 4) == [0, 25, 50, 75]
    assert importance.spread(range(3), 4) == [0, 1, 2]


def test_a_model_that_computes_nan_is_named(tmp_path: Path) -> None:
    opened = importance.open_model(tiny_model("llama", tmp_path))
    with torch.no_grad():
        opened.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"the inputs of blk\.1\.ffn_down\.weight are NaN"):
        importance.collect(opened, ROWS, 1, quiet)


def matrix_file(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ONES = np.ones((1, 32), dtype=np.float32)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"x": ONES}, "it holds no tensor NAME.in_sum2"),
        ({"a.in_sum2": ONES}, "a has no counts"),
        ({"a.in_sum2": ONES.astype(np.float16), "a.counts": ONES[:, :1]}, "not in float32"),
        ({"a.in_sum2": ONES * np.nan, "a.counts": ONES[:, :1]}, "a holds NaN"),
        ({"a.in_sum2": -ONES, "a.counts": ONES[:, :1]}, "negative"),
        ({"a.in_sum2": ONES, "a.counts": ONES[:, :2]}, "a is a matrix of experts"),
    ],
)
def test_a_file_that_is_no_importance_matrix(tensors: dict[str, np.ndarray], why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        importance.read(matrix_file(tmp_path / "x.gguf", tensors))


def test_a_matrix_that_saw_nothing_is_flat_as_llama_quantize_reads_it(tmp_path: Path) -> None:
    file = matrix_file(tmp_path / "x.gguf", {"a.in_sum2": 0 * ONES, "a.counts": 0 * ONES[:, :1]})
    assert np.array_equal(importance.read(file)["a"], np.ones(32))


def test_a_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 1))
    with pytest.raises(ModelError):
        importance.read(file)
