"""Predicted losses against those that are measured when a matrix is really changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgelora.data.chat import Encoded
from edgelora.errors import ModelError
from edgelora.export import architectures
from edgelora.quant import curvature, ggml, grid, sensitivity
from edgelora.quant.compensate import Rounding
from edgelora.quant.curvature import EMBEDDING, Curvature
from tests.tiny_models import tiny_model


def quiet(share: float, what: str) -> None:
    assert 0 <= share <= 1


class Tiny:
    """A tiny model, its curvature on random rows, and what a change of a weight really costs on the same rows."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(kind, folder), dtype=torch.float32).eval()
        random = np.random.default_rng(0)
        words = random.integers(0, self.model.config.vocab_size, (64, 48)).tolist()
        self.rows = [Encoded(tuple(ids), (False,) * 16 + (True,) * 32) for ids in words]
        self.curvature: Curvature = curvature.collect(self.model, self.rows, quiet)
        self._before = self._log_probs()

    def _log_probs(self) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([row.ids for row in self.rows])).logits[:, 15:-1]
        return torch.log_softmax(logits.double(), -1)

    def measured(self, weight: torch.nn.Parameter, change: torch.Tensor) -> float:
        kept = weight.data.clone()
        weight.data += change
        after = self._log_probs()
        weight.data = kept
        return float((self._before.exp() * (self._before - after)).sum(-1).mean())


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3_text"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


