"""Export to a size: the file keeps it to the byte, is what was planned, and the best of what was really measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from transformers import AutoConfig

from edgelora import artifact, labels, pipeline, tuned
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.cli import cli
from edgelora.data.chat import Encoded
from edgelora.errors import ModelError, Unsupported, UsageError
from edgelora.export import budget, gguf
from edgelora.gguf_header import read_header
from edgelora.runtime import runtime
from tests.tiny_models import tiny_model


def quiet(share: float, what: str) -> None:
    assert 0 <= share <= 1.0001


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("budget") / "model", hidden_size=128, intermediate_size=256)


def rows(model: Path, count: int, seed: int) -> list[Encoded]:
    words = np.random.default_rng(seed).integers(3, AutoConfig.from_pretrained(model).vocab_size, (count, 24)).tolist()
    return [Encoded(tuple(ids), (False,) * 8 + (True,) * 16) for ids in words]


def made(
    model: Path, out: Path, section: recipes.Export, plan: Path | None = None, kl: float = 5.0, judges: list[Encoded] | None = None
) -> Artifact:
    known = budget.measure(tuned.plain(model, "key"), "16bit", rows(model, 24, 0), "tiny", 1, out, "", quiet)
    return budget.export(
        tuned.plain(model, "key"),
        section,
        name="tiny",
        known=known,
        rows=judges or rows(model, 12, 1),
        rows_from={"valid": "select"},
        limits=recipes.Evaluate(verify_rows=4, max_kl=kl),
        threads=1,
        out=out,
        plan=plan,
        progress=quiet,
    )


def size_of(model: Path, kind: str) -> int:
    return gguf.predict_bytes(model, kind, "tiny")


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    middle = (size_of(model, "q4_0") + size_of(model, "q8_0")) // 2
    return made(model, tmp_path_factory.mktemp("made"), recipes.Export("gguf", max_size=f"{middle}B"))


def test_the_file_keeps_its_size_and_is_what_was_planned(model: Path, exported: Artifact) -> None:
    file = exported.path / str(exported.facts["file"])
    middle = (size_of(model, "q4_0") + size_of(model, "q8_0")) // 2
    assert file.stat().st_size == exported.facts["predicted_bytes"] == exported.facts["size_bytes"]
    assert 0.97 * middle < file.stat().st_size <= middle
    planned = json.loads((exported.path / budget.PLAN).read_text())["types"]
    written = {tensor.name: tensor.type for tensor in read_header(file).tensors}
    assert planned.items() <= written.items()
    assert all(written[name] == "F32" for name in written.keys() - planned.keys())
    assert len(set(planned.values())) > 1


def test_the_better_of_the_measured_files_is_kept(exported: Artifact) -> None:
    near = [row for row in exported.facts["plan"]["candidates"] if abs(row["size_bytes"] / exported.facts["size_bytes"] - 1) < 0.05]
    (kept,) = (row for row in near if row["kept"])
    assert {row["rounding"] for row in near} == {"compensated", "nearest"}
    assert kept["kl"] == min(row["kl"] for row in near)
    assert exported.facts["kl"] < 2 * kept["kl"]  # on the first rows alone


def test_predictions_are_near_what_was_measured(exported: Artifact) -> None:
    for row in exported.facts["plan"]["candidates"]:
        assert 0.4 < row["kl"] / row["predicted_kl"] < 2.5


def test_the_frontier_falls_from_the_smallest_to_the_largest(exported: Artifact) -> None:
    points = exported.facts["plan"]["frontier"]
    sizes, losses = [p["size_bytes"] for p in points], [p["predicted_kl"] for p in points]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert len(points) > 5


def test_smaller_and_larger_files_are_measured_too_and_kept_beside_the_plan(exported: Artifact) -> None:
    measured = exported.facts["plan"]["candidates"]
    sizes = [row["size_bytes"] for row in measured]
    assert sizes == sorted(sizes)
    assert sizes[0] < exported.facts["size_bytes"] < sizes[-1]
    assert measured[0]["kl"] > measured[-1]["kl"]
    assert all(0 <= row["score_low"] <= row["score"] <= row["score_high"] <= 1 for row in measured)
    plan = json.loads((exported.path / budget.PLAN).read_text())
    assert plan["candidates"] == measured
    assert plan["frontier"] == exported.facts["plan"]["frontier"]
    assert [file.suffix for file in exported.path.iterdir()].count(".gguf") == 1


def test_the_smallest_file_of_a_score(model: Path, exported: Artifact) -> None:
    """Answers that are the model's own first choices: Q8_0 gets nearly all of them right."""
    found = made(model, exported.path.parent, recipes.Export("gguf", min_score=0.7), judges=own_answers(model))
    tried = found.facts["plan"]["candidates"]
    assert found.facts["size_bytes"] == min(row["size_bytes"] for row in tried if row["score"] >= 0.7)
    assert found.facts["size_bytes"] < max(row["size_bytes"] for row in tried)
    assert any(row["score"] < 0.7 for row in tried)
    assert found.path.name.startswith("gguf-min-score-0.7-")
    with pytest.raises(Unsupported, match=r"a score of 0\.99 cannot be reached: the largest plan, .* MB, scores 0\.\d+ on 12 rows"):
        made(model, exported.path.parent, recipes.Export("gguf", min_score=0.99))


