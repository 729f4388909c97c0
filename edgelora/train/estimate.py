"""What a training run will need, said before it starts. Estimates: labelled as such wherever they are shown.

Memory on a GPU is counted from the shapes that `layer`, `projection`, `loss` and the optimizer hold at the two moments when most is
held: while the loss is made, and while the last layer goes backwards. Nothing in it is fitted but a constant for what
the libraries keep. Against the seventeen runs in `bench/results/h100-80gb/*-train-speed.json` (135M to 70B) it is at most 5 % off.

Time is what the arithmetic, the attention and the passes over memory take at the rates of the device, each times a factor that was
fitted on the same runs (at most 8 % off), or the time to launch all the kernels where that is longer.
`probe` replaces both by what a few steps really took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgelora import recipe as recipes
from edgelora.errors import EdgeloraError
from edgelora.outline import Outline
from edgelora.train import adapter, fit
from edgelora.train.dealing import Division, deal, rounded_up

_SCALES = 1 / 64 + 4 / 16384  # bytes a weight: a byte a block of 64, 4 bytes every 256 blocks (double quantization)
NF4 = 0.5 + _SCALES
CONTEXT_BYTES = 0.6e9  # what CUDA and its libraries take of a GPU beside torch's own memory
_PIECE = {"cuda": 1 << 28, "cpu": 1 << 23}  # logits at once: loss._PIECE
_LIBRARIES = {"cuda": 0.15e9, "cpu": 0.57e9}  # cuBLAS's workspaces; a CPU's process before it loads the base
_SHORT = 256  # tokens: attention._KEPT
# Bytes that transformers' and peft's own layers keep of a token in bf16, for every unit of hidden, inner, attention and key sizes:
# solved from what autograd saved in tiny models of five sizes each.
_PLAIN = {"qwen3": (28, 10, 12, 8), "gemma3_text": (36, 10, 12, 8), "phi3": (20, 10, 6, 6)}
_PLAIN_LLAMA, _DORA = (28, 10, 12, 4), (48, 25, 16, 16)
_DROPOUT = {"cpu": (20, 4, 0, 0), "cuda": (15, 3, 0, 0)}  # what each of seven inputs becomes, and its mask: a byte on a GPU
_SCATTERED = 1.2  # many small pieces leave gaps in a CPU's heap
_HOLES = 2.3  # so do the kept probabilities, between what was made in fp32 on the way to them
_RATES_S = 0.25
_SAMPLE = 8192  # rows that are dealt to see how large a batch gets

# Seconds = sum of factor x work / rate, fitted on one H100 (see above): products, attention's products, passes over what a layer
# keeps, weights written out of 4 bits. On a CPU: two cores of an AMD EPYC.
_PRODUCTS = {"cuda": 0.94, "cpu": 1.3}
_ATTENTION = {"flash": 3.6, "cuDNN": 0.88, "blocks": 5.0}
_PASSES = {"cuda": 17.7, "cpu": 5.0}
# As many times more passes by transformers' and peft's own layers: an 8B with checkpointing reaches 5,524 tokens/s on the same card.
_PLAIN_PASSES = {"cuda": 3.0, "cpu": 7.0}
_WRITE_OUT = 2.6
_STEP_S = 0.015  # optimizer, clipping, batches, log
_LAUNCH_S = {"recorded": 0.0, "fused": 0.0021, "plain": 0.013}  # host time to launch one layer, forward and backward
_START_S, _READ_BYTES_PER_S = 4.0, 1e9  # the first kernels; reading the base and rounding it to 4 bits


@dataclass(frozen=True)
class Device:
    """What a training runs on. `memory_bytes` of a GPU are all of its own, of a CPU what the process may take; rates are those that programs reach."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: float
    matmul_flop_per_s: float
    bandwidth_bytes_per_s: float
    bf16: bool = True
    attention: Literal["cuDNN", "flash", "blocks"] = "flash"  # what computes it: `attention.kernel`
    processes: int = 1  # that share the rows of an update, each on a device of its own like this one
    shard: bool = False  # and the base


