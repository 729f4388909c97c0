"""Every recipe of the package can be planned on a machine without network and without its base; every architecture trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgelora import models, plan
from edgelora import recipe as recipes
from edgelora.data import split
from edgelora.train import finetune
from tests import recipe_headers
from tests.tiny_models import ARCHITECTURES, tiny_model

RECIPES = sorted(recipe_headers.RECIPES.glob("*.yaml"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of results for all: the embedded base is converted once."""
    return tmp_path_factory.mktemp("plans")


def intents(folder: Path, word: str) -> str:
    """Rows as BANKING77 has them, for the recipe whose data is not ours."""
    file = folder / f"{word}.csv"
    rows = [f"how do I do thing {n} with my {word} number {n}?,intent_{n % 7}" for n in range(140)]
    file.write_text("text,category\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned_without_network(path: Path, out: Path, tmp_path: Path, no_network: None) -> None:
    changes = []
    if path.stem == "classifier-banking77":
        changes = [f"data.train={intents(tmp_path, 'card')}", f"data.sealed={intents(tmp_path, 'account')}"]
    recipe = dataclasses.replace(recipes.load(path, changes), out=str(out))
    found = plan.plan(recipe)
    assert found["rows"]["train"] > 5
    assert found["training"]["seconds"] > 0
    assert found["training"]["peak_rss_bytes"] > 1e8
    for row in found["files"]:
        assert row["size_bytes"] > 50e6
        limit = recipe.budgets.get("size")
        assert limit is None or row["size_bytes"] <= recipes.size_bytes(limit), (row, limit)
    absent = not recipe.base.startswith("package:")
    assert absent == ("published shape" in found["base_known_from"])
    assert absent == ("estimated" in found["tokens_counted"])
    assert plan.lines(found)


@pytest.mark.parametrize("path", recipe_headers.described(), ids=lambda path: path.stem)
def test_a_header_says_what_the_estimate_says(path: Path, no_network: None) -> None:
    assert recipe_headers.updated(path) == path.read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains(arch: str, tiny_recipe: Path, tmp_path: Path) -> None:
    folder = tiny_model(arch, tmp_path / arch)
    recipe = recipes.load(tiny_recipe, [f"base={folder}", "train.epochs=4", "train.lr=1e-2"])
    base = models.open_base(recipe.base, recipe.folder, tmp_path)
    made = finetune.finetune(recipe, base, split.load(recipe), tmp_path / "out", lambda share, text: None)
    assert (made.path / "adapter_model.safetensors").is_file()
    losses = [point["loss"] for point in made.facts["curve"]]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert made.facts["kernels"].startswith("fused" if arch in ("llama", "mistral", "qwen2", "smollm3") else "plain: model type")
    assert made.facts["predicted"].keys() == made.facts["measured"].keys() - {"tokens_per_s"}
