"""Training: the arithmetic of LoRA, a loss over answers alone, the epoch that is kept, and the same bytes twice."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import TrainerState

from edgelora import artifact, evaluate, models, report, weights
from edgelora import recipe as recipes
from edgelora.data import chat, split
from edgelora.data.chat import Encoded
from edgelora.runtime.torch_reference import TorchSession
from edgelora.train import adapter, finetune, load, loop
from tests.line import ROOT, Line, edgelora, finished_folders, write_recipe
from tests.tiny_models import tiny_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def bases_own(base: Path) -> dict[str, np.ndarray]:
    return {name: weight.astype(np.float32) for name, weight in load_file(base / "model.safetensors").items()}


def nf4_written_out(weight: np.ndarray) -> np.ndarray:
    """What bitsandbytes' own NF4 with double quantization keeps of a matrix."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(torch.from_numpy(weight), quant_type="nf4", compress_statistics=True)
    return np.asarray(bnb.dequantize_4bit(packed, state).numpy())


def dense(base: Path, adapter: Path, into: str, dtype: torch.dtype = torch.float32) -> Any:
    """The merged model by bitsandbytes and PEFT, added up in float32; `dtype` is what training computed in and rounded the base to."""
    from peft import PeftModel

    model = load.load_base(base, "qlora" if into == "nf4" else "lora", dtype if into == "nf4" else torch.float32)
    if into == "nf4":
        model = models.as_dense(model.dequantize()).float()
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


@pytest.mark.parametrize("into", ["16bit", "nf4"])
def test_a_merge_is_w_plus_alpha_over_r_times_b_a(finished: Line, tiny_base: Path, into: str) -> None:
    adapter = finished.one("adapter-*")
    low_rank = load_file(adapter / "adapter_model.safetensors")
    source = weights.Merged(tiny_base, adapter, into)
    merged = {name: source.rows(name).reshape(shape) for name, shape in source.shapes.items()}
    base = bases_own(tiny_base)
    changed = 0
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in TARGETS:
            a, b = (low_rank[f"base_model.model.{layer}.lora_{x}.weight"].astype(np.float32) for x in "AB")
            weight = (nf4_written_out(weight) if into == "nf4" else weight) + 8 / 4 * b @ a
            assert np.abs(b @ a).max() > 1e-3  # it learnt something
            changed += 1
        np.testing.assert_allclose(merged[name], weight, rtol=0, atol=2e-6, err_msg=name)
    assert changed == 7 * 3


def test_the_kept_merge_is_the_better_one_in_bf16(finished: Line, tiny_base: Path) -> None:
    model = finished.one("model-*")
    facts = artifact.load(model).facts
    losses = {row["base"]: row["loss"] for row in facts["candidates"]}
    assert losses[facts["kept"]] == min(losses.values())
    assert report.read(finished.out)["merge"]["kept"] == facts["kept"]
    adapter = finished.one("adapter-*")
    trained_in = getattr(torch, artifact.load(adapter).facts["dtype"])
    expected = dense(tiny_base, adapter, facts["kept"], trained_in).to(torch.bfloat16).state_dict()
    from safetensors.torch import load_file as load_torch

    for name, weight in load_torch(model / "model.safetensors").items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, expected[name], rtol=2**-7, atol=1e-6, msg=name)  # PEFT adds up in another order: one bit
    assert (model / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()


def test_the_merge_of_what_was_trained_is_what_was_trained(finished: Line) -> None:
    """Adding the adapter to the NF4 weights written out is exact: no other merge can be nearer to the trained model."""
    near = {row["base"]: row["kl"] for row in artifact.load(finished.one("model-*")).facts["candidates"]}
    assert 0 <= near["nf4"] < 1e-6 < near["16bit"]


@pytest.mark.parametrize(
    ("arch", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ("q_proj", "v_proj")),
        ("qwen3", "all-linear"),
        ("phi3", "all-linear"),
        ("gemma3_text", "down_proj"),
    ],
)
def test_trained_parameters_are_r_times_the_sides(tmp_path: Path, arch: str, targets: Any) -> None:
    folder = tiny_model(arch, tmp_path / arch)
    train = recipes.Train(r=4, targets=targets)
    model = adapter.attach(load.load_base(folder, "lora", torch.float32), train)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.parameters(models.shapes(folder), train)
    if arch == "llama":
        hidden, kv, inner = 64, 32, 96
        sides = 2 * hidden + (hidden + kv) + (0 if targets != "all-linear" else (hidden + kv) + 2 * hidden + 3 * (hidden + inner))
        assert adapter.parameters(models.shapes(folder), train) == 4 * 3 * sides


