"""Whether a training fits a device's memory, said before anything is loaded, and what would fit where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from edgelora import machine, outline, processes
from edgelora import recipe as recipes
from edgelora.errors import EdgeloraError, UsageError
from edgelora.outline import Outline
from edgelora.report.figures import size as shown
from edgelora.train import load
from edgelora.train.estimate import CONTEXT_BYTES, Device, Estimate, training


def chosen(base: Outline, train: recipes.Train, lengths: Sequence[int], device: Device) -> Device:
    """`device`, with the base divided among its processes where `train.shard` says so: with `auto` where the training fits only then."""
    if device.processes == 1:
        if train.shard == "always":
            raise UsageError(
                "train.shard: always divides the base among several processes, and this is one", "add --gpus N, or write shard: auto"
            )
        return device
    divided = dataclasses.replace(device, shard=True)
    if train.shard == "auto":
        return divided if not training(base, train, lengths, device).fits and training(base, train, lengths, divided).fits else device
    return divided if train.shard == "always" else device


def place(predicted: Estimate) -> str:
    """Where a base that will be divided is loaded: on the GPU where it fits, else in the machine's memory, from where it goes over layer by layer.

    EdgeloraError when all processes of this machine together do not find room for it there.
    """
    if predicted.loaded_bytes + CONTEXT_BYTES <= predicted.device.memory_bytes:
        return load.own_device()
    needed, free = processes.here() * predicted.loaded_bytes, machine.available_memory_bytes()
    if needed > free:
        raise EdgeloraError(
            f"{processes.here()} processes load the base in {shown(needed)} of this machine's memory (an estimate), {shown(free)} are free",
            "free memory, or take fewer GPUs",
        )
    return "cpu"


def require(base: Outline, train: recipes.Train, lengths: Sequence[int], device: Device, valid_tokens: int = 0) -> Estimate:
    """The estimate of a training that fits `device`; EdgeloraError with what would fit, for one that does not."""
    predicted = training(base, train, lengths, device, valid_tokens)
    if predicted.fits:
        return predicted
    each = f" on each of {device.processes} devices" if device.processes > 1 else ""
    raise EdgeloraError(
        f"training {base.name} needs about {shown(predicted.needed_bytes)} of memory{each} (an estimate), {shown(device.memory_bytes)} are free",
        would_fit(base, train, lengths, device),
    )


def would_fit(base: Outline, train: recipes.Train, lengths: Sequence[int], device: Device) -> str:
    """The settings under which the training fits, the least intrusive first; else the largest known base that does."""
    together = train.batch * train.accumulate
    changes: list[dict[str, Any]] = [{"batch": n, "accumulate": together // n} for n in range(train.batch - 1, 0, -1) if together % n == 0]
    changes.append({"checkpointing": True})
    changes.append({"batch": 1, "accumulate": together, "checkpointing": True})
    if train.method == "lora":
        changes = [*changes, {"method": "qlora"}, *({"method": "qlora"} | change for change in changes)]
    for change in changes:
        tried = training(base, dataclasses.replace(train, **change), lengths, device)
        if tried.fits and dataclasses.replace(train, **change) != train:
            words = ", ".join(f"train.{key}: {str(value).lower()}" for key, value in change.items())
            return f"this would fit: {words} (about {shown(tried.needed_bytes)})"
    least = dataclasses.replace(train, **changes[-1])
    for other in outline.smaller(base.parameters):
        tried = training(other, least, lengths, device)
        if tried.fits:
            return f"no setting makes it fit; a smaller base would, for instance {other.name} with train.batch 1 and train.checkpointing (about {shown(tried.needed_bytes)})"
    return "no setting and no base known here fits: free memory, or take another machine (edgelora estimate compares them)"
