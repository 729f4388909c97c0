"""GGUF files as bases: read and written again they are what they were, and what cannot be carried over is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from edgelora import models, preflight
from edgelora.errors import ModelError
from edgelora.export import gguf as export
from edgelora.export.verify import PROBES
from tests.gguf_files import rewritten
from tests.line import edgelora, write_recipe
from tests.test_gguf_export import VARIANTS, quiet
from tests.tiny_models import ARCHITECTURES, tiny_model

KINDS: dict[str, tuple[str, dict[str, Any]]] = {arch: (arch, {}) for arch in ARCHITECTURES} | VARIANTS


def written(folder: Path, kind: str, type: str = "f16") -> Path:
    arch, changes = KINDS[kind]
    return export.write(tiny_model(arch, folder / "born", **changes), type, folder, "tiny", quiet)


@pytest.mark.parametrize("type", ["f16", "f32"])
@pytest.mark.parametrize("kind", KINDS)
def test_read_and_written_again_it_is_the_same_file(kind: str, type: str, tmp_path: Path) -> None:
    file = written(tmp_path, kind, type)
    base = models.open_base(str(file), Path(), tmp_path / "out")
    (tmp_path / "again").mkdir()
    assert export.write(base.folder, type, tmp_path / "again", "tiny", quiet).read_bytes() == file.read_bytes()
    preflight.token_parity(models.open_tokenizer(base.folder), file, list(PROBES))


@pytest.mark.parametrize("type", ["q8_0", "q4_1", "bf16"])
def test_weights_are_those_that_transformers_reads(type: str, tmp_path: Path) -> None:
    file = written(tmp_path, "llama", type)
    found = load_file(models.open_base(str(file), Path(), tmp_path / "out").folder / "model.safetensors")
    how = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **how).state_dict()
    assert expected.keys() - found.keys() == {"lm_head.weight"}  # tied
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


def test_a_base_in_16_bits_walks_from_training_to_its_own_type(tmp_path: Path) -> None:
    file = written(tmp_path, "qwen3")
    write_recipe(tmp_path, file.name)
    made = edgelora("finetune", "tiny.yaml", "--out", "made", "--json", cwd=tmp_path).document
    line = ("export", file.name, "--adapter", made["adapter"], "--format", "gguf", "--type", "f16", "--base", "nf4", "--threads", 1)
    done = edgelora(*line, "--out", "made", "--json", cwd=tmp_path).document
    assert done["kl"] < 1e-3
    theirs, ours = ({tensor.name: tensor.data for tensor in gguf.GGUFReader(f).tensors} for f in (file, tmp_path / done["path"]))
    assert ours.keys() == theirs.keys()
    changed = {name.split(".")[-2] for name in ours if not np.array_equal(ours[name], theirs[name])}
    assert changed == {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}


def test_what_a_file_does_not_say_is_what_llama_cpp_takes(tmp_path: Path) -> None:
    """Gemma 3's files say nothing of which layers slide, and older ones nothing of how those rotate (llama.cpp, src/models/gemma3.cpp)."""
    file = written(tmp_path, "gemma3_text")
    unsaid = dict.fromkeys(("gemma3.attention.sliding_window_pattern", "gemma3.rope.freq_base_swa"))
    older = rewritten(file, tmp_path / "older.gguf", unsaid)
    configs = [models.config(models.open_base(str(f), Path(), tmp_path / f.stem).folder) for f in (older, file)]
    assert "full_attention" in configs[0]["layer_types"]
    for key in ("layer_types", "rope_parameters"):
        assert configs[0][key] == configs[1][key]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind of tokenizer": ({"tokenizer.ggml.model": "bert"}, "a tokenizer of kind 'bert' is not known"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "bloom"}, "its pre-tokenizer 'bloom' is not known"),
    "heads": ({"llama.attention.head_count": 8}, "has the shape"),
    "no head": ({"llama.attention.head_count": 0}, "cannot be read as a base"),
    "layers": ({"llama.block_count": 4}, "model.layers.3"),
    "rotation": ({"llama.rope.dimension_count": 8}, "rope.dimension_count = 8 cannot be carried over"),
    "huge": ({"llama.embedding_length": 1 << 31}, "has the shape"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_carried_over_is_refused(what: str, tmp_path: Path) -> None:
    change, message = REFUSED[what]
    file = rewritten(written(tmp_path, "llama"), tmp_path / "changed.gguf", change)
    with pytest.raises(ModelError, match=message):
        models.open_base(str(file), Path(), tmp_path / "out")
    assert not list((tmp_path / "out").glob("base-*"))


def test_damaged_headers_end_in_a_clear_error(tmp_path: Path) -> None:
    file, chance = written(tmp_path, "gemma3_text", "q8_0"), random.Random(3)
    good, told = file.read_bytes(), []
    for number in range(40):
        damaged = bytearray(good)
        for _ in range(chance.choice((1, 1, 3))):
            at = chance.randrange(24, 30_000)  # the keys and the tokenizer
            damaged[at] = chance.choice((0, 255, damaged[at] ^ 1, damaged[at] ^ 128))
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            models.open_base(str(tmp_path / "damaged.gguf"), Path(), tmp_path / str(number))
        except ModelError as error:
            told.append((error.message, error.hint))
    assert len(told) > 10
    assert all("damaged" in message and hint for message, hint in told)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "llama")
    said = b"\x05" + bytes(7)  # the length of the string
    assert said + b"llama" in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(said + b"llama", said + b"mamba", 1))
    with pytest.raises(ModelError, match="the GGUF architecture 'mamba' is not known") as caught:
        models.open_base(str(file), Path(), tmp_path / "out")
    assert caught.value.hint == "known: llama, qwen2, qwen3, smollm3, phi3, gemma3; or use the model's safetensors as base"


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "biases")
    lacking = rewritten(file, tmp_path / "changed.gguf", {}, lambda name, data: None if name == "blk.0.attn_q.bias" else data)
    with pytest.raises(ModelError, match="has the shape"):
        models.open_base(str(lacking), Path(), tmp_path / "out")
