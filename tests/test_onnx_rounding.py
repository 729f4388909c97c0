"""The builder's graph with weights rounded by what training rows say: the same graph, the same bytes, closer answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgelora import artifact
from edgelora import recipe as recipes
from edgelora.data.chat import Encoded
from edgelora.errors import ModelError, UsageError
from edgelora.export import onnx as onnx_export
from edgelora.export import onnx_graph, onnx_rounding, stage
from edgelora.export.onnx_optimum import GRAPH
from edgelora.quant import curvature
from edgelora.runtime import onnx_genai, onnx_runtime
from edgelora.weights import Checkpoint
from tests.line import edgelora
from tests.test_onnx_export import calmed, kl, quiet, torch_scores
from tests.tiny_models import tiny_model

RANDOM = np.random.default_rng(5)
# Tokens that follow one another by a rule of their own, as text does: a walk over the vocabulary.
WALK = (np.cumsum(RANDOM.integers(1, 9, (14, 120)), axis=1) % 380 + 3).tolist()
ROWS = [Encoded(tuple(ids), (False,) * 10 + (True,) * 110) for ids in WALK[:12]]
UNSEEN = WALK[12]


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.parametrize(("arch", "type"), [("llama", "int4"), ("qwen3", "int4-mixed"), ("phi3", "int4")])
def test_the_same_graph_and_bytes_and_closer_answers(arch: str, type: str, tmp_path: Path) -> None:
    """Joined and separate q, k and v; tied and untied heads; joined gate and up."""
    model = calmed(tiny_model(arch, tmp_path / arch))
    checkpoint = Checkpoint(model)
    reference = torch_scores(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), UNSEEN)
    curvature.save(curvature.collect(curvature.open_model(model, checkpoint), ROWS, quiet), tmp_path / "moments")
    moments = onnx_export.calibration(tmp_path / "moments")
    folders = [onnx_export.write(model, type, tmp_path, name, quiet, given) for name, given in (("stock", None), ("rounded", moments))]
    assert sizes(folders[0]) == sizes(folders[1])
    assert (folders[0] / GRAPH).read_bytes() == (folders[1] / GRAPH).read_bytes()
    losses = []
    for folder in folders:
        with onnx_runtime.open(folder, threads=1) as session, onnx_genai.open(folder, 1) as genai:
            scores = session.score(UNSEEN)
            losses.append(kl(reference, scores))
            assert kl(scores, genai.score(UNSEEN)) < 1e-3
    assert losses[1] < 0.8 * losses[0], losses


def test_a_graph_of_another_model_is_not_rounded(tmp_path: Path) -> None:
    model, other = (calmed(tiny_model("llama", tmp_path / f"seed{seed}", seed=seed)) for seed in (0, 1))
    folder = onnx_export.write(model, "int4", tmp_path, "x", quiet)
    curvature.save(curvature.collect(curvature.open_model(other, Checkpoint(other)), ROWS[:2], quiet), tmp_path / "moments")
    moments = onnx_export.calibration(tmp_path / "moments")
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    tensors = {t.name: t for t in graph.initializer}

    def read(name: str) -> np.ndarray:
        return onnx_graph._external_array(tensors[name], folder).reshape(-1).view(np.uint8)

    config = AutoModelForCausalLM.from_pretrained(other).config
    with pytest.raises(ModelError, match=r"builder's /model/layers.0/attn/qkv_proj/MatMul_Q4 is not the model's: off by 1\d\d%"):
        onnx_rounding.rounded(graph, read, Checkpoint(other), config, moments, quiet)
    assert onnx_rounding.rounded(graph, read, Checkpoint(model), config, moments, quiet).keys() <= tensors.keys()


def test_which_exports_are_rounded_by_rows(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "llama")
    weighed = {kind: stage.weighed(model, recipes.Export("onnx", kind)) for kind in ("int4", "int4-mixed", "int8", "fp32")}
    assert weighed == {"int4": True, "int4-mixed": True, "int8": False, "fp32": False}
    assert not stage.weighed(model, recipes.Export("onnx", "int4", importance=False))
    assert not stage.weighed(model, recipes.Export("onnx", "int4", exporter="optimum"))
    with pytest.raises(UsageError, match="importance: true changes nothing: int8 is rounded the same"):
        stage.weighed(model, recipes.Export("onnx", "int8", importance=True))


def test_export_with_rows_measures_on_half_of_them(tmp_path: Path, faq: Path) -> None:
    """Moments are measured on every other row and kept; the rows between compare the file with the model."""
    calmed(tiny_model("llama", tmp_path / "tiny"))
    line = ("export", "tiny", "--format", "onnx", "--type", "int4", "--rows", faq, "--threads", "1")
    done = edgelora(*line, "--json", cwd=tmp_path)
    assert done.document["importance"] is True
    assert done.document["rows"] == 8
    (measured,) = tmp_path.glob("moments-*")
    assert artifact.load(measured).facts["rows"] == 8
    refused = edgelora(*line, "--imatrix", "x.gguf", cwd=tmp_path)
    assert (refused.code, refused.err.splitlines()[0]) == (2, "error: onnx has no place for an importance matrix")
