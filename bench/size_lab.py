"""What `size_plan.py` works with: a model whose matrices can be stored in any type, and run on a GPU or in llama.cpp.

Rounding is done by ggml (or on its grids with compensation) in processes of their own, which know nothing of torch; they
take arrays from files and leave packed bytes in files. A job that is not finished in time is left out, never waited for.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora import evaluate
from edgelora.data.chat import Encoded
from edgelora.quant import curvature, ggml, sensitivity
from edgelora.quant.compensate import Rounding
from edgelora.quant.curvature import EMBEDDING, Curvature
from edgelora.quant.ggml import Type

TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class How:
    """A way of rounding: `curve` names the folder of the curvature, `shrink` is None for ggml's own rounding.

    `importance`: "none", "imatrix" (plain mean squares, as llama.cpp measures) or "moments" (the curvature's).
    """

    name: str
    importance: str
    curve: str = ""
    shrink: float | None = None


@dataclass(frozen=True)
class Job:
    """One matrix of a model ("tuned" or "base") in one type."""

    model: str
    matrix: str
    type: Type
    how: How

    def file(self, place: Path) -> Path:
        return place / self.model / self.how.name.replace(" ", "_") / f"{self.matrix}.{self.type.name}.npy"


# ---- rounding, in processes without torch ----


class Arrays(Mapping[str, np.ndarray]):
    """Arrays in a folder, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._folder / f"{name}.npy"
        if not file.is_file():
            raise KeyError(name)
        return np.load(file, mmap_mode="r")

    def __iter__(self) -> Iterator[str]:
        return (file.stem for file in self._folder.glob("*.npy"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def keep(arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


def keep_curvature(found: Curvature, folder: Path) -> None:
    keep({name: found.moments(name) for name in found.source}, folder / "inputs")
    keep(
        {name: found.judges[found.source[name]] for name in found.outputs if name in found.source and found.source[name] in found.judges},
        folder / "judges",
    )
    keep(found.outputs, folder / "outputs")
    keep({"states": found.states, "lookups": found.lookups}, folder)


def stored_curvature(folder: Path, head: str) -> Curvature:
    inputs, own = Arrays(folder / "inputs"), Arrays(folder)
    return Curvature(
        inputs,
        Arrays(folder / "judges"),
        {name: name for name in inputs},
        Arrays(folder / "outputs"),
        own["states"],
        own["lookups"],
        head,
        0,
    )


def round_one(job: Job, place: Path, head: str, together: int) -> tuple[Job, float]:
    """Leave the packed bytes in `place`; the cost that the curvature predicts, 0 without one. `together`: how many matrices there are."""
    values = np.load(place / job.model / "values" / f"{job.matrix}.npy")
    curve = stored_curvature(place / job.how.curve, head) if job.how.curve else None

    def moments(name: str) -> np.ndarray | None:
        if job.how.importance == "none":
            return None
        if job.how.importance == "imatrix":
            known = Arrays(place / "imatrix")
            return np.diag(known[name]) if name in known else None
        assert curve is not None
        return np.array(curve.moments(name)) if name in curve.source else None

    rounding = Rounding(moments, job.how.shrink is not None, job.how.shrink or 0.0)
    packed = rounding.quantize(job.matrix, values, job.type)
    file = job.file(place)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, packed)
    if curve is None:
        return job, 0.0
    common = sensitivity.taken_back(job.matrix, values, curve)
    return job, sensitivity.cost(job.matrix, values, packed, job.type, curve, common, together)


class Pool:
    """Processes that start from nothing (a fork of a process with CUDA and BLAS threads may stand still), one thread each."""

    def __init__(self, processes: int) -> None:
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        self._start = lambda: multiprocessing.get_context("spawn").Pool(processes)
        self._pool = self._start()

    def __call__(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
        """Results of those calls that ended well within `seconds`; the others are forgotten."""
        deadline = time.monotonic() + seconds
        waiting = [self._pool.apply_async(function, args) for args in arguments]
        found, lost = [], []
        for result in waiting:
            try:
                found.append(result.get(max(0.0, deadline - time.monotonic())))
            except multiprocessing.TimeoutError:
                lost.append("not in time")
            except Exception as error:
                lost.append(f"{type(error).__name__}: {error}")
        if lost:
            print(f"{len(lost)} of {len(waiting)} left out, the first: {lost[0][:200]}", flush=True)
        if "not in time" in lost:
            self.close()
            self._pool = self._start()
        return found

    def close(self) -> None:
        self._pool.terminate()


# ---- the model ----


class Lab:
    """A model on a device, its matrices in the file's order, and rows to judge on."""

    def __init__(self, folder: Path, checkpoints: Mapping[str, Any], device: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from edgelora.export import architectures

        torch.backends.cuda.matmul.allow_tf32 = False
        self.device, self.folder, self.checkpoints = device, folder, checkpoints
        self.config = AutoConfig.from_pretrained(folder)
        shapes = checkpoints["tuned"].shapes
        found = architectures.of(self.config.model_type).tensors(self.config)
        self.sources = {name: source for name, source in found.items() if source.name in shapes}
        self.shapes = {name: shapes[source.name] for name, source in self.sources.items()}
        self.matrices = [name for name, shape in self.shapes.items() if len(shape) == 2]
        self.head = "output.weight" if "output.weight" in self.sources else EMBEDDING
        self.model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).to(device).eval().requires_grad_(False)
        self.modules = dict(self.model.named_modules())
        self.show("tuned")

    def show(self, model: str) -> None:
        """Run this model, in full precision."""
        import torch

        weights = self.checkpoints[model]
        state = {s.name: torch.from_numpy(weights.rows(s.name).reshape(weights.shapes[s.name])) for s in self.sources.values()}
        self.model.load_state_dict(state, strict=False)
        self.model.tie_weights()

    def values(self, model: str, name: str) -> np.ndarray:
        """A matrix in the file's order, float32."""
        import torch

        source = self.sources[name]
        values = self.checkpoints[model].rows(source.name)
        return values if source.change is None else np.asarray(source.change.do(torch.from_numpy(values), self.config).numpy())

    def place(self, name: str, values: Any) -> None:
        """Run with `values` (a tensor in the file's order) for a matrix."""
        import torch

        source = self.sources[name]
        if source.change is not None:
            order = source.change.do(torch.arange(len(values), dtype=torch.float32)[:, None], self.config)[:, 0].long().to(values.device)
            values = torch.empty_like(values).index_copy_(0, order, values)
        self.modules[source.name.removesuffix(".weight")].weight.data = values

    def predictions(self, rows: Sequence[Encoded]) -> Iterator[tuple[list[int], Any, Any]]:
        """Batches: which rows, log-probabilities where an answer token is predicted (tokens, vocabulary), and the true ids."""
        import torch

        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        while order:
            group = order[: max(1, TOKENS_AT_ONCE // len(rows[order[min(len(order), TOKENS_AT_ONCE // 32) - 1]].ids))]
            order = order[len(group) :]
            longest = max(len(rows[i].ids) for i in group)
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            scored = torch.zeros(len(group), longest, dtype=torch.bool)
            for row, i in enumerate(group):
                ids[row, : len(rows[i].ids)] = torch.tensor(rows[i].ids)
                scored[row, : len(rows[i].ids) - 1] = torch.tensor(rows[i].trained[1:])
            ids, scored = ids.to(self.device), scored.to(self.device)
            with torch.no_grad():
                hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                logits = self.model.lm_head(hidden[scored])
            true = torch.cat([ids[row, 1:][scored[row, :-1]] for row in range(len(group))])
            yield group, torch.log_softmax(logits, -1), true

    def measure(self, rows: Sequence[Encoded], reference: Sequence[Any]) -> dict[str, np.ndarray]:
        """By row: KL from `reference` (of `predictions`, batch by batch) and loss, nats; answer tokens that are the first choice; tokens."""
        import torch

        nats, losses, hits = (np.zeros(len(rows)) for _ in range(3))
        for (group, q, true), p in zip(self.predictions(rows), reference, strict=True):
            kl = (p.exp() * (p - q)).sum(-1)
            loss, hit = -q.gather(1, true[:, None])[:, 0], q.argmax(-1) == true
            sizes = [rows[i].n_trained for i in group]
            for values, target in ((kl, nats), (loss, losses), (hit.float(), hits)):
                target[group] = [float(part.double().sum()) for part in torch.split(values.cpu(), sizes)]
        return {"nats": nats, "losses": losses, "hits": hits, "tokens": np.array([row.n_trained for row in rows])}


class Files:
    """Files of a model, by the type of every matrix: their exact size, run on the device, or written for llama.cpp."""

    def __init__(self, lab: Lab, place: Path) -> None:
        from edgelora.export import gguf

        self.lab, self.folder = lab, place
        self.fixed, self.matrices = gguf.matrices(lab.folder, "plan", lab.checkpoints["tuned"])
        self._tensors: dict[Job, Any] = {}  # on the device

    def bytes(self, types: Mapping[str, Type]) -> int:
        return self.fixed + sum(self.matrices[name].bytes(kind) for name, kind in types.items())

    def load(self, model: str, types: Mapping[str, Type], how: How) -> bool:
        """Put the rounded matrices into the lab's model; False when one was not made in time."""
        jobs = [Job(model, name, kind, how) for name, kind in types.items()]
        if not all(job in self._tensors or job.file(self.folder).exists() for job in jobs):
            return False
        for job in jobs:
            self.lab.place(job.matrix, self._tensor(job))
        return True

    def forget(self) -> None:
        """Free the device."""
        self._tensors.clear()

    def _tensor(self, job: Job) -> Any:
        import torch

        if job not in self._tensors:
            self._tensors[job] = torch.from_numpy(ggml.dequantize(np.load(job.file(self.folder)), job.type)).to(self.lab.device)
        return self._tensors[job]

    def write(self, model: str, types: Mapping[str, Type], how: How, target: Path) -> Path:
        """The GGUF file itself, out of the bytes that were measured."""
        from edgelora.export import gguf

        place = self.folder
        whole = {name: self.lab.values(model, name) for name in {EMBEDDING, self.lab.head}}

        class Stored(Rounding):
            """Bytes that were packed before; a large matrix is asked for in ranges of rows, found by their first row."""

            def quantize(self, name: str, values: np.ndarray, type: Type) -> np.ndarray:
                packed = np.load(Job(model, name, type, how).file(place), mmap_mode="r")
                if len(packed) == len(values):
                    return np.array(packed)
                starts = np.flatnonzero((whole[name][:, :8] == values[0, :8]).all(1))
                first = next(i for i in starts if np.array_equal(whole[name][i : i + len(values)], values))
                return np.array(packed[first : first + len(values)])

        by_hand = [f"^{name.replace('.', '[.]')}$={kind.name.lower()}" for name, kind in types.items()]
        target.mkdir(parents=True, exist_ok=True)
        asked = {name: np.ones(self.lab.shapes[name][1], np.float32) for name in types}  # some types may not be written without importance
        written = gguf.write(
            self.lab.folder, "q8_0", target, "plan", lambda share, text: None, asked, by_hand, self.lab.checkpoints[model],
            Stored(lambda name: None, False, 0.0),
        )  # fmt: skip
        assert written.stat().st_size == self.bytes(types)
        return written


def in_llama_cpp(file: Path, rows: Sequence[Encoded], reference: Path) -> dict[str, np.ndarray]:
    """By row, in llama.cpp on one thread: as `Lab.measure`, but `hits` are those of the reference, a file a row. The file is removed."""
    from edgelora.runtime import llama_cpp

    known = [np.load(reference / f"{i}.npy", mmap_mode="r") for i in range(len(rows))]
    with llama_cpp.open(file, 1) as session:
        found = evaluate.divergence(known, session, rows)
    shutil.rmtree(file.parent)
    return {"nats": found.nats, "losses": found.losses.nats, "hits": found.agreed, "tokens": found.tokens}


def imatrix(lab: Lab, rows: Sequence[Encoded]) -> dict[str, np.ndarray]:
    """llama.cpp's importance: the plain mean square of every column's input, of all tokens of training rows."""
    import torch

    total: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def add(module: Any, given: Any) -> None:
            x = given[0].reshape(-1, given[0].shape[-1])
            total[name] = total.get(name, 0) + x.square().sum(0)

        return lab.modules[lab.sources[name].name.removesuffix(".weight")].register_forward_pre_hook(add)

    hooks = [watch(name) for name in lab.matrices if name.startswith("blk.")]
    with torch.no_grad():
        for row in rows:
            lab.model.base_model(input_ids=torch.tensor([row.ids], device=lab.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    tokens = sum(len(row.ids) for row in rows)
    return {name: (sums / tokens).cpu().numpy() for name, sums in total.items()}


def curve(lab: Lab, rows: Sequence[Encoded]) -> Curvature:
    learned, judged = curvature.divided(rows)
    found = curvature.collect(lab.model, learned, lambda share, text: None, judged)
    assert math.isfinite(found.answers)
    return found
