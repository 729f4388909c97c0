"""Rows laid end to end: every row once, even sums, no document sees another, and the replaced layers compute what transformers' own do."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from edgelora import recipe as recipes
from edgelora.data.chat import Encoded
from edgelora.errors import EdgeloraError
from edgelora.train import adapter, attention, dealing, fit, layer, load, loop, packing
from edgelora.train.loss import SummedLoss
from tests.tiny_models import ARCHITECTURES, tiny_model

REPLACED = ("llama", "mistral", "qwen2", "smollm3")


def rows_of(*lengths: int, seed: int = 1) -> list[Encoded]:
    """Random rows; the later half of each is trained."""
    chance = random.Random(seed)
    return [Encoded(tuple(chance.randrange(3, 300) for _ in range(n)), tuple(i > n // 2 for i in range(n))) for n in lengths]


def adapted(folder: Path, method: Any = "lora", dtype: torch.dtype = torch.float32, targets: Any = "all-linear") -> Any:
    """A peft model whose B is not zero, so that A has a gradient too."""
    attention.register()
    torch.manual_seed(1)
    model = adapter.attach(
        load.load_base(folder, method, dtype, attention.NAME), recipes.Train(method=method, r=4, alpha=8, targets=targets)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model: Any, batch: dict[str, Any], longest: int) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = loop.answer_loss(model, batch, longest)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def row_by_row(model: Any, rows: list[Encoded]) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers' own loss with its eager attention, summed over rows that each are a batch of their own."""
    model.zero_grad()
    model.get_base_model().set_attn_implementation("eager")
    total = 0.0
    for row in rows:
        labels = torch.tensor([[i if trained else -100 for i, trained in zip(row.ids, row.trained, strict=True)]])
        loss = model(input_ids=torch.tensor([row.ids]), labels=labels).loss * sum(row.trained[1:])
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_rows_train_like_rows_on_their_own(tmp_path: Path, arch: str) -> None:
    """Every architecture; the longest row is longer than a sliding window, and than a block of queries."""
    folder, rows = tiny_model(arch, tmp_path / arch, max_position_embeddings=512), rows_of(11, 300, 3, 40)
    model = adapted(folder)
    total, expected = row_by_row(adapted(folder), rows)
    loss, found = gradients(model, packing.Collator(300)(rows), 300)
    assert loss == pytest.approx(total, rel=1e-5)
    assert_near(found, expected, 5e-5)
    why = layer.obstacle(model)
    assert (why is None) == (arch in REPLACED), why


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "4 bits"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")], ids=["all", "qv"])
@pytest.mark.parametrize("arch", REPLACED)
def test_replaced_layers_are_the_same_layers(tmp_path: Path, arch: str, targets: Any, keep: bool) -> None:
    folder, rows = tiny_model(arch, tmp_path / arch), rows_of(11, 40, 7, 23)
    batch = packing.Collator(40)(rows)
    loss, expected = gradients(adapted(folder, "qlora", targets=targets), batch, 40)
    for recompute in (0, 2):
        model = adapted(folder, "qlora", targets=targets)
        layer.replace(model, torch.float32, keep=keep, recompute=recompute)
        fast, found = gradients(model, batch, 40)
        assert fast == pytest.approx(loss, rel=1e-5)
        assert_near(found, expected, 5e-5)