@dataclass(frozen=True)
class Estimate:
    """Memory (bytes; of each device), how an update is cut, and time (seconds) of one training."""

    device: Device
    parts: Mapping[str, float]  # what the peak consists of
    cut: fit.Cut
    kernels: str  # fused, or why not
    tokens: int  # of all epochs
    steps: int
    step_s: float
    start_s: float  # loading
    valid_s: float  # the losses that choose an epoch
    least_bytes: float = 0.0  # below which `fit.cut` would not even try
    loaded_bytes: float = 0.0  # the whole base, however it is divided afterwards

    @property
    def peak_bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> float:
        """What has to be free on the device: on a GPU more than torch's own count; on a CPU less, as the kernel can drop pages of a file."""
        context = CONTEXT_BYTES if self.device.kind == "cuda" else 0.0
        return max(self.peak_bytes - self.parts.get("mapped", 0) + context, self.least_bytes)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.device.memory_bytes

    @property
    def seconds(self) -> float:
        return self.start_s + self.steps * self.step_s + self.valid_s

    @property
    def tok_per_s(self) -> float:
        """While it trains, loading apart."""
        return self.tokens / (self.steps * self.step_s)

    def figures(self) -> dict[str, float]:
        """Peak memory (`peak_rss_bytes` on a CPU, `peak_gpu_bytes` on a GPU) and time, as a training reports them afterwards."""
        name = "peak_gpu_bytes" if self.device.kind == "cuda" else "peak_rss_bytes"
        return {name: round(self.peak_bytes), "seconds": round(self.seconds, 1)}


def training(outline: Outline, train: recipes.Train, lengths: Sequence[int], device: Device, valid_tokens: int = 0) -> Estimate:
    """Predict a training on rows of `lengths` tokens each, cut as `finetune.make_trainer` would cut it on `device`.

    `valid_tokens` are those of the rows whose loss is taken after every epoch.
    """
    job = _Job.of(outline, train, device)
    cut = job.cut(lengths)
    recorded = device.kind == "cuda" and job.why is None and cut.keep
    sample = lengths[:_SAMPLE]
    tokens, together = sum(lengths), train.batch * train.accumulate
    most = max(sum(sample[i] for i in batch) for rows in deal(sample, together) for batch in cut.division.batches(sample, rows))
    again = 1 + cut.recompute / job.shape.layers / 2  # forwards a second time: a third of the products, and nothing kept for them
    step_s = tokens / len(lengths) * together * job.token_s(lengths, cut) * again / device.processes
    if device.kind == "cuda":
        launch = _LAUNCH_S["recorded" if recorded else "fused" if job.why is None else "plain"]
        step_s = max(step_s, cut.steps * job.shape.layers * launch * again) + _STEP_S
    return Estimate(
        device=device,
        parts=job.memory(cut, rounded_up(most) if recorded else most, max(lengths), recorded=recorded),
        cut=cut,
        kernels="fused" if job.why is None else f"plain: {job.why}",
        tokens=round(tokens * train.epochs),
        steps=max(1, math.ceil(math.ceil(len(lengths) / together) * train.epochs)),
        step_s=step_s,
        start_s=_START_S + 2 * outline.parameters / _READ_BYTES_PER_S,
        valid_s=step_s * valid_tokens / (tokens / len(lengths) * together) / 3 * math.ceil(train.epochs),
        least_bytes=job.least(max(lengths)),
        loaded_bytes=job.loaded,
    )


