"""Weights on a grid of 4 bits: what other exporters read off them, and how near the model stays."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from edgelora import models
from edgelora import recipe as recipes
from edgelora.export import executorch, litert, mnn, on_grid, stage
from edgelora.export.there import grid
from edgelora.quant import nbits
from edgelora.quant.nbits import Layout
from edgelora.weights import Checkpoint
from tests.phone_files import measured
from tests.test_onnx_export import calmed, quiet
from tests.tiny_models import tiny_model

FORMATS = {"executorch": executorch, "litert": litert, "mnn": mnn}


def weights() -> np.ndarray:
    """Rows of every size, and blocks that a search for their scale could trip over."""
    random = np.random.default_rng(3)
    values = random.standard_normal((300, 128)) * np.exp(3 * random.standard_normal((300, 1)) - 5)
    values[0], values[1, :32] = 0, 0
    values[2], values[3, :] = 0.25, np.where(np.arange(128) % 32, 0, -0.01)
    values[4] = np.arange(128) % 4 * 0.02  # few codes, all of one sign
    values[5] *= 1e-5  # scales beneath the normal numbers of float16
    return values.astype(np.float32)


@pytest.mark.parametrize(("block", "zeros"), [(32, False), (64, True)])
def test_scales_are_read_off_values(block: int, zeros: bool) -> None:
    values = nbits.quantize(weights(), Layout(4, block, zeros, short=True)).values()
    steps = grid.steps(values, block, signed=not zeros)
    assert (steps > 0).all()
    assert np.array_equal(steps, steps.astype(np.float16).astype(np.float32))
    assert np.array_equal(torch.from_numpy(steps), torch.from_numpy(steps).bfloat16().float())
    codes = values.reshape(len(values), -1, block) / steps[:, :, None]
    assert np.array_equal(codes, np.rint(codes))
    if zeros:
        assert (np.maximum(codes.max(2), 0) - np.minimum(codes.min(2), 0)).max() <= 15
    else:
        assert (codes.min(), codes.max()) == (-8, 7)


def test_what_lies_on_no_grid_is_refused() -> None:
    values = nbits.quantize(weights(), Layout(4, 32, False, short=True)).values()
    values[7, 40] += np.float32(1e-3) * np.abs(values[7, 32:64]).max()
    with pytest.raises(ValueError, match="1 of 1200 blocks are not what was rounded"):
        grid.steps(values, 32, signed=True)


def test_short_scales_cost_little() -> None:
    values = weights()[6:]

    def error(layout: Layout) -> float:
        return float(np.linalg.norm(nbits.quantize(values, layout).values() - values))

    assert error(Layout(4, 64, True, short=True)) < 1.01 * error(Layout(4, 64, True))
    assert error(Layout(4, 32, False, short=True)) < 1.1 * error(Layout(4, 32, False))  # the side with a code more is always below zero


@pytest.mark.parametrize(("format", "arch"), [("executorch", "qwen3"), ("litert", "gemma3_text"), ("mnn", "phi3")])
def test_a_model_on_the_grid(format: str, arch: str, tmp_path: Path) -> None:
    """What its matrices make of the training rows is nearer than with every weight at the nearest value."""
    model = calmed(tiny_model(arch, tmp_path / arch))
    checkpoint, layout = Checkpoint(model), FORMATS[format]._GRID
    moments = measured(model, tmp_path)
    source, nearest = on_grid.opened(model, layout, moments), on_grid.opened(model, layout, lambda name: None)
    folder = on_grid.write(source, tmp_path / "written", quiet)
    settings = json.loads((folder / "config.json").read_text())
    assert settings == json.loads((model / "config.json").read_text()) | {"dtype": "float32"}
    assert models.open_tokenizer(folder).get_vocab() == models.open_tokenizer(model).get_vocab()
    written = Checkpoint(folder)
    assert written.shapes == checkpoint.shapes
    for name, shape in written.shapes.items():
        values, found = checkpoint.rows(name), written.rows(name)
        if len(shape) == 1:
            assert np.array_equal(found, values)
            continue
        grid.steps(found, math.gcd(layout.block, shape[1]), signed=not layout.zeros)
        inputs = moments(source._names[name])
        if inputs is not None:
            ours, others = (np.einsum("ij,jk,ik->", e, inputs, e) for e in (found - values, nearest.rows(name) - values))
            assert ours < 0.97 * others, name


def test_a_table_that_the_format_keeps_is_left_alone(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "llama", tie_word_embeddings=False)
    table = "model.embed_tokens.weight"
    for kept in ((), (table,)):
        found = on_grid.opened(model, mnn._GRID, lambda name: None, kept)
        assert np.array_equal(found.rows(table), Checkpoint(model).rows(table)) is bool(kept)
        assert not np.array_equal(found.rows("lm_head.weight"), Checkpoint(model).rows("lm_head.weight"))


@pytest.mark.parametrize("format", FORMATS)
def test_which_types_are_rounded_by_rows(format: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    for type in FORMATS[format].TYPES:
        assert stage.weighed(model, recipes.Export(format, type)) is (type == "int4")
    assert not stage.weighed(model, recipes.Export(format, "int4", importance=False))
