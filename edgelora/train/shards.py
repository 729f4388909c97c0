"""A base that is divided among processes: each holds a part of every layer's frozen weights, and a whole layer only while it runs.

torch's FSDP 2 does it (`fully_shard`), a decoder layer at a time: it gathers a layer when its `forward` is called and again when its
gradients come back, and the next layer meanwhile. What is divided are the matrices of the layers, nearly all of a base.
Embedding, norms, head, the scales of 4-bit blocks (a 32nd of the weights) and the adapter stay whole in every process, so gradients,
checkpoints and files are those of a base that is not divided.

Bytes of 4-bit weights travel as fp32 numbers: integers are what FSDP does not always take, and on a GPU it copies 16-bit numbers by way of
fp32, where those that are no numbers all become one (bitsandbytes issue 1945). So what a layer first runs with is compared with what was divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from edgelora import processes
from edgelora.errors import EdgeloraError
from edgelora.train import load

_PARTS = 64
_HINT = "train.shard: never leaves the base whole in each of them"


@dataclass(frozen=True)
class Shards:
    """Bytes of the divided weights: of all of them, and of the parts that this process holds."""

    whole_bytes: int
    held_bytes: int


def shard(model: Any) -> Shards:
    """Divide the base of a peft model among all processes, wherever it was loaded, each part on its process's device.

    EdgeloraError when a process then holds more than its part.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder, place = model.get_base_model().get_decoder(), torch.device(load.own_device())
    mesh = init_device_mesh(place.type, (processes.count(),))
    inside = {id(module) for layer in decoder.layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module._apply(lambda tensor: tensor.to(place), recurse=False)
    whole = part = 0
    for layer in decoder.layers:
        layer.to(place)
        for module, name, weight in _weights(layer):
            setattr(module, name, _as_floats(module, weight))
        divided = [weight for _, _, weight in _weights(layer)]
        watch(layer)
        whole += sum(_bytes(weight) for weight in divided)
        part += sum(_bytes(weight[: -(-len(weight) // mesh.size())]) for weight in divided)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=set(layer.parameters()) - set(divided))
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))  # holds nothing; the layers prefetch each other through it
    made = Shards(whole, sum(_bytes(weight) for layer in decoder.layers for _, _, weight in _weights(layer)))
    check(made, part)
    return made


def watch(layer: nn.Module) -> None:
    """EdgeloraError the first time that a decoder layer runs with other frozen matrices than those of now, by the sums of the bytes of 64 parts."""
    known = [_sums(weight) for _, _, weight in _weights(layer)]

    def compare(layer: nn.Module, inputs: Any) -> None:
        handle.remove()
        for (module, name, weight), sums in zip(_weights(layer), known, strict=True):
            if not torch.equal(_sums(weight), sums):
                raise EdgeloraError(
                    f"the {name} of a {type(module).__name__} came back changed from the other processes",
                    _HINT,
                )

    handle = layer.register_forward_pre_hook(compare)  # FSDP's own goes before it


def check(made: Shards, part: int) -> None:
    """EdgeloraError unless every process holds at most `part` bytes, and all of them together each byte once."""
    held = [int(n) for n in processes.all_of(made.held_bytes)]
    if sum(held) != made.whole_bytes or max(held) > part:
        raise EdgeloraError(
            f"{made.whole_bytes:,} bytes of frozen weights were divided among {len(held)} processes, {part:,} for each, "
            f"but they hold {' and '.join(f'{n:,}' for n in held)}",
            _HINT,
        )


def _weights(layer: nn.Module) -> list[tuple[Any, str, nn.Parameter]]:
    """The frozen matrices in a decoder layer: module, name there, weight."""
    own = ((module, name, weight) for module in layer.modules() for name, weight in module.named_parameters(recurse=False))
    return [(module, name, weight) for module, name, weight in own if weight.ndim > 1 and not weight.requires_grad]


def _as_floats(module: Any, weight: Any) -> nn.Parameter:
    """A weight as FSDP takes it; `quant_state`, what its 4 bits mean, goes over to the module."""
    if getattr(weight, "quant_state", None) is None:
        return nn.Parameter(weight.data, requires_grad=False)
    if weight.data.nbytes % 4:
        raise EdgeloraError(
            f"a weight of {weight.data.nbytes:,} bytes in 4 bits cannot be divided: they are no multiple of 4",
            _HINT,
        )
    module.quant_state = weight.quant_state
    return nn.Parameter(weight.data.view(-1).view(torch.float32).unsqueeze(1), requires_grad=False)


def _sums(weight: torch.Tensor) -> torch.Tensor:
    """Sums of the bytes of a weight, int64, one for each of 64 parts."""
    parts = weight.detach().contiguous().view(-1).view(torch.uint8).chunk(_PARTS)
    return torch.stack([part.sum(dtype=torch.int64) for part in parts])


def _bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight that this process holds."""
    held = weight.to_local() if isinstance(weight, DTensor) else weight
    return held.numel() * held.element_size()