def test_the_share_that_is_reported(finished: Line, tiny_base: Path) -> None:
    facts = artifact.load(finished.one("adapter-*")).facts
    trained = load_file(finished.one("adapter-*") / "adapter_model.safetensors")
    assert facts["trained_parameters"] == sum(w.size for w in trained.values()) == 4 * 3 * (128 + 96 + 96 + 128 + 3 * 160)
    assert facts["total_parameters"] == sum(w.size for w in bases_own(tiny_base).values())
    assert facts["trained_share"] == facts["trained_parameters"] / facts["total_parameters"]
    assert facts["full_finetune_bytes"] == 16 * facts["total_parameters"]


@pytest.fixture
def recipe(finished: Line) -> recipes.Recipe:
    return recipes.load(finished.recipe)


@pytest.fixture
def rows(finished: Line, tiny_base: Path, recipe: recipes.Recipe) -> list[Encoded]:
    """Four rows of unequal length."""
    tokenizer = models.open_tokenizer(tiny_base)
    found = [chat.encode(tokenizer, row) for row in split.load(recipe).train[:4]]
    return [found[0], Encoded(found[1].ids[:-6], found[1].trained[:-6]), found[2], Encoded(found[3].ids[:-9], found[3].trained[:-9])]


def trainer(recipe: recipes.Recipe, base: Path, rows: list[Encoded], folder: Path, **settings: Any) -> loop.AnswerTrainer:
    """The product's own trainer in fp32, on an adapter whose B is not zero, so that A has a gradient too."""
    from edgelora.train import attention

    attention.register()
    train = dataclasses.replace(recipe.train, dropout=0.0, epochs=1.0, **settings)
    torch.manual_seed(1)
    model = adapter.attach(load.load_base(base, "lora", torch.float32, attention.NAME), train)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    made = finetune.make_trainer(dataclasses.replace(recipe, train=train), model, rows, rows, folder, torch.float32)
    assert made.obstacle is None
    return made


def first_gradients(made: loop.AnswerTrainer) -> dict[str, torch.Tensor]:
    from transformers import TrainerCallback

    found: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.update(
                {name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.grad is not None and name not in found}
            )

    made.args.max_grad_norm = 0.0
    made.add_callback(Keep())
    made.train()
    return found


def test_accumulation_is_one_large_batch(recipe: recipes.Recipe, tiny_base: Path, rows: list[Encoded], tmp_path: Path) -> None:
    assert len({row.n_trained for row in rows}) > 1
    shapes = {"whole": (4, 1), "halves": (2, 2), "single": (1, 4)}
    found = {
        name: first_gradients(trainer(recipe, tiny_base, rows, tmp_path / name, batch=batch, accumulate=steps))
        for name, (batch, steps) in shapes.items()
    }
    assert len(found["whole"]) == 2 * 7 * 3
    for name, expected in found["whole"].items():
        assert expected.abs().max() > 1e-4
        for other in ("halves", "single"):
            torch.testing.assert_close(found[other][name], expected, rtol=0, atol=1e-5)


def test_recomputing_activations_changes_no_gradient(recipe: recipes.Recipe, tiny_base: Path, rows: list[Encoded], tmp_path: Path) -> None:
    found = [
        first_gradients(trainer(recipe, tiny_base, rows, tmp_path / str(again), batch=4, checkpointing=again)) for again in (False, True)
    ]
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=0, atol=1e-6)


def test_the_loss_is_the_models_own(recipe: recipes.Recipe, tiny_base: Path, rows: list[Encoded], tmp_path: Path) -> None:
    made = trainer(recipe, tiny_base, rows, tmp_path, batch=4)
    batch = made.data_collator(rows)
    trained = sum(row.n_trained for row in rows)
    assert (batch["labels"] != -100).sum() == trained
    with torch.no_grad():
        loss = made.compute_loss(made.model, batch)
        total = made.compute_loss(made.model, batch, num_items_in_batch=torch.tensor(1.0))
    torch.testing.assert_close(total, loss * trained, rtol=1e-5, atol=0)
    made.layers.restore()
    made.model.get_base_model().set_attn_implementation("eager")
    own = 0.0
    for row in rows:
        labels = torch.tensor([[i if trained else -100 for i, trained in zip(row.ids, row.trained, strict=True)]])
        with torch.no_grad():
            own += float(made.model(input_ids=torch.tensor([row.ids]), labels=labels).loss) * row.n_trained
    assert float(loss) == pytest.approx(own / trained, abs=1e-5)
    session = TorchSession(made.model, models.open_tokenizer(tiny_base))  # and what the report calls loss
    assert evaluate.losses(session, rows).mean == pytest.approx(float(loss), abs=1e-5)


