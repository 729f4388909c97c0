"""Recipes: every problem at once, nothing ignored, nothing surprising in the YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelora import recipe as recipes
from edgelora.errors import RecipeError

OWN = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
NOT_OURS = ("banking77/train.csv", "banking77/test.csv")  # the header says where to get them
MINIMAL = {"name": "x", "base": "b", "data": {"train": "t.csv"}}


def write(folder: Path, text: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("file", OWN, ids=lambda f: f.stem)
def test_every_recipe_of_ours_loads_and_its_data_is_there(file: Path) -> None:
    recipe = recipes.load(file)
    for name in (recipe.data.train, recipe.data.valid, recipe.data.sealed, *recipe.data.held_out.values()):
        assert name is None or recipe.file(name).is_file() or name in NOT_OURS, name
    assert recipe.name == file.stem
    assert f"edgelora run recipes/{file.name}" in file.read_text(encoding="utf-8"), "its header should say the command"


def test_all_problems_in_one_message() -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.parse({**MINIMAL, "train": {"lerning_rate": 1, "r": "many", "epoch": 3}, "bas": 1})
    assert caught.value.message == (
        "the recipe has 4 problems:\n"
        "  bas: unknown key; did you mean 'base'?\n"
        "  train.lerning_rate: unknown key; known keys: method, variant, r, alpha, dropout, targets, lr, lora_plus, schedule, warmup, epochs, batch, "
        "accumulate, max_tokens, dtype, patience, checkpointing, shard\n"
        "  train.epoch: unknown key; did you mean 'epochs'?\n"
        "  train.r: 'many' is not a whole number"
    )
    assert caught.value.exit_code == 2


def test_missing_keys_are_named() -> None:
    with pytest.raises(RecipeError, match=r"base: missing(.|\n)*data: missing"):
        recipes.parse({"name": "x"})


@pytest.mark.parametrize(("text", "value"), [("lr: 2e-4", 2e-4), ("lr: 1", 1.0), ("lr: '3E-5'", 3e-5)])
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    file = write(tmp_path, f"base: b\ndata: {{train: t.csv}}\ntrain: {{{text}}}\n")
    assert recipes.load(file).train.lr == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.r=0", "train.r: 0 should be 1 or more"),
        ("train.lr=nan", "train.lr: 'nan' is not a number"),
        ("train.dropout=1", "train.dropout: 1.0 should be at least 0 and below 1"),
        ("train.method=qlor", "did you mean 'qlora'?"),
        ("train.checkpointing=yes please", "'yes please' is not true or false"),
        ("data.held_out.train=a.csv", "train, valid and sealed are taken"),
        ("seed=1.5", "seed: 1.5 is not a whole number"),
        ("train.batch=true", "train.batch: True is not a whole number"),
        ("bench.repeats=1", "bench.repeats: should be 3 or more"),
    ],
)
def test_overrides_are_checked_like_the_file(tmp_path: Path, setting: str, message: str) -> None:
    file = write(tmp_path, "base: b\ndata: {train: t.csv}\n")
    with pytest.raises(RecipeError) as caught:
        recipes.load(file, [setting])
    assert message in caught.value.message


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    file = write(tmp_path, "base: b\ndata: {train: t.csv}\nexports: [{format: gguf}]\n")
    assert recipes.load(file, ["exports.0.type=q8_0"]).exports[0].type == "q8_0"
    with pytest.raises(RecipeError, match="exports has 1 entries, none is '3'"):
        recipes.load(file, ["exports.3.type=q8_0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x\n", "anchors and aliases are not allowed"),
        ("base: a\nbase: b\n", "the key 'base' stands twice"),
        ("base: [\n", "not valid YAML"),
        ("- 1\n", "holds no settings"),
        ("", "holds no settings"),
        ("base: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_hostile_yaml(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(write(tmp_path, text))
    assert message in caught.value.message


def test_a_missing_recipe_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "base: b\n")
    with pytest.raises(RecipeError) as caught:
        recipes.load(tmp_path / "rr.yaml")
    assert "r.yaml" in caught.value.hint


@pytest.mark.parametrize(("text", "size"), [("300MB", 300_000_000), ("1 MiB", 1 << 20), ("1.5kB", 1500), (7, 7)])
def test_sizes(text: str | int, size: int) -> None:
    assert recipes.size_bytes(text) == size


@pytest.mark.parametrize("text", ["300", "MB", "-1MB", "1 mb", "1TBs", ""])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 300MB"):
        recipes.size_bytes(text)


def test_the_resolved_recipe_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    file = write(tmp_path, "base: b\ndata: {train: t.csv}\n")
    assert str(tmp_path) not in repr(recipes.as_dict(recipes.load(file)))
