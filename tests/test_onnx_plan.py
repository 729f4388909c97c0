"""ONNX within a size: matrices of many layouts in one graph, the size kept, the best of what was really measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgelora import artifact, pipeline, tuned
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.errors import ModelError, Unsupported, UsageError
from edgelora.export import PLANNERS, budget, onnx_plan, stage
from edgelora.export.onnx_layout import LAYOUTS
from edgelora.quant import nbits
from edgelora.quant.compensate import Rounding
from edgelora.quant.size_plan import Plan
from edgelora.runtime import onnx_genai, onnx_runtime
from edgelora.weights import Checkpoint
from tests.test_budget import rows, run
from tests.test_onnx_export import IDS, calmed, kl, quiet, torch_scores
from tests.tiny_models import tiny_model

WIDE = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 48}  # 3 blocks of 64: an odd number
UNCOMPENSATED = Rounding(lambda name: None, compensated=False, shrink=0.2)


def progressed(share: float, what: str) -> None:
    assert 0 <= share <= 1.0001


# ---- layouts ----


@pytest.fixture(scope="module", params=[("llama", True), ("phi3", False)], ids=["llama-tied", "phi3-untied"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, onnx_plan.Writer]:
    arch, tied = request.param
    folder = tmp_path_factory.mktemp(arch)
    model = calmed(tiny_model(arch, folder / "model", tie_word_embeddings=tied, **WIDE))
    # with activations in float32 nothing but the weights is rounded
    return model, onnx_plan.open(model, "tiny", Checkpoint(model), folder, 1, quiet, activations="fp32")


def plan_of(writer: onnx_plan.Writer, types: dict[str, str]) -> Plan:
    return Plan(types, writer.fixed_bytes + sum(writer.found[key].options()[kind][0] for key, kind in types.items()), 0.0)


def rounded_by_hand(model: Path, writer: onnx_plan.Writer, types: dict[str, str]) -> Any:
    """The torch model with every weight as its layout stores it."""
    tensors = {name: value.float() for name, value in load_file(model / "model.safetensors").items()}
    shapes = Checkpoint(model).shapes
    for key, matrix in writer.found.items():
        values, at = nbits.quantize(matrix.read(), LAYOUTS[types[key]]).values(), 0
        for piece in matrix.found:
            count = piece.part.rows(shapes)
            tensors[piece.part.tensor][piece.part.first : piece.part.last] = torch.from_numpy(values[at : at + count])
            at += count
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    missing, unexpected = made.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    made.tie_weights()
    return made.eval()


def test_every_layout_computes_what_it_stores(opened: tuple[Path, onnx_plan.Writer], tmp_path: Path) -> None:
    """Each alone, and all of them in one graph: in ONNX Runtime as in torch, in onnxruntime-genai as in ONNX Runtime; sizes as foretold."""
    model, writer = opened
    options = list(writer.found["lm_head"].options())
    assert options == [name for name, layout in LAYOUTS.items() if 192 % layout.block == 0]
    assert "int4-64-zeros" in options
    plans = [dict.fromkeys(writer.found, name) for name in options]
    plans.append({key: list(m.options())[(3 + 5 * i) % len(m.options())] for i, (key, m) in enumerate(writer.found.items())})
    sizes = []
    for number, types in enumerate(plans):
        place = tmp_path / str(number)
        place.mkdir()
        plan = plan_of(writer, types)
        folder = writer.write(plan, None, UNCOMPENSATED, place, quiet)  # type: ignore[arg-type]
        expected = torch_scores(rounded_by_hand(model, writer, types), IDS)
        with onnx_runtime.open(folder, threads=1) as session, onnx_genai.open(folder, 1) as genai:
            scores = session.score(IDS)
            assert kl(expected, scores) < 1e-9, types
            assert kl(scores, genai.score(IDS)) < 1e-9, types
        sizes.append(stage.size_bytes(folder))
        assert 0 <= plan.size_bytes - sizes[-1] < 6000, types  # 160 tensors' gaps and places
    assert len(set(sizes)) == len(sizes)


def test_a_layout_that_a_matrix_cannot_have_is_refused(opened: tuple[Path, onnx_plan.Writer], tmp_path: Path) -> None:
    _, writer = opened
    for kind in ("int4-128", "Q4_0"):
        plan = Plan(dict.fromkeys(writer.found, "int4-64") | {"lm_head": kind}, 0, 0.0)
        with pytest.raises(ModelError, match=f"stores lm_head as '{kind}', which it cannot be"):
            writer.write(plan, None, UNCOMPENSATED, tmp_path, quiet)  # type: ignore[arg-type]


def test_the_frame_is_the_one_that_the_checkpoint_foretells(opened: tuple[Path, onnx_plan.Writer]) -> None:
    model, writer = opened
    fixed, found = onnx_plan.matrices(model, "tiny")
    assert {key: matrix.shape for key, matrix in found.items()} == {key: matrix.shape for key, matrix in writer.found.items()}
    assert abs(fixed - writer.fixed_bytes) < 0.15 * writer.fixed_bytes  # an estimate: of a graph of 25 kB here
    assert sum(matrix.weights for matrix in found.values()) == sum(
        value.numel() for value in load_file(model / "model.safetensors").values() if value.ndim == 2
    )


def test_rows_that_hold_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "odd", hidden_size=80, num_attention_heads=5, num_key_value_heads=5)
    with pytest.raises(Unsupported, match="rows of 80 weights hold no blocks of 32"):
        budget.predict(model, recipes.Export("onnx", max_size="1MB"), "tiny")


def test_phi3s_halves_cost_together_what_the_whole_costs(tmp_path: Path) -> None:
    """gate and up are one tensor in the checkpoint and two matrices of the graph; k is a third of a matrix of the graph."""
    from edgelora.quant import curvature, sensitivity

    for arch, keys in (("phi3", ("mlp.gate_proj", "mlp.up_proj")), ("llama", ("attn.qkv_proj",))):
        model = calmed(tiny_model(arch, tmp_path / arch, num_hidden_layers=1))
        weights = Checkpoint(model)
        found = curvature.collect(curvature.open_model(model, weights, 1), rows(model, 12, 0), quiet)
        matrices = onnx_plan.matrices(model, "tiny")[1]
        pieces = [piece for key in keys for piece in matrices[f"model.layers.0.{key}"].found]
        costs = [matrices[f"model.layers.0.{key}"].costs(found, UNCOMPENSATED, 1)["int4-32"] for key in keys]
        direct = 0.0
        for name in dict.fromkeys(piece.gguf for piece in pieces):
            piece = next(p for p in pieces if p.gguf == name)
            values = piece.change(weights.rows(piece.part.tensor))
            errors = nbits.quantize(values, LAYOUTS["int4-32"]).values() - values
            direct += sensitivity.error_cost(name, values, errors, found, None, 1)
        assert sum(costs) == pytest.approx(direct, rel=0.35)  # a sketch's cross terms apart
        assert all(cost > 0 for cost in costs)


# ---- the stage ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calmed(tiny_model("llama", tmp_path_factory.mktemp("planned") / "model", hidden_size=128, intermediate_size=256))


def made(model: Path, out: Path, section: recipes.Export, plan: Path | None = None) -> Artifact:
    plain = tuned.plain(model, "key")
    known = budget.measure(plain, "16bit", rows(model, 24, 0), "tiny", 1, out, "", progressed, "onnx")
    return budget.export(
        plain, section, name="tiny", known=known, rows=rows(model, 12, 1), rows_from={"valid": "select"},
        limits=recipes.Evaluate(verify_rows=4, max_kl=5.0), threads=1, out=out, plan=plan, progress=progressed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def limit(model: Path) -> int:
    """Between the smallest and the largest."""
    fixed, found = onnx_plan.matrices(model, "tiny")
    sizes = [[n_bytes for n_bytes, _ in matrix.options().values()] for matrix in found.values()]
    return fixed + (sum(map(min, sizes)) + sum(map(max, sizes))) // 2


@pytest.fixture(scope="module")
def exported(model: Path, limit: int, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return made(model, tmp_path_factory.mktemp("made"), recipes.Export("onnx", max_size=f"{limit}B"))


def test_the_folder_keeps_its_size_and_is_what_was_planned(exported: Artifact, limit: int) -> None:
    facts = exported.facts
    folder = exported.path / str(facts["file"])
    assert folder.name == f"tiny-max-{limit}b-onnx"
    assert stage.size_bytes(folder) == facts["size_bytes"] <= facts["predicted_bytes"] <= limit
    assert facts["size_bytes"] > 0.97 * limit
    types = json.loads((exported.path / budget.PLAN).read_text())["types"]
    assert len(set(types.values())) > 1
    assert facts["weights"]["types"] == {kind: list(types.values()).count(kind) for kind in facts["weights"]["types"]}
    assert 4.2 < facts["weights"]["bits_a_weight"] < 9
    assert facts["further"]["onnxruntime-genai"]["same_text"]


def test_more_bytes_measure_closer_and_as_predicted(exported: Artifact) -> None:
    measured = exported.facts["plan"]["candidates"]
    assert len(measured) >= 3
    assert [row["size_bytes"] for row in measured] == sorted(row["size_bytes"] for row in measured)
    assert [row["kl"] for row in measured] == sorted((row["kl"] for row in measured), reverse=True)
    kept = [row for row in measured if row["size_bytes"] == exported.facts["size_bytes"]]
    assert [row["rounding"] for row in kept] == ["compensated"]
    assert all(0.3 < row["kl"] / row["predicted_kl"] < 3 for row in measured)
    predicted = exported.facts["plan"]["frontier"]
    assert [p["predicted_kl"] for p in predicted] == sorted((p["predicted_kl"] for p in predicted), reverse=True)


def test_a_plan_of_another_model_is_refused(model: Path, exported: Artifact, tmp_path: Path) -> None:
    values = json.loads((exported.path / budget.PLAN).read_text())
    broken = tmp_path / "plan.json"
    broken.write_text(json.dumps(values | {"types": values["types"] | {"blk.0.attn_q.weight": "int4-32"}}))
    with pytest.raises(ModelError, match=r"another model: blk\.0\.attn_q\.weight"):
        made(model, exported.path.parent, recipes.Export("onnx", max_size="1GB"), plan=broken)


def test_what_cannot_be_reached_names_what_can(model: Path, exported: Artifact) -> None:
    with pytest.raises(Unsupported, match=r"^0\.1 MB cannot be reached: the smallest file is .* on 12 rows it has a KL of") as caught:
        made(model, exported.path.parent, recipes.Export("onnx", max_size="100kB"))
    assert "ask for" in str(caught.value.hint)


def test_a_dry_run_reads_headers_alone(model: Path, limit: int) -> None:
    size, mixture = budget.predict(model, recipes.Export("onnx", max_size=f"{limit}B"), "tiny")
    assert 0.95 * limit < size <= limit
    assert sum(mixture["types"].values()) == 16
    assert stage.estimate(model, recipes.Export("onnx", max_size=f"{limit}B")).keys() == {"peak_bytes"}


def test_the_command_line_plans_and_uses_a_plan_again(model: Path, limit: int, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": f"It is number {n}."}) + "\n" for n in range(12)))
    common = ["export", str(model), "--format", "onnx", "--name", "tiny", "--threads", "1", "--json", "--out", str(tmp_path)]
    first = run([*common, "--max-size", f"{limit}B", "--activations", "fp32", "--rows", str(data)])
    assert first["size_bytes"] <= limit
    plan = Path(first["path"]).parent / budget.PLAN
    again = run([*common, "--plan", str(plan), "--activations", "fp32", "--rows", str(data)])
    assert len(again["plan"]["candidates"]) == 1
    one, other = ({p.name: artifact.sha256(p) for p in Path(done["path"]).iterdir()} for done in (first, again))
    assert one == other
    assert run([*common, "--max-size", f"{limit}B", "--dry-run"])["predicted_bytes"] <= limit
    with pytest.raises(UsageError, match="gguf has no activations"):
        run(["export", str(model), "--format", "gguf", "--max-size", "1MB", "--activations", "fp32"])


@pytest.mark.parametrize(
    "section",
    [
        recipes.Export("onnx", max_size="1MB", block=32),
        recipes.Export("onnx", max_size="1MB", exporter="optimum"),
        recipes.Export("onnx", max_size="1MB", importance=False),
        recipes.Export("onnx", "int4", max_size="1MB"),
        recipes.Export("gguf-lora", max_size="1MB"),
    ],
)
def test_contradictions_are_refused(section: recipes.Export) -> None:
    assert recipes.budget_problem(section)


def test_planners_are_modules_of_formats_that_exist() -> None:
    assert PLANNERS.keys() <= stage.FORMATS.keys()
    assert all(recipes.budget_problem(recipes.Export(name, max_size="1MB")) is None for name in PLANNERS)


def test_a_run_plans_onnx_too(tiny_recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Both planned formats of one recipe: each measured once; the untuned base beside each has the same types."""
    fixed, found = onnx_plan.matrices(tiny_base, "tiny")
    limit = fixed + sum(matrix.options()["int4-16"][0] for matrix in found.values())
    text = tiny_recipe.read_text().replace("{format: onnx, type: int8}", f"{{format: onnx, max_size: {limit}B}}")
    tiny_recipe.write_text(text.replace("  - {format: gguf, type: q8_0}\n", ""))
    result = pipeline.run(recipes.load(tiny_recipe, [f"out={tmp_path / 'out'}"]), lambda stage, share, what: None)
    (folder,) = result.exports
    assert stage.size_bytes(folder) <= limit
    plans = [json.loads(next((tmp_path / "out").glob(f"{prefix}onnx-max-*/plan.json")).read_text())["types"] for prefix in ("", "base-")]
    assert plans[0] == plans[1]
    assert artifact.load(next((tmp_path / "out").glob("onnx-curvature-*"))).rows == {"train": "train"}
    assert f"What another size would cost: {folder.name}" in result.report.read_text(encoding="utf-8")