def test_prompts_are_not_learnt(recipe: recipes.Recipe, tiny_base: Path, rows: list[Encoded], tmp_path: Path) -> None:
    made = trainer(recipe, tiny_base, rows, tmp_path, batch=4)
    batch = made.data_collator(rows)
    kept: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        kept.append(output.last_hidden_state)

    made.model.get_base_model().get_decoder().register_forward_hook(keep)
    made.compute_loss(made.model, batch).backward()
    assert kept[0].grad is not None
    reached = kept[0].grad[0].abs().sum(-1) > 0
    answers = [trained for row in rows for trained in (*row.trained[1:], False)]  # a position predicts the next token
    assert reached.tolist() == answers


def test_only_answers_and_their_end_are_trained(tiny_base: Path, rows: list[Encoded]) -> None:
    tokenizer = models.open_tokenizer(tiny_base)
    row = rows[0]
    assert tokenizer.decode([i for i, trained in zip(row.ids, row.trained, strict=True) if trained]).endswith(".<|im_end|>")
    assert tokenizer.decode(row.prompt).endswith("<|im_start|>assistant\n")


def test_the_walkthroughs_settings_on_a_cpu(tiny_base: Path, tmp_path: Path) -> None:
    """The recipe of introductions. What they write as dtype, fp16, is refused here before anything is trained."""
    values = yaml.safe_load((ROOT / "recipes" / "lora-walkthrough.yaml").read_text(encoding="utf-8"))
    write_recipe(tmp_path, tiny_base)
    values |= {
        "name": "tiny",
        "base": str(tiny_base),
        "data": {"train": "rows.jsonl"},
        "exports": [{"format": "gguf", "type": "f16"}],
        "threads": 1,
    }
    values["bench"] = {"prompt_tokens": [8], "decode_tokens": 4, "repeats": 3}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    refused = edgelora("run", "tiny.yaml", "--set", "train.dtype=fp16", cwd=tmp_path)
    why = "train.dtype fp16 needs a GPU: it wants a loss scaler and kernels that CPUs lack"
    assert (refused.code, refused.out, refused.err) == (3, "", f"error: {why}\nwrite dtype: auto\n")
    done = edgelora("run", "tiny.yaml", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    training = report.read(tmp_path / "runs" / "tiny")["training"]
    assert training["dtype"] in ("bfloat16", "float32")
    assert training["trained_parameters"] == 8 * 3 * ((64 + 64) + (64 + 32))
    assert training["steps"] == 3  # eight rows are one step of 4 x 4 an epoch


def test_the_best_epoch_is_kept(tiny_base: Path, tmp_path: Path) -> None:
    """At this rate the tiny model soon gets worse; patience ends the training and the best epoch is what is saved."""
    write_recipe(tmp_path, tiny_base, dtype="fp32")
    made = edgelora(
        "finetune", "tiny.yaml", "--json", "--set", "train.lr=1e-1", "--set", "train.epochs=12", "--set", "train.method=lora",
        "--set", "train.schedule=constant", "--set", "train.batch=16", cwd=tmp_path,
    ).document  # fmt: skip
    losses = [point["loss"] for point in made["valid_curve"]]
    best = losses.index(min(losses))
    assert best + 1 < len(losses) < 12
    assert len(losses) - 1 - best == 2  # epochs without a better one: patience
    assert made["best_valid_loss"] == losses[best]
    from peft import PeftModel

    base = load.load_base(tiny_base, "lora", torch.float32)
    session = TorchSession(PeftModel.from_pretrained(base, tmp_path / made["adapter"]), models.open_tokenizer(tiny_base))
    recipe = recipes.load(tmp_path / "tiny.yaml")
    tokenizer = models.open_tokenizer(tiny_base)
    valid = [ids for _, ids in chat.encode_all(tokenizer, split.load(recipe).selecting, recipe.train.max_tokens)]
    assert evaluate.losses(session, valid).mean == pytest.approx(losses[best], abs=1e-4)


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_loss_that_is_no_number_stops_with_advice(tiny_base: Path, tmp_path: Path, method: str) -> None:
    write_recipe(tmp_path, tiny_base)
    done = edgelora("finetune", "tiny.yaml", "--set", "train.lr=1e30", "--set", f"train.method={method}", cwd=tmp_path)
    assert (done.code, done.out) == (3, "")
    head, hint, rest = done.err.split("\n")
    assert head.startswith(("error: the training loss is nan at step ", "error: the valid loss is nan at step "))
    assert (hint, rest) == ("lower train.lr (try a tenth), or use train.dtype bf16 or fp32", "")
    assert finished_folders(tmp_path / "runs" / "tiny") == {}


def test_half_an_epoch_is_a_training_too(tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    made = edgelora("finetune", "tiny.yaml", "--set", "train.epochs=0.5", "--set", "train.batch=2", "--json", cwd=tmp_path).document
    assert made["steps"] == len(made["curve"]) == 2
    assert made["epochs"] == pytest.approx(0.5)
    assert made["best_valid_loss"] == made["valid_curve"][-1]["loss"]


@pytest.mark.parametrize("epochs", [0.25, 1.0, 1.25])
def test_tokens_a_second_count_what_was_trained(epochs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' number of epochs is a whole one."""
    clock = iter([100.0, 100.0, 110.0])
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    watch = loop.Watch(lambda share, text: said.append(text), tokens=4000)
    state = TrainerState(epoch=epochs / 2, global_step=50, max_steps=100, num_train_epochs=math.ceil(epochs))
    watch.on_train_begin(None, TrainerState(), None)
    watch.on_log(None, state, None, {"loss": 1.0})
    assert f"  {4000 * epochs / 2 / 10:,.0f} tok/s  " in said[0]


def test_the_learning_rate_warms_up_and_falls(recipe: recipes.Recipe, tiny_base: Path, rows: list[Encoded], tmp_path: Path) -> None:
    made = trainer(recipe, tiny_base, rows * 5, tmp_path, batch=2, accumulate=1, warmup=0.3, schedule="linear", lr=1e-3)
    made.train()
    rates = [entry["learning_rate"] for entry in made.state.log_history if "loss" in entry]
    assert len(rates) == 10
    assert rates == pytest.approx([1e-3 * min(step / 3, (10 - step) / 7) for step in range(10)])


def test_long_rows_are_left_out_and_counted(finished: Line, tiny_base: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, tiny_base)
    with (tmp_path / "rows.jsonl").open("a") as data:
        for n in range(3):
            data.write(json.dumps({"question": f"A long one, number {n}?", "answer": "very " * 130 + "long"}) + "\n")
    (tmp_path / "valid.jsonl").write_text('{"question": "Is this valid?", "answer": "It is."}\n')
    options = ("--set", "data.valid=valid.jsonl", "--set", "data.sealed_share=0", "--json")
    made = edgelora("finetune", file, *options, cwd=tmp_path).document
    assert (made["rows"], made["notes"]) == (16, ["3 training rows longer than train.max_tokens = 128 left out"])
    plan = edgelora("run", file, *options, "--dry-run", cwd=tmp_path).document
    assert (plan["rows"]["train"], plan["left_out"], plan["tokens"]) == (16, 3, made["tokens"])


def test_two_runs_write_the_same_bytes(finished: Line, again: Line) -> None:
    assert again.done.code == 0, again.done.err
    for name in finished_folders(finished.out):
        if not name.startswith(("bench", "evaluation")):  # these hold times, or nothing but their manifest
            first, second = artifact.load(finished.out / name), artifact.load(again.out / name)
            assert first.files
            assert dict(first.files) == dict(second.files), name
    judged = [artifact.load(line.one("evaluation-*")).facts for line in (finished, again)]
    assert judged[0] == judged[1]


def test_another_seed_is_another_adapter(finished: Line, tiny_base: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_base)
    made = edgelora("finetune", "tiny.yaml", "--set", "seed=1", "--json", cwd=tmp_path).document
    assert Path(made["adapter"]).name != finished.one("adapter-*").name
    assert made["curve"] != artifact.load(finished.one("adapter-*")).facts["curve"]
