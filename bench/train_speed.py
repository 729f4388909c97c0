"""Training speed on one GPU: edgelora's loop, and its rivals in the same call.

    python bench/train_speed.py --out FOLDER [--shapes smol qwen ...] [--rivals] [--seconds 500]

Models are random weights in the shapes of known ones, built on the GPU in NF4 with double quantization; LoRA r = 16 on all
linear layers, AdamW, rows of 2048 tokens that are trained whole (the dearest case for the loss). Tokens a second are
the non-padding tokens of the steps after the warm-up over their wall time, optimizer, batches and log included.
Rivals: transformers + peft + bitsandbytes with liger-kernel (no checkpointing), each layer compiled where asked.
Results: `results/<machine class>/<date>-<commit>-train-speed.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgelora import machine
from edgelora import recipe as recipes
from edgelora.data.chat import Encoded
from edgelora.train import adapter, attention, finetune, loop

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "qwen2.5-0.5b": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "llama-3.2-1b": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-3.1-8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "llama-2-70b": {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip


def build(shape: str, device: str = "cuda") -> Any:
    """A random base in NF4, layer by layer, so that the 16-bit weights of a large one never exist at once."""
    import bitsandbytes as bnb
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values, max_position_embeddings=4096)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            weight = torch.randn(module.out_features, module.in_features, dtype=torch.bfloat16, device=device) * 0.02
            made = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            made.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to(device)
            if module.bias is not None:
                made.bias = nn.Parameter(torch.zeros(module.out_features, dtype=torch.bfloat16, device=device), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made)
            del weight
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                fresh = torch.ones if parameter.ndim == 1 else torch.empty
                data = fresh(parameter.shape, dtype=torch.bfloat16, device=device)
                if parameter.ndim > 1:
                    data.normal_(std=0.02)
                setattr(module, leaf, nn.Parameter(data, requires_grad=False))
    model.tie_weights()
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)
    model.config.use_cache = False
    model.is_loaded_in_4bit = True  # which is where peft looks
    return model.requires_grad_(False)


def rows_of(count: int, tokens: int, vocabulary: int) -> list[Encoded]:
    chance = random.Random(0)
    return [Encoded(tuple(chance.randrange(vocabulary) for _ in range(tokens)), (True,) * tokens) for _ in range(count)]


def ours(shape: str, batch: int, tokens: int, steps: int, warmup: int, folder: Path, *, divide: bool = False) -> dict[str, Any]:
    """The product's own trainer; its callback reads the clock after every step. `divide`: the base among all processes."""
    from transformers import TrainerCallback

    train = recipes.Train(batch=batch, accumulate=1, max_tokens=tokens, epochs=1.0, patience=0, dtype="bf16")
    recipe = recipes.Recipe(name="bench", base="random", data=recipes.Data(train="random"), train=train)
    torch.manual_seed(0)  # of several processes each makes the same base
    model = adapter.attach(build(shape), train)
    rows = rows_of(batch * (steps + warmup), tokens, SHAPES[shape]["vocab_size"])
    times: list[float] = []
    read = [warmup + steps * part // 3 for part in range(4)]  # the steps after which the clock is read

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in read:
                torch.cuda.synchronize()
                times.append(time.perf_counter())
            if state.global_step >= steps + warmup:
                control.should_training_stop = True
            control.should_evaluate = control.should_save = False

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = control.should_save = False

    trainer = finetune.make_trainer(
        recipe, model, rows, rows[:1], folder, torch.bfloat16, divide=divide,
        callbacks=[loop.Watch(lambda share, text: None, batch * tokens), Clock()],
    )  # fmt: skip
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    trainer.train()
    rates = [(b - a) * batch * tokens / (y - x) for a, b, x, y in zip(read, read[1:], times, times[1:], strict=False)]
    return {
        "tok_per_s": statistics.median(rates),
        "tok_per_s_thirds": rates,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "held_bytes": trainer.shards.held_bytes if trainer.shards else None,
        "rows_at_once": trainer.division.rows,
        "recomputed_layers": trainer.recomputed,
        "kernels": trainer.obstacle or "fused",
        "attention": attention.kernel(torch.bfloat16),
        "recorded": trainer.recorder is not None,
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
    }


def rival(shape: str, micro: int, total: int, tokens: int, steps: int, warmup: int, *, compiled: bool) -> dict[str, Any]:
    """transformers, peft and bitsandbytes with liger-kernel's layers and its fused linear cross-entropy, flash attention, no checkpointing."""
    import liger_kernel.transformers as liger

    family = SHAPES[shape]["model_type"]
    getattr(liger, f"apply_liger_kernel_to_{family}")()
    model = build(shape)
    model.get_decoder().config._attn_implementation = model.config._attn_implementation = "sdpa"
    model = adapter.attach(model, recipes.Train())
    if compiled:
        for decoder_layer in model.get_base_model().get_decoder().layers:
            decoder_layer.compile()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    chance = torch.Generator().manual_seed(0)
    spent = []
    for step in range(steps + warmup):
        ids = torch.randint(0, SHAPES[shape]["vocab_size"], (total, tokens), generator=chance)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for begin in range(0, total, micro):
            piece = ids[begin : begin + micro].cuda()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=piece, labels=piece, use_cache=False).loss * micro / total
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        torch.cuda.synchronize()
        if step >= warmup:
            spent.append(time.perf_counter() - begun)
    return {**summary(spent, total * tokens), "rows_at_once": micro, "compiled": compiled}