def small(weight: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn_like(weight) * weight.detach().std() * 0.02


def test_a_matrix_costs_what_was_predicted(tiny: Tiny) -> None:
    config = tiny.model.config
    sources = architectures.of(config.model_type).tensors(config)
    modules = dict(tiny.model.named_modules())
    ratios = []
    for name in (name for name in tiny.curvature.source if name.startswith("blk.")):
        weight = modules[sources[name].name.removesuffix(".weight")].weight
        change = small(weight, len(ratios))
        in_file = change if sources[name].change is None else sources[name].change.do(change, config)
        ratios.append(tiny.measured(weight, change) / tiny.curvature.cost(name, in_file.numpy()))
    assert len(ratios) == 7 * config.num_hidden_layers
    assert min(ratios) > 0.6
    assert max(ratios) < 1.6
    assert 0.85 < float(np.median(ratios)) < 1.2


def test_the_embedding_costs_what_was_predicted(tiny: Tiny) -> None:
    weight = tiny.model.get_input_embeddings().weight
    change = small(weight, 1)
    predicted = tiny.curvature.lookup_cost(change.numpy())
    if tiny.curvature.head == EMBEDDING:
        predicted += tiny.curvature.head_cost(weight.detach().numpy(), change.numpy())
    assert 0.6 < tiny.measured(weight, change) / predicted < 1.6


def test_an_untied_head_costs_what_it_changes(tiny: Tiny) -> None:
    if tiny.curvature.head == EMBEDDING:
        pytest.skip("this model's head is its embedding")
    weight = tiny.model.get_output_embeddings().weight
    change = 10 * small(weight, 2)
    assert tiny.measured(weight, change) == pytest.approx(tiny.curvature.head_cost(weight.detach().numpy(), change.numpy()), rel=0.1)


def test_matrices_with_the_same_input_share_its_moments(tiny: Tiny) -> None:
    source = tiny.curvature.source
    assert source["blk.1.attn_k.weight"] == source["blk.1.attn_v.weight"] == "blk.1.attn_q.weight"
    assert source["blk.1.ffn_up.weight"] == "blk.1.ffn_gate.weight"
    assert source["blk.1.ffn_down.weight"] == "blk.1.ffn_down.weight"
    for moments in tiny.curvature.inputs.values():
        assert np.allclose(moments, moments.T, rtol=1e-3, atol=1e-5 * np.abs(moments).max())
        assert np.linalg.eigvalsh(moments.astype(np.float64)).min() > -1e-4 * np.trace(moments)


def test_more_bits_cost_less(tiny: Tiny) -> None:
    weight = dict(tiny.model.named_modules())["model.layers.1.mlp.up_proj"].weight.detach().numpy()
    for compensated in (False, True):
        rounding = Rounding(tiny.curvature.moments, compensated, 0.05)
        costs = sensitivity.costs("blk.1.ffn_up.weight", weight, tiny.curvature, rounding)
        assert set(costs) == {ggml.Type.Q4_0, ggml.Type.IQ4_NL, ggml.Type.Q4_1, ggml.Type.Q5_0, ggml.Type.Q5_1, ggml.Type.Q8_0}
        assert costs[ggml.Type.Q8_0] < costs[ggml.Type.Q5_1] < costs[ggml.Type.Q4_0]


def test_what_trained_badly_is_named(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", tmp_path / "m"), dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match="NaN or infinite"):
        curvature.collect(model, [Encoded((1, 2, 3, 4), (False, True, True, True))], quiet)


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ModelError, match="at least one row"):
        curvature.collect(None, [], quiet)


def test_a_small_change_of_weights_that_were_born_on_a_grid_counts_in_every_matrix_at_once(tiny: Tiny) -> None:
    """Q5_1 holds every value of Q4_1's grid and one between any two; the other types' errors have nothing to do with the change."""
    name = "blk.0.attn_q.weight"
    random = np.random.default_rng(0)
    wide = random.standard_normal((tiny.curvature.outputs[name].shape[1], len(tiny.curvature.moments(name)))).astype(np.float32)
    born = ggml.dequantize(ggml.quantize(wide, ggml.Type.Q4_1), ggml.Type.Q4_1)
    tuned = born + 0.01 * random.standard_normal(born.shape).astype(np.float32)
    importance = np.ones(wide.shape[1], dtype=np.float32)  # with one, ggml looks for the scales that lose least
    rounding = Rounding(lambda name: np.diag(importance), False, 0.0)
    for values, own in ((wide, False), (tuned, True)):
        alone, together = (sensitivity.costs(name, values, tiny.curvature, rounding, matrices) for matrices in (1, 7))
        ratios = {kind: together[kind] / alone[kind] for kind in alone}
        if not own:
            assert set(ratios.values()) == {1.0}
            continue
        assert ratios[ggml.Type.Q4_1] > 4
        assert ratios[ggml.Type.Q5_1] > 3
        assert max(ratios[kind] for kind in (ggml.Type.Q4_0, ggml.Type.IQ4_NL, ggml.Type.Q5_0, ggml.Type.Q8_0)) < 1.5


def test_weights_on_their_grid_have_nothing_to_lose(tiny: Tiny) -> None:
    random = np.random.default_rng(0)
    wide = random.standard_normal((64, 128)).astype(np.float32)
    born = ggml.dequantize(ggml.quantize(wide, ggml.Type.Q4_0), ggml.Type.Q4_0)
    assert grid.taken_back(wide) is None
    assert grid.taken_back(born) is None or np.abs(grid.taken_back(born)).max() < 1e-5
    change = 0.01 * random.standard_normal(born.shape).astype(np.float32)
    taken = grid.taken_back(born + change)
    assert taken is not None
    assert np.corrcoef(taken.ravel(), change.ravel())[0, 1] < -0.5


def test_rows_drawn_of_a_matrix_cost_what_all_of_them_do(tiny: Tiny) -> None:
    """With errors of their own in every row, as rounding makes them."""
    name, random = "blk.0.ffn_up.weight", np.random.default_rng(5)
    rows, columns = tiny.curvature.outputs[name].shape[1], tiny.curvature.moments(name).shape[0]
    errors = random.standard_normal((rows, columns)).astype(np.float32)
    found = []
    for seed in range(40):
        fewer, chosen = tiny.curvature.drawn(name, rows // 3, seed)
        found.append(fewer.cost(name, errors[chosen]))
    assert np.mean(found) == pytest.approx(tiny.curvature.cost(name, errors), rel=0.15)
    assert np.std(found) < 0.3 * np.mean(found)


def test_a_large_matrix_is_judged_on_some_of_its_rows(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "blk.1.ffn_gate.weight"
    values = np.random.default_rng(6).standard_normal((tiny.curvature.outputs[name].shape[1], tiny.curvature.moments(name).shape[0]))
    seen: list[int] = []

    class Counted(Rounding):
        def quantize(self, name: str, values: np.ndarray, type: ggml.Type) -> np.ndarray:
            seen.append(len(values))
            return super().quantize(name, values, type)

    rounding = Counted(tiny.curvature.moments, True, 0.2)
    whole = sensitivity.costs(name, values.astype(np.float32), tiny.curvature, rounding)
    monkeypatch.setattr(sensitivity, "_WEIGHTS", values.size // 2)
    half = sensitivity.costs(name, values.astype(np.float32), tiny.curvature, rounding)
    assert max(seen) == len(values)
    assert 0.3 * len(values) < min(seen) <= len(values) // 2
    assert half.keys() == whole.keys()
    for kind, cost in whole.items():
        assert half[kind] == pytest.approx(cost, rel=0.4)


def test_all_rows_are_judged_where_rounding_takes_training_back(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken back is no noise: it follows the gradients, row by row, so that some rows cannot stand for the others."""
    name = "blk.1.ffn_gate.weight"
    values = np.random.default_rng(7).standard_normal((tiny.curvature.outputs[name].shape[1], tiny.curvature.moments(name).shape[0]))
    near = ggml.dequantize(ggml.quantize(values.astype(np.float32), ggml.Type.Q4_1), ggml.Type.Q4_1)
    moved = near + 0.004 * np.abs(near).mean() * np.random.default_rng(8).standard_normal(near.shape).astype(np.float32)
    assert sensitivity.taken_back(name, moved, tiny.curvature) is not None
    rounding = Rounding(tiny.curvature.moments, False, 0.2)
    whole = sensitivity.costs(name, moved, tiny.curvature, rounding, 30)
    monkeypatch.setattr(sensitivity, "_WEIGHTS", values.size // 4)
    assert sensitivity.costs(name, moved, tiny.curvature, rounding, 30) == whole