def own_answers(model: Path) -> list[Encoded]:
    """Rows whose answers are what the model itself finds likeliest, a token at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for row in rows(model, 12, 3):
        ids = list(row.ids[:8])
        with torch.no_grad():
            while len(ids) < 24:
                ids.append(int(torch_model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(Encoded(tuple(ids), row.trained))
    return found


def test_labels_are_scored_by_the_label_that_is_chosen(model: Path) -> None:
    """Against every label's log-likelihood computed by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    answers = [[5, 6, 2], [7, 2], [8, 9, 10, 2]]
    questions = [row.ids[:8] for row in rows(model, 6, 4)]
    chosen = []
    for question in questions:
        means = []
        for answer in answers:
            with torch.no_grad():
                scores = torch.log_softmax(torch_model(input_ids=torch.tensor([[*question, *answer]])).logits[0, 7:-1], -1)
            means.append(float(scores.gather(1, torch.tensor(answer)[:, None]).mean()))
        chosen.append(int(np.argmax(means)))
    given = [
        [*question, *answers[label if i % 2 else (label + 1) % 3]]
        for i, (question, label) in enumerate(zip(questions, chosen, strict=True))
    ]
    encoded = [Encoded(tuple(ids), (False,) * 8 + (True,) * (len(ids) - 8)) for ids in given]
    with runtime("torch").open(model, 1) as session:
        assert labels.hits(session, encoded, answers).tolist() == [0.0, 1.0] * 3


def test_a_plan_is_used_again_without_comparing(model: Path, exported: Artifact) -> None:
    again = made(model, exported.path.parent, recipes.Export("gguf", max_size="1GB"), plan=exported.path / budget.PLAN)
    assert len(again.facts["plan"]["candidates"]) == 1
    assert artifact.sha256(again.path / str(again.facts["file"])) == artifact.sha256(exported.path / str(exported.facts["file"]))


def test_what_cannot_be_reached_names_what_can(model: Path, exported: Artifact) -> None:
    with pytest.raises(Unsupported, match=r"^0\.0 MB cannot be reached") as caught:
        made(model, exported.path.parent, recipes.Export("gguf", max_size="10kB"))
    assert "vocabulary" not in caught.value.hint  # a file of 10 kB has no room for any
    with pytest.raises(Unsupported) as caught:
        made(model, exported.path.parent, recipes.Export("gguf", max_size=f"{exported.facts['plan']['frontier'][0]['size_bytes'] - 500}B"))
    assert re.search(r"; on 12 rows it has a KL of \S+ \[\S+, \S+\] and a score of 0\.\d\d$", caught.value.message)
    smallest = budget.menus(
        budget.measure(tuned.plain(model, "key"), "16bit", rows(model, 24, 0), "tiny", 1, exported.path.parent, "", quiet)
    )
    assert f"({smallest['compensated'].smallest().size_bytes} bytes)" in caught.value.message
    assert "vocabulary" in caught.value.hint


def test_a_loss_instead_of_a_size(model: Path, exported: Artifact) -> None:
    wanted = 0.8 * next(row["kl"] for row in exported.facts["plan"]["candidates"] if row["size_bytes"] == exported.facts["size_bytes"])
    found = made(model, exported.path.parent, recipes.Export("gguf", max_kl=wanted))
    tried = found.facts["plan"]["candidates"]
    assert [row["kept"] for row in tried] == [row["size_bytes"] == found.facts["size_bytes"] for row in tried]
    assert found.facts["size_bytes"] == min(row["size_bytes"] for row in tried if row["kl"] <= wanted)
    assert exported.facts["size_bytes"] < found.facts["size_bytes"] < size_of(model, "f16")
    assert len([file for file in found.path.iterdir() if file.suffix == ".gguf"]) == 1
    with pytest.raises(Unsupported, match=r"cannot be reached: the best of \d files, \S+ MB, has \S+ on 12 rows"):
        made(model, exported.path.parent, recipes.Export("gguf", max_kl=1e-12))