def summary(seconds: list[float], tokens: int) -> dict[str, Any]:
    """Median over thirds of the steps, so that one slow step does not decide."""
    third = max(1, len(seconds) // 3)
    rates = [tokens * len(part) / sum(part) for part in (seconds[:third], seconds[third : 2 * third], seconds[2 * third :]) if part]
    return {
        "tok_per_s": statistics.median(rates),
        "tok_per_s_thirds": rates,
        "step_s": seconds,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
    }


def matmul_ceiling() -> float:
    """FLOP/s of an 8192-wide bf16 product on random numbers, median of ten."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    spent = []
    for _ in range(13):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - begun)
    return 2 * 8192**3 / statistics.median(spent[3:])


# name: (shape, rows, tokens a row, steps, what rivals may try as rows at once)
CASES = {
    "smol": ("smollm2-135m", 4, 2048, 30, (4,)),
    "smol-large": ("smollm2-135m", 64, 2048, 9, (32,)),
    "qwen": ("qwen2.5-0.5b", 4, 2048, 30, (4,)),
    "qwen-large": ("qwen2.5-0.5b", 32, 2048, 9, (16,)),
    "1b": ("llama-3.2-1b", 4, 2048, 30, (4,)),
    "1b-large": ("llama-3.2-1b", 24, 2048, 9, (12,)),
    "8b": ("llama-3.1-8b", 4, 2048, 20, (4,)),
    "8b-short": ("llama-3.1-8b", 32, 128, 20, (32,)),
    "70b": ("llama-2-70b", 4, 2048, 6, ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--rivals", nargs="*", default=[], help="cases whose rival is measured too")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing new after this time")
    options = parser.parse_args()
    begun = time.monotonic()
    attention.register()
    found: dict[str, Any] = {"machine": machine.describe(), "torch": torch.__version__, "matmul_flop_per_s": matmul_ceiling(), "rows": []}
    print(f"matmul {found['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s", flush=True)
    jobs = [(name, False) for name in options.cases] + [(name, True) for name in options.rivals]
    for name, is_rival in jobs:
        shape, batch, tokens, steps, micros = CASES[name]
        for micro in micros if is_rival else (0,):
            if time.monotonic() - begun > options.seconds:
                print("out of time before", name, flush=True)
                break
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            try:
                row = (
                    rival(shape, micro, batch, tokens, max(6, steps // 2), 4, compiled=False)
                    if is_rival
                    else ours(shape, batch, tokens, steps, 5, options.out / "work")
                )
            except Exception as error:
                traceback.print_exc()
                row = {"error": repr(error)[:300]}
            row |= {"case": name, "who": "liger" if is_rival else "edgelora"}
            found["rows"].append(row)
            shown = {k: v for k, v in row.items() if k not in ("step_s", "tok_per_s_thirds")}
            print(json.dumps(shown), f"{time.monotonic() - started:.0f} s", flush=True)
            (options.out / "speed.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
