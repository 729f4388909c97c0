"""The converter against llama.cpp's own, and every mistake that converters make against torch: it must be seen.

The models are tiny and say something (tests/tiny_models.py), so a wrong rotation or norm moves what they predict.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from edgelora import models
from edgelora.export import gguf as export
from tests.gguf_files import rewritten
from tests.line import ROOT
from tests.test_gguf_export import VARIANTS, kl, llama_scores, quiet, token_ids, torch_scores, vocabulary
from tests.tiny_models import ARCHITECTURES, tiny_model

Change = tuple[dict[str, Any], Callable[[str, np.ndarray], np.ndarray | None] | None]
UNMISTAKABLE = 1e-2  # nats a token; a right file is below 1e-4


class Model:
    """A tiny model, its F16 file and its scores by torch."""

    def __init__(self, folder: Path, arch: str, **changes: Any) -> None:
        self.folder = tiny_model(arch, folder, **changes)
        self.file = export.write(self.folder, "f16", folder, "tiny", quiet)
        self.arch = gguf.GGUFReader(self.file).fields["general.architecture"].contents()
        self.ids = token_ids(vocabulary(self.folder))
        self.scores = torch_scores(self.folder, self.ids)

    def kl_when(self, metadata: dict[str, Any], weights: Callable[[str, np.ndarray], np.ndarray | None] | None = None) -> float:
        """KL of the file with these keys (below the architecture's name) and weights changed."""
        changed = {f"{self.arch}.{key}": value for key, value in metadata.items()}
        return kl(self.scores, llama_scores(rewritten(self.file, self.folder / "wrong.gguf", changed, weights), self.ids))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    made: dict[str, Model] = {}

    def get(arch: str, variant: str = "", **changes: Any) -> Model:
        name = f"{arch} {variant}".strip()
        if name not in made:
            made[name] = Model(tmp_path_factory.mktemp("model"), arch, **changes)
        return made[name]

    return get


Get = Callable[..., Model]


@pytest.mark.parametrize("arch", ["llama", "mistral", "smollm3"])
def test_unpermuted_queries_and_keys(arch: str, model: Get) -> None:
    def plain(name: str, data: np.ndarray) -> np.ndarray:
        heads = {"attn_q.weight": 4, "attn_k.weight": 2}.get(name.partition(".")[2].partition(".")[2])
        return data if heads is None else data.reshape(heads, -1, 2, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)

    assert model(arch).kl_when({}, plain) > UNMISTAKABLE


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_wrong_rope_theta(arch: str, model: Get) -> None:
    theta = gguf.GGUFReader(model(arch).file).fields[f"{model(arch).arch}.rope.freq_base"].contents()
    assert model(arch).kl_when({"rope.freq_base": theta / 4}) > UNMISTAKABLE


def test_a_wrong_theta_of_the_sliding_layers(model: Get) -> None:
    assert model("gemma3_text").kl_when({"rope.freq_base_swa": 2500.0}) > UNMISTAKABLE


@pytest.mark.parametrize("variant", ["linear rope", "yarn", "linear gemma"])
def test_a_wrong_rope_scaling(variant: str, model: Get) -> None:
    arch, changes = VARIANTS[variant]
    assert model(arch, variant, **changes).kl_when({"rope.scaling.factor": 1.0}) > UNMISTAKABLE


def test_missing_rope_factors(model: Get) -> None:
    arch, changes = VARIANTS["llama3 rope"]
    assert model(arch, "llama3 rope", **changes).kl_when({}, lambda n, d: None if n == "rope_freqs.weight" else d) > UNMISTAKABLE


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_wrong_norm_eps(arch: str, model: Get) -> None:
    wide = model(arch, "wide eps", rms_norm_eps=1.0 if arch == "gemma3_text" else 0.1)
    assert wide.kl_when({}) < 1e-4
    assert wide.kl_when({"attention.layer_norm_rms_epsilon": 1e-5}) > UNMISTAKABLE


@pytest.mark.parametrize("bias", ["attn_q.bias", "attn_k.bias", "attn_v.bias"])
def test_a_missing_bias(bias: str, model: Get) -> None:
    assert model("qwen2").kl_when({}, lambda n, d: np.zeros_like(d) if n.endswith(bias) else d) > UNMISTAKABLE


@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("norm", ["attn_q_norm.weight", "attn_k_norm.weight"])
def test_a_missing_qk_norm(arch: str, norm: str, model: Get) -> None:
    assert model(arch).kl_when({}, lambda n, d: np.ones_like(d) if n.endswith(norm) else d) > UNMISTAKABLE


@pytest.mark.parametrize("window", [4, 16, 48])
def test_a_wrong_sliding_window(window: int, model: Get) -> None:
    assert model("gemma3_text").kl_when({"attention.sliding_window": window}) > UNMISTAKABLE


def test_the_wrong_layers_slide(model: Get) -> None:
    layers = gguf.GGUFReader(model("gemma3_text").file).fields["gemma3.attention.sliding_window_pattern"].contents()
    assert model("gemma3_text").kl_when({"attention.sliding_window_pattern": [*layers[1:], layers[0]]}) > UNMISTAKABLE


@pytest.mark.parametrize("arch", ["mistral", "phi3"])
def test_a_head_that_is_lost(arch: str, model: Get) -> None:
    """Without output.weight llama.cpp takes the embedding."""
    assert model(arch).kl_when({}, lambda n, d: None if n == "output.weight" else d) > UNMISTAKABLE


# ---- llama.cpp's own converter ----

# What the oracle names by its own taste; the other keys are equal, and ours say some defaults aloud that the oracle leaves out.
TASTE = {"general.name", "general.size_label"}
# Of a SentencePiece tokenizer without SentencePiece's file the oracle writes no scores (all -1000), with which llama.cpp
# would split text otherwise than the model was trained; ours come from the merges, and ids are equal (test_gguf_export.py).
WITHOUT_SCORES = {"tokenizer.ggml.scores", "tokenizer.ggml.token_type"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensors_and_keys_are_those_of_llama_cpps_converter(arch: str, llama_cpp_sources: Path, tmp_path: Path) -> None:
    # In bfloat16: the oracle adds Gemma's one to a norm in the type it is stored in, and in float16 that rounds it (by 5e-4).
    model = tiny_model(arch, tmp_path / "tiny", dtype=torch.bfloat16)
    ours = gguf.GGUFReader(export.write(model, "f16", tmp_path, "tiny", quiet))
    command = [sys.executable, ROOT / "tests" / "llama_cpp_converter.py", llama_cpp_sources, model, tmp_path / "theirs.gguf"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    theirs = gguf.GGUFReader(tmp_path / "theirs.gguf")
    found, wanted = ({t.name: (t.tensor_type, t.data.tobytes()) for t in reader.tensors} for reader in (ours, theirs))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    keys = theirs.fields.keys() - TASTE - (WITHOUT_SCORES if arch == "mistral" else set())
    assert "tokenizer.ggml.tokens" in keys or arch in ("phi3", "gemma3_text")
    for key in (key for key in keys if not key.startswith("GGUF.")):
        assert (key, ours.fields[key].contents()) == (key, theirs.fields[key].contents())
        assert ours.fields[key].types == theirs.fields[key].types
    if "tokenizer.ggml.tokens" in keys:  # without one it is no base
        (tmp_path / "again").mkdir()
        base = models.open_base(str(tmp_path / "theirs.gguf"), Path(), tmp_path / "out")
        again = gguf.GGUFReader(export.write(base.folder, "f16", tmp_path / "again", "tiny", quiet))
        assert {t.name: (t.tensor_type, t.data.tobytes()) for t in again.tensors} == wanted
