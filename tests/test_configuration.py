"""config.json read without transformers says what transformers reads in it: complete, with anything left out, and in older forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from edgelora.errors import ModelError
from edgelora.export import architectures, configuration, rotation
from tests.test_gguf_export import VARIANTS
from tests.tiny_models import ARCHITECTURES, tiny_config

NEVER_LEFT_OUT = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
BESIDE = ("hidden_act", "sliding_window", "max_position_embeddings", "rope_parameters")  # what formats other than GGUF look at


def said(config: Any) -> Any:
    """What a file would say of a model with this configuration, or why there is none."""
    architecture = architectures.of(config.model_type)
    try:
        vectors = {name: values.tolist() for name, values in architecture.vectors(config).items()}
        return architecture.metadata(config), architecture.tensors(config), vectors
    except ModelError as error:
        return error.message.partition("(")[0]  # after it settings, in any order


def compare(folder: Path, values: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    ours, theirs = configuration.of(folder), AutoConfig.from_pretrained(folder, local_files_only=True)
    assert said(ours) == said(theirs)
    assert rotation.head_dim(ours) == rotation.head_dim(theirs)
    assert {key: getattr(ours, key, None) for key in BESIDE} == {key: getattr(theirs, key, None) for key in BESIDE}


def saved(arch: str, folder: Path, **changes: Any) -> dict[str, Any]:
    tiny_config(arch, **changes).save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_whatever_is_left_out_is_filled_in(arch: str, tmp_path: Path) -> None:
    values = saved(arch, tmp_path)
    compare(tmp_path, values)
    for key in values.keys() - NEVER_LEFT_OUT:
        compare(tmp_path, {name: value for name, value in values.items() if name != key})
    compare(tmp_path, {key: values[key] for key in NEVER_LEFT_OUT})


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path) -> None:
    arch, changes = VARIANTS[variant]
    compare(tmp_path, saved(arch, tmp_path, **changes))


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
# As transformers 4 wrote it, and as files of the hub still say it.
OLDER: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "max_position_embeddings": 131072}),
    ("llama", {"rope_theta": 10000, "rope_scaling": None, "num_key_value_heads": None, "head_dim": None}),
    ("llama", {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("mistral", {"rope_theta": 1e6, "sliding_window": None}),
    ("mistral", {"rope_theta": 1e4, "sliding_window": 64, "max_position_embeddings": 128}),
    ("qwen2", {"rope_theta": 1e6, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    ("qwen3", {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}}),
    ("smollm3", {"rope_theta": 5e6, "no_rope_layers": None, "no_rope_layer_interval": 4}),
    ("smollm3", {"rope_theta": 5e6, "no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("phi3", {"rope_theta": 10000.0, "rope_scaling": {"type": "longrope", **FACTORS}, "max_position_embeddings": 8192}),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, "partial_rotary_factor": 0.5}),
    ("gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 10000, "sliding_window_pattern": 6, "layer_types": None}),
    ("gemma3_text", {"rope_theta": 2e6, "rope_local_base_freq": 5000.0, "sliding_window_pattern": 2, "layer_types": None}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 30.0}),
]


@pytest.mark.parametrize(("arch", "written"), OLDER)
def test_older_forms(arch: str, written: dict[str, Any], tmp_path: Path) -> None:
    values = saved(arch, tmp_path)
    del values["rope_parameters"]
    compare(tmp_path, values | written)


@pytest.mark.parametrize(
    ("arch", "written", "message"),
    [
        ("llama", {"num_hidden_layers": "x"}, "num_hidden_layers is 'x'"),
        ("llama", {"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("llama", {"num_hidden_layers": 10**9}, "1000000000 layers"),
        ("smollm3", {"num_hidden_layers": 10**9, "no_rope_layers": None}, "1000000000 layers"),
        ("llama", {"hidden_size": None}, "it says no hidden_size"),
        ("llama", {"vocab_size": -1}, "vocab_size is -1"),
        ("llama", {"num_attention_heads": 100, "head_dim": None}, "head_dim is 0"),
        ("llama", {"max_position_embeddings": None}, "it says no max_position_embeddings"),
        ("llama", {"max_position_embeddings": 10**20}, "max_position_embeddings is 1000"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act is ['silu']"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters is [1]"),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "it says no factor"),
        ("llama", {"rope_parameters": {"rope_type": ["linear"]}}, None),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "it says no low_freq_factor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": None}}, "it says no partial_rotary_factor"),
        ("phi3", {"rope_scaling": {"type": "longrope", **FACTORS, "long_factor": [1.0]}}, "long_factor of its rotation is not 8 numbers"),
        ("phi3", {"rope_scaling": {"type": "longrope", **FACTORS, "long_factor": [None] * 8}}, "it says no factor"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types speaks of 1 layers, it has 7"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "rope_parameters is 3"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        (["llama"], {}, "does not know the architecture"),
    ],
)
def test_what_cannot_be(arch: Any, written: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    values = saved(arch if isinstance(arch, str) else "llama", tmp_path) | {"model_type": arch} | written
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError) as raised:
        architectures.of("llama").metadata(configuration.of(tmp_path))
    assert message is None or message in raised.value.message


def test_llama3_scaling_is_that_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=128, rope_parameters={**LLAMA3, "rope_theta": 500000.0}, max_position_embeddings=131072)
    factors = rotation.llama3_factors(config)["rope_freqs.weight"]
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    assert np.allclose(plain / factors, ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")[0].numpy(), rtol=1e-6)
    assert set(factors[:1]) == {1.0}
    assert set(factors[-1:]) == {32.0}