@dataclass(frozen=True)
class _Job:
    """What memory and time are counted from. `size` is that of a number that is computed with, `trained` counts the adapter's."""

    outline: Outline
    train: recipes.Train
    device: Device
    shape: fit.Shape
    why: str | None
    size: int
    trained: int

    @classmethod
    def of(cls, outline: Outline, train: recipes.Train, device: Device) -> _Job:
        config = outline.config
        heads = int(config["num_attention_heads"])
        shape = fit.Shape(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            inner=int(config["intermediate_size"]),
            attention=heads * outline.head,
            keys=int(config.get("num_key_value_heads") or heads) * outline.head,
            linear=outline.linear,
        )
        wide = train.dtype == "fp32" or (train.dtype == "auto" and device.kind == "cpu" and not device.bf16)
        trained = adapter.parameters(outline.shapes, train)
        return cls(outline, train, device, shape, obstacle(outline, train, device), 4 if wide else 2, trained)

    @property
    def held(self) -> float:
        """Bytes of the base, or of this process's part of it and what stays whole."""
        return self.loaded - (self._divided * (1 - 1 / self.device.processes) if self.device.shard else 0.0)

    @property
    def loaded(self) -> float:
        """Bytes of the base as it is loaded."""
        rest = self.outline.parameters - self.shape.linear
        return self._divided + self.shape.linear * (_SCALES if self.train.method == "qlora" else 0.0) + rest * self.size

    @property
    def _divided(self) -> float:
        """Bytes of what `shards` divides."""
        return self.shape.linear * (0.5 if self.train.method == "qlora" else self.size)

    @property
    def gathered(self) -> float:
        """Bytes of a divided base that are whole at once."""
        return fit.GATHERED * self._divided / self.shape.layers if self.device.shard else 0.0

    @property
    def kept_free(self) -> float:
        return fit.reserved(self._divided, self.shape.layers, self.trained) if self.device.shard else 0.0

    @property
    def held_as_stored(self) -> float:
        """Bytes of the base that are its file's own pages: what is neither rounded nor widened."""
        rest = self.outline.parameters - self.shape.linear
        return 0.0 if self.size == 4 else 2.0 * (rest if self.train.method == "qlora" else self.outline.parameters)

    def cut(self, lengths: Sequence[int]) -> fit.Cut:
        """How `finetune.make_trainer` cuts a step; of what cannot fit, the least that could be tried."""
        train, layers = self.train, self.shape.layers
        if self.why is not None or self.device.kind == "cpu":
            division = Division.of(train.batch, train.accumulate, self.device.processes)
            return fit.Cut(division, keep=self.why is None and not self.device.shard, recompute=layers if train.checkpointing else 0)
        free = self.device.memory_bytes - CONTEXT_BYTES - self.held - 4 * self.trained
        together, processes = train.batch * train.accumulate, self.device.processes
        try:
            return fit.cut(
                self.shape, lengths[:_SAMPLE], together, processes, free, recompute=train.checkpointing, kept_free=self.kept_free
            )
        except EdgeloraError:
            return fit.Cut(Division(together, 1, processes), keep=False, recompute=layers)

    def least(self, longest: int) -> float:
        """What a GPU has to have for the layers to be replaced at all; nothing is asked of one where they are not."""
        if self.why is not None or self.device.kind == "cpu":
            return 0.0
        return CONTEXT_BYTES + self.held + 4 * self.trained + fit.least_free(self.shape, longest, self.kept_free)

    def memory(self, cut: fit.Cut, tokens: int, longest: int, *, recorded: bool) -> dict[str, float]:
        """Bytes at the worst moment, `tokens` being those of the largest batch."""
        s, size, cpu = self.shape, self.size, self.device.kind == "cpu"
        written = 0.0
        if self.why is None:
            # [[W, B], [A', .]] of every projection, or one buffer for the largest beside copies of A and B
            copies = size * self.trained
            written = copies + (size * s.linear if cut.keep else size * 2 * s.hidden * s.inner)
            if cut.keep and self.train.method == "lora" and not cpu:
                written -= size * s.linear  # the base's own weights are those
        kept = (s.layers - cut.recompute) * self._kept(longest) + cut.recompute * size * s.hidden
        passing = size * 4 * (s.inner + s.hidden) + (self._kept(longest) if cut.recompute == s.layers else 0)
        # The last norm is transformers' own and keeps its input twice in fp32; then the hidden states that predict, and their gradients.
        vocabulary = int(self.outline.config["vocab_size"])
        rows = max(16, _PIECE[self.device.kind] // vocabulary)
        more = min(max(tokens - rows, 0), rows)  # the last piece is there while the next is made
        pieces = size * vocabulary * (min(tokens, rows) + more)
        if cpu:
            pieces += 8 * vocabulary * min(tokens, rows)  # in fp32, twice
        loss = tokens * (12 + 2 * size) * s.hidden + pieces
        return {
            "libraries": _LIBRARIES[self.device.kind],
            "base": self.held,
            **({"gathered": self.gathered} if self.device.shard else {}),
            **({"mapped": 2.0 * self.outline.parameters - self.held_as_stored} if cpu else {}),
            "written_out": written,
            # fp32 weight, gradient, two moments; a copy of gradients while recording; two while they are added up
            "adapter": (20 if recorded else 16) * self.trained + (8 * self.trained if self.device.processes > 1 else 0),
            "activations": tokens * kept,
            "working": max(loss, tokens * passing),
        }

    def _kept(self, longest: int) -> float:
        """Bytes that one layer keeps of a token until it goes backwards."""
        s, heads = self.shape, int(self.outline.config["num_attention_heads"])
        probabilities = 0.0
        if self.device.kind == "cpu" and longest <= _SHORT:
            probabilities = _HOLES * self.size * heads * longest
        if self.why is not None:
            units: tuple[int, ...] = (
                _DORA if self.train.variant == "dora" else _PLAIN.get(str(self.outline.config.get("model_type")), _PLAIN_LLAMA)
            )
            if self.train.dropout > 0:
                units = tuple(a + b for a, b in zip(units, _DROPOUT[self.device.kind], strict=True))
            sizes = (s.hidden, s.inner, s.attention, s.keys)
            kept = self.size / 2 * sum(a * b for a, b in zip(units, sizes, strict=True)) + 28 * self.train.r
            return kept * (_SCATTERED if self.device.kind == "cpu" else 1) + probabilities
        low = 7 * self.train.r * self.size
        return self.size * 2 * (s.hidden + s.attention + s.keys + s.inner) + 4 * heads + low + probabilities

    def token_s(self, lengths: Sequence[int], cut: fit.Cut) -> float:
        """Seconds a token, forwards, backwards and its loss, when nothing waits for launches and nothing is recomputed."""
        s, device = self.shape, self.device
        vocabulary = int(self.outline.config["vocab_size"])
        sample = lengths[:_SAMPLE]
        reach = sum(n * n for n in sample) / sum(sample)  # tokens of the row that a token is in, on average
        products = 4 * s.linear + 6 * self.trained + 4 * vocabulary * s.hidden
        attention = s.layers * 7 * s.attention * reach
        passes = 1.0 * s.layers * self.size * 2 * (s.hidden + s.attention + s.keys + s.inner)
        if self.why is not None:
            passes *= _PLAIN_PASSES[device.kind]
        seconds = (_PRODUCTS[device.kind] * products + _ATTENTION[device.attention] * attention) / device.matmul_flop_per_s
        seconds += _PASSES[device.kind] * passes / device.bandwidth_bytes_per_s
        if not cut.keep and self.train.method == "qlora":  # for each use, once a micro-step
            micro = cut.rows * sum(lengths) / len(lengths)
            seconds += _WRITE_OUT * 5 * s.linear / device.bandwidth_bytes_per_s / micro
        return seconds


def obstacle(outline: Outline, train: recipes.Train, device: Device) -> str | None:
    """Why transformers' and peft's own layers would run, None for those of `layer`: what `layer.obstacle` asks of the loaded model."""
    kind = outline.config.get("model_type")
    if kind not in fit.KINDS:
        return f"model type {kind}"
    if train.variant == "dora":
        return "variant dora"
    if train.dropout > 0:
        return "train.dropout"
    if train.dtype == "fp16" or (train.dtype == "auto" and device.kind == "cuda" and not device.bf16):
        return "train.dtype fp16"
    return None


def peak_bytes(figures: Mapping[str, float]) -> float:
    """The memory that decides, of predicted or measured figures: the GPU's where one trains."""
    return figures["peak_gpu_bytes"] if "peak_gpu_bytes" in figures else figures["peak_rss_bytes"]


def full_finetune_bytes(parameters: int) -> int:
    """Weights, gradients and two Adam moments of full fine-tuning in mixed precision: 16 bytes a parameter (ZeRO, Rajbhandari et al. 2020)."""
    return 16 * parameters


def here(dtype: str = "auto", threads: int | None = None) -> Device:
    """This machine, its rates measured: about a second. `threads` of a CPU; all its cores without."""
    import torch

    from edgelora import machine, processes
    from edgelora.train import attention, load

    kind, place = load.device(), load.own_device()
    if kind == "cuda":
        name, memory = torch.cuda.get_device_name(place), float(torch.cuda.mem_get_info(place)[0]) + CONTEXT_BYTES
    else:
        name, memory = "this machine's CPU", float(machine.available_memory_bytes() + machine.peak_rss_bytes())
    torch.set_num_threads(threads or machine.cores())
    matmul, bandwidth = _rates(place, load.arithmetic(dtype))
    if kind == "cuda":  # what was measured with counts neither as taken nor as the training's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place)
    kernel: Any = attention.kernel(load.arithmetic(dtype))
    bf16 = load.arithmetic("auto") == torch.bfloat16
    return Device(name, "cuda" if kind == "cuda" else "cpu", memory, matmul, bandwidth, bf16, kernel, processes.count())


def _rates(place: str, dtype: Any) -> tuple[float, float]:
    """FLOP/s of a square product and bytes a second of a copy."""
    import torch

    side, copied = (8192, 1 << 26) if place != "cpu" else (1024, 1 << 24)
    a, b = torch.ones(side, side, dtype=dtype, device=place), torch.zeros(copied, dtype=torch.float32, device=place)
    return 2 * side**3 / _fastest(lambda: a @ a, place), 8 * copied / _fastest(b.clone, place)


def _fastest(work: Any, place: str) -> float:
    """Seconds of the fastest of at least four, of all that end within a quarter of a second: a GPU at rest has to raise its clock first."""
    import torch

    best, begun = math.inf, time.perf_counter()
    done = 0
    while done < 4 or time.perf_counter() - begun < _RATES_S:
        started = time.perf_counter()
        work()
        if place != "cpu":
            torch.cuda.synchronize(place)
        best, done = min(best, time.perf_counter() - started), done + 1
    return best
