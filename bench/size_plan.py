"""Size plans against every stock recipe of llama.cpp and against uniform types, by KL and loss on rows that nobody saw.

    python bench/size_plan.py CARRY WORK OUT.json [--task medquad] [--model smollm2]

CARRY and WORK are the folders of bench/reference_models.py. Weights are rounded by ggml (or with compensation on ggml's grids), read
back by ggml and run by torch in float32: what is compared is the rounding, on one implementation for all. Sizes are those
of the files to the byte. Importance and curvature come from training rows, plans are chosen by prediction alone, and figures
are of the `sealed` tenth of the rows. Wants a GPU; libggml-base alone of llama.cpp.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.reference_models import HELD_OUT, task_rows
from edgelora import evaluate
from edgelora.data.chat import Encoded
from edgelora.export import architectures
from edgelora.quant import compensate, curvature, ggml, gguf_types, sensitivity
from edgelora.quant.ggml import Type
from edgelora.quant.size_plan import Menu, Option
from edgelora.weights import Checkpoint, Merged

MB = 10**6
BUDGETS = range(75, 121, 5)
EMBEDDINGS = (Type.Q4_0, Type.IQ4_NL, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
CALIBRATION, SEALED = 64, 80  # rows
SHRINK = (0.01, 0.05, 0.2)

STATE: dict[str, Any] = {}  # what worker processes inherit


class Lab:
    """The model in GGUF's order, rounded in any way and run."""

    def __init__(self, carry: Path, work: Path, model: str, task: str, device: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.backends.cuda.matmul.allow_tf32 = False
        folder = work / model
        self.weights = Merged(folder, work / task, "16bit") if model == "smollm2" else Checkpoint(folder)
        self.config = AutoConfig.from_pretrained(folder)
        self.sources = {
            name: source
            for name, source in architectures.of(self.config.model_type).tensors(self.config).items()
            if source.name in self.weights.shapes
        }
        self.shapes = {name: self.weights.shapes[source.name] for name, source in self.sources.items()}
        self.matrices = [name for name, shape in self.shapes.items() if len(shape) == 2]
        self.values = {name: self._in_file(name) for name in self.matrices}
        self.model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).to(device).eval()
        state = {s.name: torch.from_numpy(self.weights.rows(s.name).reshape(self.weights.shapes[s.name])) for s in self.sources.values()}
        self.model.load_state_dict(state, strict=False)
        self.model.tie_weights()
        self.device = device
        rows = [Encoded(tuple(map(int, ids)), tuple(map(bool, trained))) for ids, trained in task_rows(np.load(carry / "tokens.npz"), task)]
        seen = [row for i, row in enumerate(rows) if i % HELD_OUT > 1]
        self.calibration = seen[:: max(1, len(seen) // CALIBRATION)][:CALIBRATION]
        sealed = rows[1::HELD_OUT]
        self.sealed = sealed[:: max(1, len(sealed) // SEALED)][:SEALED]
        self.reference = self.log_probs()

    def _in_file(self, name: str) -> np.ndarray:
        import torch

        source = self.sources[name]
        values = self.weights.rows(source.name)
        return values if source.change is None else source.change.do(torch.from_numpy(values), self.config).numpy()

    def log_probs(self) -> list[Any]:
        import torch

        found = []
        with torch.no_grad():
            for row in self.sealed:
                scored = np.flatnonzero(row.trained) - 1
                hidden = self.model.base_model(input_ids=torch.tensor([row.ids[:-1]], device=self.device)).last_hidden_state[0]
                found.append(torch.log_softmax(self.model.lm_head(hidden[scored]), -1))
        return found

    def measure(self, rounded: dict[str, np.ndarray]) -> dict[str, Any]:
        """KL and loss with the matrices replaced by `rounded`."""
        import torch

        modules = dict(self.model.named_modules())
        kept = {}
        for name, values in rounded.items():
            source = self.sources[name]
            weight = modules[source.name.removesuffix(".weight")].weight
            kept[name] = weight.data
            changed = torch.from_numpy(values)
            if source.change is not None:
                order = source.change.do(torch.arange(len(values), dtype=torch.float32)[:, None], self.config)[:, 0].long()
                changed = torch.empty_like(changed).index_copy_(0, order, changed)
            weight.data = changed.to(self.device)
        nats, losses, own, agreed = [], [], [], 0
        for row, p, q in zip(self.sealed, self.reference, self.log_probs(), strict=True):
            nats.append(float((p.exp() * (p - q)).sum()))
            true = torch.tensor([i for i, t in zip(row.ids, row.trained, strict=True) if t], device=self.device)[:, None]
            losses.append(-float(q.gather(1, true).sum()))
            own.append(-float(p.gather(1, true).sum()))
            agreed += int((p.argmax(1) == q.argmax(1)).sum())
        for name, data in kept.items():
            modules[self.sources[name].name.removesuffix(".weight")].weight.data = data
        tokens = np.array([row.n_trained for row in self.sealed])
        low, high = evaluate.interval(np.array(nats), tokens)
        return {
            "kl": sum(nats) / int(tokens.sum()), "kl_low": low, "kl_high": high, "loss": sum(losses) / int(tokens.sum()),
            "reference_loss": sum(own) / int(tokens.sum()), "top1": agreed / int(tokens.sum()), "row_nats": nats, "row_losses": losses,
        }  # fmt: skip

    def bytes(self, types: dict[str, Type], header: int) -> int:
        sizes = [math.prod(s[:-1]) * ggml.row_bytes(types.get(n, Type.F32), s[-1]) for n, s in self.shapes.items()]
        return header + sum(-(-size // 32) * 32 for size in sizes)


def rounded(job: tuple[str, Type, str]) -> tuple[tuple[str, Type, str], np.ndarray | None, float]:
    """A matrix in a type, read back, and its predicted cost. `how`: plain (no importance), imatrix, or compensated at a shrinkage."""
    name, kind, how = job
    lab, curve, inputs = STATE["lab"], STATE["curvature"], STATE["imatrix"]
    values = lab.values[name]
    if values.shape[1] % ggml.block_size(kind):
        return job, None, 0.0
    try:
        if how in ("plain", "imatrix"):
            packed = ggml.quantize(values, kind, inputs[name] if how == "imatrix" else None)
        else:
            packed = compensate.Rounding(curve.moments, how != "curvature", float(how) if how != "curvature" else 0.0).quantize(
                name, values, kind
            )
    except Exception:
        return job, None, 0.0  # a type that wants importance
    read = ggml.dequantize(packed, kind)
    errors = read - values
    cost = 0.0
    if name == curve.head:
        cost += curve.head_cost(values, errors)
    if name == curvature.EMBEDDING:
        cost += curve.lookup_cost(errors)
    if name.startswith("blk."):
        cost += curve.cost(name, errors)
    return job, read, cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("carry", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="medquad")
    parser.add_argument("--header", type=int, default=1_800_000, help="bytes of the file's metadata and tokenizer")
    parser.add_argument("--seconds", type=float, default=240, help="measure no more files after that long")
    given = parser.parse_args()
    import torch

    began = time.time()
    torch.manual_seed(0)
    lab = Lab(given.carry, given.work, given.model, given.task, "cuda" if torch.cuda.is_available() else "cpu")
    curve = curvature.collect(lab.model, lab.calibration, lambda share, text: None)
    inputs = {name: np.ascontiguousarray(np.diag(curve.moments(name)), dtype=np.float32) for name in lab.matrices if name in curve.source}
    STATE.update(lab=lab, curvature=curve, imatrix=_imatrix(lab) | {n: v for n, v in inputs.items() if n == curve.head})
    print(
        f"{time.time() - began:.0f} s: curvature of {curve.answers} answer tokens, {sum(r.n_trained for r in lab.sealed)} sealed",
        flush=True,
    )

    stock = [name for name, kind in gguf_types.FILE_TYPES.items() if kind.base in sensitivity.CANDIDATES]
    shape = gguf_types.Shape(lab.config.num_hidden_layers, lab.config.num_attention_heads, lab.config.num_key_value_heads, "llama")
    wanted: dict[str, tuple[dict[str, Type], str]] = {}  # name -> types, how
    for name in stock:
        for how in ("plain", "imatrix"):
            types = {n: c.type for n, c in gguf_types.plan(lab.shapes, name, shape, how == "imatrix").items() if n in lab.matrices}
            wanted[f"{name} {how}"] = types, how
            for other in EMBEDDINGS if how == "imatrix" else ():
                wanted[f"{name} {how} embedding={other.name}"] = types | {curve.head: other, curvature.EMBEDDING: other}, how
    bodies = (Type.Q4_0, Type.IQ4_NL, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
    for body in bodies:
        for other in EMBEDDINGS:
            types = dict.fromkeys(lab.matrices, body) | {n: other for n in (curve.head, curvature.EMBEDDING) if n in lab.matrices}
            wanted[f"uniform {body.name} embedding={other.name}"] = types, "imatrix"
    for how in ("curvature", *map(str, SHRINK)):
        wanted[f"uniform Q4_0 {how}"] = dict.fromkeys(lab.matrices, Type.Q4_0), how
        wanted[f"uniform IQ4_NL {how}"] = dict.fromkeys(lab.matrices, Type.IQ4_NL), how

    menus = ("imatrix", "curvature", "0.05")
    jobs = {(n, kind, how) for types, how in wanted.values() for n, kind in types.items()}
    jobs |= {(n, kind, how) for n in lab.matrices for kind in sensitivity.candidates(lab.values[n].shape[1]) for how in menus}
    read: dict[tuple[str, Type, str], np.ndarray] = {}
    costs: dict[tuple[str, Type, str], float] = {}
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for job, values, cost in pool.imap_unordered(rounded, sorted(jobs), chunksize=4):
            if values is not None:
                read[job], costs[job] = values, cost
    print(f"{time.time() - began:.0f} s: {len(read)} rounded matrices", flush=True)

    for how in menus:
        options = {
            n: tuple(
                Option(kind.name, -(-len(lab.values[n]) * ggml.row_bytes(kind, lab.values[n].shape[1]) // 32) * 32, costs[n, kind, how])
                for kind in sensitivity.candidates(lab.values[n].shape[1])
                if (n, kind, how) in costs
            )
            for n in lab.matrices
        }
        fixed = lab.bytes({}, given.header) - sum(-(-4 * v.size // 32) * 32 for v in lab.values.values())
        menu = Menu(options, fixed)
        for budget in BUDGETS:
            if budget * MB >= menu.smallest().size_bytes:
                plan = menu.plan(budget * MB)
                wanted[f"plan {budget} MB {how}"] = {n: Type[t] for n, t in plan.types.items()}, how
    rows: list[dict[str, Any]] = []
    order = sorted(wanted, key=lambda name: (not name.startswith("plan"), "embedding" in name, name))
    for name in order:
        types, how = wanted[name]
        size = lab.bytes(types, given.header)
        missing = any((n, kind, how) not in read for n, kind in types.items())
        if missing or size > 150 * MB or (time.time() - began > given.seconds and "embedding" in name):
            continue
        found = lab.measure({n: read[n, kind, how] for n, kind in types.items()})
        rows.append({"name": name, "size_bytes": size, "predicted_kl": sum(costs[n, k, how] for n, k in types.items()), **found})
        print(
            f"{size / MB:7.2f} MB  KL {found['kl']:.4f} ({rows[-1]['predicted_kl']:.4f} predicted)  loss {found['loss']:.4f}  {name}",
            flush=True,
        )
    print(f"{time.time() - began:.0f} s; loss of the reference {rows[0]['reference_loss']:.4f}")
    print("\n".join(verdicts(rows)))


def _imatrix(lab: Lab) -> dict[str, np.ndarray]:
    """llama.cpp's importance: the plain mean square of every column's input, on the same training rows."""
    import torch

    total: dict[str, Any] = {}
    names = {s.name.removesuffix(".weight"): n for n, s in lab.sources.items() if n in lab.matrices and n.startswith("blk.")}
    modules = dict(lab.model.named_modules())

    def add(name: str, x: Any) -> None:
        total[name] = total.get(name, 0) + x.reshape(-1, x.shape[-1]).square().sum(0)

    hooks = [modules[module].register_forward_pre_hook(lambda m, x, n=n: add(n, x[0])) for module, n in names.items()]
    tokens = 0
    with torch.no_grad():
        for row in lab.calibration:
            lab.model.base_model(input_ids=torch.tensor([row.ids], device=lab.device))
            tokens += len(row.ids)
    for hook in hooks:
        hook.remove()
    return {name: (sums / tokens).cpu().numpy() for name, sums in total.items()}


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Each budget: the best plan, the best stock recipe up to 3 % above it, the best uniform control."""
    lines = []
    for budget in BUDGETS:
        plans = [r for r in rows if r["name"].startswith(f"plan {budget} MB")]
        fitting = [r for r in rows if not r["name"].startswith("plan") and r["size_bytes"] <= budget * MB * 1.03]
        stock = [r for r in fitting if not r["name"].startswith("uniform")]
        control = [r for r in fitting if r["name"].startswith("uniform") and "embedding" in r["name"]]
        for plan in plans:
            line = f"{plan['name']}: {plan['size_bytes'] / MB:.2f} MB KL {plan['kl']:.4f} loss {plan['loss']:.4f}"
            for what, rivals in (("stock", stock), ("uniform", control)):
                if rivals:
                    best = min(rivals, key=lambda r: r["kl"])
                    difference = np.array(plan["row_losses"]) - np.array(best["row_losses"])
                    low, high = evaluate.interval(difference, np.full(len(difference), len(difference) / len(difference)))
                    line += (
                        f"; {plan['kl'] / best['kl']:.2f}x best {what} ({best['name']}, {best['size_bytes'] / MB:.1f} MB, {best['kl']:.4f}), "
                        f"loss a row {difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
                    )
            lines.append(line)
    return lines


if __name__ == "__main__":
    main()
