"""Every kind of adapter: the merged model is the adapted model, in torch and in llama.cpp; LoRA+ has two rates; wrong wishes are told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgelora import artifact, models, tuned, weights
from edgelora import recipe as recipes
from edgelora.errors import ModelError, RecipeError
from edgelora.export import gguf
from edgelora.train import adapter, load, pissa
from tests.line import edgelora, finished_folders, write_recipe
from tests.test_gguf_export import kl, llama_scores, token_ids, vocabulary
from tests.tiny_models import ARCHITECTURES, tiny_model

VARIANTS = ("plain", "rslora", "dora", "pissa")
Adapted = tuple[models.Base, Path]


@pytest.fixture
def adapted(tmp_path: Path) -> Callable[..., Adapted]:
    """A base as training begins on it, and the adapter of a variant after weights that are not those it began with."""

    def make(arch: str, variant: str) -> Adapted:
        folder = tiny_model(arch, tmp_path / arch)
        train = recipes.Train(variant=variant, r=4, alpha=12)  # type: ignore[arg-type]
        base = pissa.start(train, models.Base(folder, "key", arch), tmp_path / "out", lambda share, text: None)
        model = adapter.attach(load.load_base(base.folder, "lora", torch.float32), train, base.start)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return base, tmp_path / "adapter"

    return make


def scores(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model.eval()(torch.tensor([ids])).logits[0].double(), -1)


@pytest.mark.parametrize("into", ["16bit", "nf4"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_merged_model_is_the_adapted_one(adapted: Callable[..., Adapted], arch: str, variant: str, into: str) -> None:
    base, folder = adapted(arch, variant)
    ids = token_ids(vocabulary(base.folder))
    plain = load.load_base(base.folder, "qlora" if into == "nf4" else "lora", torch.float32)
    without = scores(plain, ids)
    expected = scores(PeftModel.from_pretrained(plain, folder), ids)
    merged = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    source = weights.Merged(base.folder, folder, into)
    state = {name: torch.from_numpy(source.rows(name).reshape(shape)) for name, shape in source.shapes.items()}
    assert not merged.load_state_dict(state, strict=False).unexpected_keys
    found = scores(merged, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert (without - expected).abs().max() > 0.1  # the adapter says something


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_runs_what_was_adapted(adapted: Callable[..., Adapted], variant: str, tmp_path: Path) -> None:
    base, folder = adapted("llama", variant)
    (tmp_path / "made").mkdir()
    made = tuned.Tuned(base.folder, "key", adapter=folder, held="nf4").describe(tmp_path / "made")
    ids = token_ids(vocabulary(made))
    expected = scores(PeftModel.from_pretrained(load.load_base(base.folder, "qlora", torch.float32), folder), ids)
    merged = weights.Merged(base.folder, folder, "nf4")
    file = gguf.write(made, "f16", tmp_path, "tiny", lambda share, what: None, weights=merged)
    assert kl(expected, llama_scores(file, ids)) < 1e-4


def test_pissa_begins_as_the_base_with_its_largest_part_taken_out(adapted: Callable[..., Adapted], tmp_path: Path) -> None:
    base, _ = adapted("llama", "pissa")
    assert base.start is not None
    own, rest = (load_file(folder / "model.safetensors") for folder in (tmp_path / "llama", base.folder))
    low = load_file(base.start / "adapter_model.safetensors")
    for name, matrix in own.items():
        if not name.endswith("_proj.weight"):
            torch.testing.assert_close(rest[name].float(), matrix.float(), rtol=1 / 256, atol=0)  # the same in bf16
            continue
        a, b = (low[f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight"] for half in "AB")
        part = 12 / 4 * b @ a
        torch.testing.assert_close(rest[name].float() + part, matrix.float(), rtol=0, atol=4e-3)
        singular = torch.linalg.svdvals(matrix.float())
        torch.testing.assert_close(torch.linalg.svdvals(part)[:4], singular[:4], rtol=1e-3, atol=0)
        torch.testing.assert_close(torch.linalg.norm(matrix.float() - part), singular[4:].norm(), rtol=1e-3, atol=0)
    model = adapter.attach(load.load_base(base.folder, "lora", torch.float32), recipes.Train(variant="pissa", r=4, alpha=12), base.start)
    ids = token_ids(vocabulary(base.folder))
    assert kl(scores(load.load_base(tmp_path / "llama", "lora", torch.float32), ids), scores(model, ids)) < 0.01  # of bf16


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_walks_from_training_to_the_merge(variant: str, tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    settings = ("--recipe", "tiny.yaml", "--set", f"train.variant={variant}", "--set", "train.lora_plus=4")
    made = edgelora("finetune", settings[1], *settings[2:], "--json", cwd=tmp_path).document
    assert made["curve"][-1]["loss"] < made["curve"][0]["loss"]
    merged = edgelora("merge", made["adapter"], *settings, "--json", cwd=tmp_path).document
    near = {row["base"]: row["kl"] for row in merged["candidates"]}
    assert 0 <= near["nf4"] < 1e-6 < near["16bit"]
    config = json.loads((tmp_path / made["adapter"] / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (variant == "rslora", variant == "dora")
    assert made["variant"] == variant
    line = ("export", tiny_base, "--adapter", made["adapter"], "--format", "gguf", "--type", "f16", "--base", "nf4", "--threads", 1)
    for place in ("runs/tiny", "elsewhere") if variant == "pissa" else ("runs/tiny",):  # the residual is found, and made again
        assert edgelora(*line, "--out", place, "--json", cwd=tmp_path).document["kl"] < 1e-3
    assert len([name for name in finished_folders(tmp_path / "runs" / "tiny") if name.startswith("residual-")]) == (variant == "pissa")


def test_lora_plus_moves_b_at_its_own_rate(tiny_base: Path, tmp_path: Path) -> None:
    """The first step of Adam is the learning rate, whatever the gradient."""
    from transformers import TrainingArguments

    train = recipes.Train(lora_plus=16.0, lr=1e-3, r=4)
    model = adapter.attach(load.load_base(tiny_base, "lora", torch.float32), train)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-3, use_cpu=True, optim="adamw_torch", report_to=[])
    chosen = adapter.optimizer(model, train, arguments)
    model(input_ids=torch.tensor([token_ids(300)]), labels=torch.tensor([token_ids(300)])).loss.backward()
    chosen.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            step = float((parameter.detach() - before[name]).abs().median())
            assert step == pytest.approx(1e-3 * (16 if "lora_B" in name else 1), rel=1e-2), name
    assert adapter.optimizer(model, dataclasses.replace(train, lora_plus=None), arguments) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 0}, "train.r: 0 should be 1 or more"),
        ({"targets": []}, "train.targets: should name at least one layer"),
        ({"lora_plus": 0.5}, "train.lora_plus: 0.5 should be 1 or more"),
        ({"variant": "dorra"}, "train.variant: 'dorra' is not one of plain, rslora, dora, pissa; did you mean 'dora'?"),
        ({"method": "lora", "merge": "nf4"}, "merge.base: nf4 is what method qlora trains on"),
    ],
)
def test_wishes_that_cannot_be_met(settings: dict[str, object], said: str) -> None:
    into = settings.pop("merge", "auto")
    with pytest.raises(RecipeError) as raised:
        recipes.parse({"name": "a", "base": "b", "data": {"train": "c"}, "train": settings, "merge": {"base": into}})
    assert said in raised.value.message


def test_unknown_layers_are_told_before_the_base_is_loaded(tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    for command in (("finetune", "tiny.yaml"), ("run", "tiny.yaml", "--dry-run"), ("run", "tiny.yaml")):
        done = edgelora(*command, "--set", "train.targets=[q_proj, lm_head, k_prj]", cwd=tmp_path)
        assert (done.code, done.out) == (3, "")
        assert done.err == (
            "error: train.targets: the base has no lm_head, k_prj\n"
            "its linear layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; or write all-linear\n"
        )


def test_pissa_of_more_than_a_matrix_has(tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    done = edgelora("finetune", "tiny.yaml", "--set", "train.variant=pissa", "--set", "train.r=40", cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error: train.r: 40 is more than the rank of model.layers.0.self_attn.k_proj (32), which PiSSA decomposes\n")


@pytest.mark.parametrize("damage", ["no magnitudes", "magnitudes of another base", "cut short"])
def test_damaged_adapters(adapted: Callable[..., Adapted], damage: str) -> None:
    base, folder = adapted("llama", "dora")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("magnitude_vector"))
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tensors[name] = tensors[name][:-1]
        save_file(tensors if damage == "magnitudes of another base" else {k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(ModelError, match="damaged" if damage == "cut short" else "does not fit this base"):
        weights.Merged(base.folder, folder, "16bit")


def test_a_residual_is_made_once(adapted: Callable[..., Adapted], tmp_path: Path) -> None:
    base, _ = adapted("llama", "pissa")
    made = artifact.load(base.folder)
    assert (made.kind, made.recipe, base.key) == ("residual", {"r": 4, "alpha": 12, "targets": "all-linear"}, made.key)
    assert np.isfinite([float(t.float().abs().max()) for t in load_file(base.folder / "model.safetensors").values()]).all()


def test_a_gguf_adapter_has_no_place_for_dora(adapted: Callable[..., Adapted], tmp_path: Path) -> None:
    from edgelora.export import gguf_lora

    base, folder = adapted("llama", "dora")
    with pytest.raises(ModelError, match="DoRA trains beside them") as raised:
        gguf_lora.predict_bytes(base.folder, "q8_0", "tiny", weights=weights.Merged(base.folder, folder, "nf4"))
    assert raised.value.hint == "merge it: export it with --format gguf"