def test_the_low_rank_part_rides_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product over [x | x A'] and [W | B]', as on a GPU."""
    folder, rows = tiny_model("qwen2", tmp_path / "qwen2"), rows_of(11, 40, 7, 23)
    batch = packing.Collator(40)(rows)
    _, expected = gradients(adapted(folder), batch, 40)
    projection = layer.Projection
    monkeypatch.setattr(layer, "Projection", lambda *a, joint, **k: projection(*a, joint=True, **k))
    model = adapted(folder)
    made = layer.replace(model, torch.float32, keep=True)
    assert all(p.joint for p in made.layers[0].projections)
    assert_near(gradients(model, batch, 40)[1], expected, 5e-5)
    with torch.no_grad():  # what the optimizer changes is seen only after `adapt`
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    made.adapt()
    changed = gradients(model, batch, 40)[1]
    made.restore()
    assert_near(changed, gradients(model, batch, 40)[1], 5e-5)


@pytest.mark.parametrize("fast", [True, False], ids=["replaced", "transformers"])
def test_no_document_sees_another(tmp_path: Path, fast: bool) -> None:
    """Other tokens in the first and the last row: the loss and every gradient of the middle one stay the same to the last bit."""
    folder = tiny_model("llama", tmp_path / "llama")
    model = adapted(folder)
    if fast:
        layer.replace(model, torch.float32, keep=True)
    found = []
    for seed in (1, 2):
        first, last = rows_of(30, 17, seed=seed)
        middle = rows_of(23, seed=9)[0]
        rows = [Encoded(first.ids, (False,) * 30), middle, Encoded(last.ids, (False,) * 17)]
        found.append(gradients(model, packing.Collator(30)(rows), 30))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]) or (gradient - found[1][1][name]).abs().max() <= 1e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("size", [64, 96, 128])
def test_a_gpus_attention_is_the_plain_one(size: int, window: int | None) -> None:
    """Whichever kernel runs here, against this module's own blocks in fp32: output and gradients, with an empty document at the end."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    chance = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(400, heads, size, generator=chance) for heads in (6, 2, 2, 6))
    docs = packing.Documents(torch.tensor([0, 5, 69, 70, 200, 400, 400], dtype=torch.int32), 200)
    out, saved = attention.forward(q, k, v, docs, size**-0.5, window)
    expected = [out, *attention.backward(grad, q, k, v, out, docs, size**-0.5, window, saved)]
    q, k, v, grad = (t.cuda().bfloat16() for t in (q, k, v, grad))
    docs = packing.Documents(docs.starts.cuda(), 200)
    out, saved = attention.forward(q, k, v, docs, size**-0.5, window)
    for found, wanted in zip([out, *attention.backward(grad, q, k, v, out, docs, size**-0.5, window, saved)], expected, strict=True):
        assert (found.cpu().float() - wanted).norm() <= 5e-3 * wanted.norm()


def test_padding_changes_nothing(tmp_path: Path) -> None:
    folder, rows = tiny_model("llama", tmp_path / "llama"), rows_of(11, 40, 7, 23)
    model = adapted(folder)
    layer.replace(model, torch.float32, keep=True)
    plain, even = packing.Collator(40)(rows), packing.Collator(40, even=True)(rows)
    assert even["input_ids"].shape[1] == 128 > plain["input_ids"].shape[1] == 81
    assert (even["labels"] != -100).sum() == (plain["labels"] != -100).sum() == sum(sum(row.trained[1:]) for row in rows)
    loss, expected = gradients(model, plain, 40)
    padded, found = gradients(model, even, 40)
    assert padded == pytest.approx(loss, rel=1e-6)
    assert_near(found, expected, 1e-5)


def test_sizes_of_even_batches_are_few() -> None:
    chance = random.Random(0)
    lengths = [chance.randrange(20, 200) for _ in range(1000)]
    rows = rows_of(*lengths)
    collate = packing.Collator(200, even=True)
    shapes = {tuple(value.shape for value in collate([rows[i] for i in batch]).values()) for batch in packing.deal(lengths, 8)}
    assert len(shapes) <= 3
    for count in range(1, 5000):
        assert count <= packing.rounded_up(count) < count + max(64, count / 16)


def test_every_row_once_in_batches_of_even_sums() -> None:
    chance = random.Random(0)
    lengths = [int(chance.lognormvariate(4, 0.7)) + 1 for _ in range(1003)]
    sampler = packing.Sampler(lengths, dealing.Division(8, 8), seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [8] * 125 + [3]
        assert sorted(itertools.chain(*batches)) == list(range(1003))
        sums = [sum(lengths[i] for i in batch) for batch in batches[:120]]
        assert max(sums) / min(sums) < 1.5
        orders.append(batches)
    assert orders[0] == orders[2] != orders[1]
    assert list(packing.Sampler(lengths, dealing.Division(8, 8), seed=4)) != orders[0]


@pytest.mark.parametrize(("rows", "processes"), [(8, 1), (4, 1), (3, 1), (1, 1), (4, 2), (2, 2), (3, 3), (1, 5), (1, 8)])
def test_an_update_has_the_same_rows_however_they_are_divided(rows: int, processes: int) -> None:
    chance = random.Random(0)
    lengths = [chance.randrange(10, 100) for _ in range(83)]
    whole = list(packing.Sampler(lengths, dealing.Division(8, 8), seed=3))
    division = dealing.Division(8, rows, processes)
    shares = [list(packing.Sampler(lengths, division, 3, process)) for process in range(processes)]
    assert {len(share) for share in shares} == {division.epoch(83)} == {len(packing.Sampler(lengths, division, 3))}
    assert all(len(batch) <= rows for share in shares for batch in share)
    for number, update in enumerate(whole):
        steps = slice(number * division.steps, (number + 1) * division.steps)
        assert sorted(i for share in shares for batch in share[steps] for i in batch) == sorted(update)
    assert len(whole) == -(-division.epoch(83) // division.steps)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_loss_in_pieces_is_cross_entropy(cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgelora.train import loss

    monkeypatch.setitem(loss._PIECE, "cpu", 16 * 50)
    torch.manual_seed(0)
    hidden, head = torch.randn(70, 24, requires_grad=True), torch.randn(50, 24)
    labels = torch.randint(0, 50, (70,))
    labels[::9] = -100
    logits = hidden @ head.t()
    expected = torch.nn.functional.cross_entropy(logits if cap is None else torch.tanh(logits / cap) * cap, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, hidden)
    found = SummedLoss.apply(hidden, labels, head, cap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found / 7, hidden)[0], gradient / 7, rtol=1e-4, atol=1e-6)


LLAMA_8B = fit.Shape(layers=32, hidden=4096, inner=14336, attention=4096, keys=1024, linear=6_979_321_856)
LLAMA_70B = fit.Shape(layers=80, hidden=8192, inner=28672, attention=8192, keys=1024, linear=68_451_041_280)


def test_what_fits_a_gpu_is_found_out() -> None:
    rows = [2048] * 64
    assert fit.cut(LLAMA_8B, rows, 4, 1, 74e9) == fit.Cut(dealing.Division(4, 4), keep=True, recompute=0)
    assert fit.cut(LLAMA_8B, rows, 16, 4, 74e9).division == dealing.Division(16, 4, 4)
    assert fit.cut(LLAMA_8B, rows, 4, 1, 30e9).division.steps > 1  # fewer rows at once, before anything is recomputed
    large = fit.cut(LLAMA_70B, rows, 4, 1, 44e9)
    assert (large.division.rows, large.division.steps, large.keep) == (1, 4, False)
    assert 0 <= large.recompute < 40
    with pytest.raises(EdgeloraError, match="one row of 2048 tokens does not fit"):
        fit.cut(LLAMA_70B, rows, 4, 1, 3e9)