def test_a_dry_run_reads_headers_alone_and_keeps_the_size(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    limit = size_of(model, "q5_0")
    size, mixture = budget.predict(bare, recipes.Export("gguf", max_size=f"{limit}B"), "tiny")
    assert 0.95 * limit < size <= limit
    assert sum(mixture["types"].values()) == 22


def test_the_command_line_plans_and_uses_a_plan_again(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": f"It is number {n}."}) + "\n" for n in range(12)))
    limit = size_of(model, "q5_0") + 100
    common = ["export", str(model), "--format", "gguf", "--name", "tiny", "--threads", "1", "--json"]
    first = run([*common, "--max-size", f"{limit}B", "--rows", str(data), "--out", str(tmp_path / "a")])
    assert first["size_bytes"] == Path(first["path"]).stat().st_size <= limit
    plan = Path(first["path"]).parent / budget.PLAN
    again = run([*common, "--plan", str(plan), "--rows", str(data), "--out", str(tmp_path / "a")])
    assert Path(again["path"]).read_bytes() == Path(first["path"]).read_bytes()
    dry = run([*common, "--max-size", f"{limit}B", "--dry-run"])
    assert 0.9 * limit < dry["predicted_bytes"] <= limit
    with pytest.raises(Unsupported, match=r"0\.0 MB cannot be reached: the smallest file is .* MB \(\d+ bytes\)$"):
        run([*common, "--max-size", "20kB", "--dry-run"])


def run(arguments: list[str]) -> dict[str, Any]:
    """One command's JSON document."""
    result = CliRunner().invoke(cli, arguments)
    if result.exception:
        raise result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "types": {"a": 3}}', '{"schema": 2, "types": {}}', "[" * 100_000])
def test_a_file_that_is_no_plan_is_refused(model: Path, exported: Artifact, tmp_path: Path, text: str) -> None:
    broken = tmp_path / "plan.json"
    broken.write_text(text)
    with pytest.raises(ModelError, match=r"plan\.json is not a size plan"):
        made(model, exported.path.parent, recipes.Export("gguf", max_size="1GB"), plan=broken)


def test_a_plan_of_another_model_is_refused(model: Path, exported: Artifact, tmp_path: Path) -> None:
    values = json.loads((exported.path / budget.PLAN).read_text())
    values["types"].pop("blk.0.attn_q.weight")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"another model: blk\.0\.attn_q\.weight"):
        made(model, exported.path.parent, recipes.Export("gguf", max_size="1GB"), plan=other)


@pytest.mark.parametrize(
    "section",
    [
        recipes.Export("gguf-lora", max_size="1MB"),
        recipes.Export("gguf", "q4_0", max_size="1MB"),
        recipes.Export("gguf", max_size="1MB", max_kl=0.1),
        recipes.Export("gguf", max_kl=0.1, min_score=0.5),
        recipes.Export("gguf", min_score=1.5),
    ],
)
def test_contradictions_are_refused(section: recipes.Export) -> None:
    assert recipes.budget_problem(section)


def test_a_recipe_with_a_strange_size_is_refused() -> None:
    values = {"name": "x", "base": "b", "data": {"train": "t.csv"}, "exports": [{"format": "gguf", "max_size": "90 apples"}]}
    with pytest.raises(UsageError, match="max_size: '90 apples' is not a size"):
        recipes.parse(values)


def test_a_run_plans_on_training_rows_and_gives_the_untuned_base_the_same_types(tiny_recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    limit = gguf.predict_bytes(tiny_base, "q5_0", "tiny")
    text = tiny_recipe.read_text().replace("{format: gguf, type: q8_0}", f"{{format: gguf, max_size: {limit}B}}")
    tiny_recipe.write_text(text.replace("  - {format: onnx, type: int8}\n", ""))
    result = pipeline.run(recipes.load(tiny_recipe, [f"out={tmp_path / 'out'}"]), lambda stage, share, what: None)
    (file,) = result.exports
    assert file.stat().st_size <= limit
    before = next((tmp_path / "out").glob("base-gguf-*/*.gguf"))
    types = [[(t.name, t.type) for t in read_header(path).tensors] for path in (file, before)]
    assert types[0] == types[1]
    made = artifact.load(file.parent)
    assert made.rows == {"valid": "select"}
    assert artifact.load(next((tmp_path / "out").glob("curvature-*"))).rows == {"train": "train"}
    assert result.document["files"][0]["plan"]["frontier"]
    page = result.report.read_text(encoding="utf-8")
    assert f"What another size would cost: {file.name}" in page
    assert "Score on valid" in page
