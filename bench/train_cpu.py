"""Training speed and memory on CPU cores: `finetune`'s own loop beside plain transformers + peft + bitsandbytes.

    python bench/train_cpu.py [--rounds 3] [--threads 2]

SmolLM2-135M's shape with random weights in NF4 (double quantization), LoRA r = 16 on all linear layers, AdamW, 4 rows of 256 tokens a
step, all trained. Every measurement is a process of its own, in turns; tokens a second are those of the steps after the first
two over their wall time, optimizer, batches and log included; memory is the process's peak resident set (VmHWM). Plain trains in fp32, which
is the faster for it where the processor has no bf16 products, and in bf16 where it has. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, TOKENS, WARMUP, STEPS = 4, 256, 2, 8
SHAPE = "smollm2-135m"


def ours(threads: int) -> dict[str, Any]:
    import torch
    import train_speed
    from transformers import TrainerCallback

    from edgelora import recipe as recipes
    from edgelora.train import adapter, attention, finetune, load, loop

    torch.set_num_threads(threads)
    attention.register()
    train = recipes.Train(batch=ROWS, accumulate=1, max_tokens=TOKENS, epochs=1.0, patience=0)
    recipe = recipes.Recipe(name="bench", base="random", data=recipes.Data(train="random"), train=train)
    rows = train_speed.rows_of(ROWS * (STEPS + WARMUP), TOKENS, train_speed.SHAPES[SHAPE]["vocab_size"])
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())
            control.should_evaluate = control.should_save = False

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = control.should_save = False

    with tempfile.TemporaryDirectory() as folder:
        dtype = load.arithmetic(train.dtype)
        model = adapter.attach(train_speed.build(SHAPE, "cpu"), train)
        trainer = finetune.make_trainer(
            recipe, model, rows, rows[:1], Path(folder), dtype, callbacks=[loop.Watch(lambda share, text: None, ROWS * TOKENS), Clock()]
        )
        trainer.args.eval_strategy = trainer.args.save_strategy = "no"
        trainer.args.load_best_model_at_end = False
        trainer.train()
    return {"tok_per_s": (len(times) - WARMUP) * ROWS * TOKENS / (times[-1] - times[WARMUP - 1]), "dtype": str(dtype)}


def plain(threads: int) -> dict[str, Any]:
    import torch
    import train_speed

    from edgelora import machine
    from edgelora import recipe as recipes
    from edgelora.train import adapter, attention

    torch.set_num_threads(threads)
    attention.register()  # the name that `build` gives; what runs is transformers' own, below
    half = "avx512_bf16" in machine.describe()["cpu_features"]
    model = train_speed.build(SHAPE, "cpu")
    model.get_decoder().config._attn_implementation = model.config._attn_implementation = "sdpa"
    if not half:
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float32
        model.float()
    model = adapter.attach(model, recipes.Train())
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    times = []
    for _ in range(STEPS + WARMUP):
        ids = torch.randint(0, train_speed.SHAPES[SHAPE]["vocab_size"], (ROWS, TOKENS))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter())
    return {"tok_per_s": STEPS * ROWS * TOKENS / (times[-1] - times[WARMUP - 1]), "dtype": "bfloat16" if half else "float32"}


SIDES = {"edgelora": ours, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = SIDES[options.one](options.threads)
        status = Path("/proc/self/status").read_text()
        found["peak_rss_bytes"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        print(json.dumps(found))
        return
    import results

    rows: dict[str, list[Any]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            line = [sys.executable, __file__, "--one", side, "--threads", str(options.threads)]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            rows[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(side, rows[side][-1], flush=True)
    speed = {side: statistics.median(r["tok_per_s"] for r in rows[side]) for side in SIDES}
    memory = {side: max(r["peak_rss_bytes"] for r in rows[side]) for side in SIDES}
    results.save(
        "train-cpu",
        f"python bench/train_cpu.py --rounds {options.rounds} --threads {options.threads}",
        ("torch", "transformers", "peft", "bitsandbytes"),
        [[side, f"{speed[side]:.0f} tok/s, {memory[side] / 1e9:.1f} GB"] for side in SIDES]
        + [["ratio", f"{speed['edgelora'] / speed['plain']:.2f}"]],
        {"rows": rows},
    )


if __name__ == "__main__":
    main()
