"""Write a .pte file: `python write_executorch.py JOB.json` in the environment "executorch"; `edgelora.export.executorch` writes the job.

The transformer, its attention and its cache are ExecuTorch's own (examples/models/llama), so the graph is the one that its kernels and
its runners for phones expect. What its command line adds is left out: a second trace of the whole model, a checkpoint in another
layout, and rotations of some models only.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import grid  # noqa: E402
import torch  # noqa: E402
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # noqa: E402
    XnnpackDynamicallyQuantizedPartitioner,
    XnnpackPartitioner,
)
from executorch.examples.models.llama.llama_transformer import construct_transformer  # noqa: E402
from executorch.examples.models.llama.model_args import ModelArgs  # noqa: E402
from executorch.examples.models.llama.source_transformation.custom_kv_cache import replace_kv_cache_with_custom_kv_cache  # noqa: E402
from executorch.examples.models.llama.source_transformation.quantize import EmbeddingQuantHandler  # noqa: E402
from executorch.examples.models.llama.source_transformation.sdpa import replace_sdpa_with_custom_op  # noqa: E402
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower  # noqa: E402
from executorch.exir.passes import MemoryPlanningPass  # noqa: E402
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_  # noqa: E402
from torchao.quantization.granularity import PerAxis, PerGroup  # noqa: E402
from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor  # noqa: E402


def say(share: float, text: str) -> None:
    sys.stdout.write(f"edgelora {share} {text}\n")
    sys.stdout.flush()


def model_of(job: dict[str, Any]) -> Any:
    """ExecuTorch's transformer with the model's weights in float32 and its own rotations."""
    with torch.device("meta"):
        model = construct_transformer(ModelArgs(**job["params"]))
    absent, strange = model.load_state_dict(weights(job), strict=False, assign=True)
    if strange or any(name.endswith(("weight", "bias")) for name in absent):
        raise ValueError(f"the weights do not fit the model: {[*strange, *absent][:3]}")
    angles = torch.outer(torch.arange(job["params"]["max_context_len"]).double(), torch.tensor(job["inv_freq"]).double()).repeat(1, 2)
    model.rope.freqs_cos = (angles.cos() * job["attention_factor"]).float()
    model.rope.freqs_sin = (angles.sin() * job["attention_factor"]).float()
    return model.eval().requires_grad_(False)


def weights(job: dict[str, Any]) -> dict[str, Any]:
    """Name -> tensor in float32."""
    files = {name: path for path in Path(job["folder"]).glob("*.safetensors") for name in safe_open(path, "pt").keys()}  # noqa: SIM118  it is no dict
    found = {}
    for name, (tensor, first, end) in job["tensors"].items():
        with safe_open(files[tensor], "pt") as source:
            found[name] = source.get_slice(tensor)[first:end].float()
    return found


def read_off(weight: Any, block_size: Any, smallest: int, largest: int) -> tuple[Any, Any]:
    """Codes and scales of weights that lie on the grid; stands in for torchao's half-quadratic search."""
    scale = torch.from_numpy(grid.steps(weight.numpy(), block_size[1], signed=True))
    return torch.round(weight / scale.repeat_interleave(block_size[1], 1)).to(torch.int32), scale


def quantized(model: Any, bits: int, group: int, on_grid: bool) -> Any:
    """Matrices as signed integers, in groups or by row, activations rounded to 8 bits as they come; the embedding in the same bits."""
    if not bits:
        return model
    if on_grid:
        intx_unpacked_to_int8_tensor._choose_qparams_and_quantize_scale_only_hqq = read_off
    model = EmbeddingQuantHandler(model, bitwidth=bits, group_size=group, packed=bits == 4).quantized_model()
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4 if bits == 4 else torch.int8,
        weight_granularity=PerGroup(group) if group else PerAxis(0),
        intx_choose_qparams_algorithm="hqq_scale_only",
    )
    quantize_(model, config)
    return model


def exported(model: Any, context: int) -> Any:
    """The graph of `forward(tokens, {"input_pos": first position})` for 1 to context - 1 tokens."""
    model = replace_kv_cache_with_custom_kv_cache(replace_sdpa_with_custom_op(model))
    tokens, more = (torch.tensor([[2, 3, 4]]),), {"attn_options": {"input_pos": torch.tensor([0])}}
    shapes = {"tokens": {1: torch.export.Dim("tokens", max=context - 1)}, "attn_options": {"input_pos": {0: 1}}}
    with sdpa_kernel([SDPBackend.MATH]), torch.no_grad():
        return torch.export.export(model, tokens, more, dynamic_shapes=shapes, strict=False)


def lowered(program: Any, methods: dict[str, Any]) -> Any:
    """The program of the file: matrices that are rounded go to XNNPACK first, then whatever else it takes."""
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=methods,
    )
    return edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            do_quant_fusion_and_const_prop=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )


def main(job: dict[str, Any]) -> None:
    say(0.05, "reading the weights")
    model = model_of(job)
    say(0.1, "rounding the weights")
    model = quantized(model, job["bits"], job["group"], job["on_grid"])
    say(0.2, "tracing the model")
    program = exported(model, job["params"]["max_context_len"])
    say(0.3, "lowering it to XNNPACK")
    made = lowered(program, job["methods"])
    say(0.95, "writing the file")
    with open(job["output"], "wb") as stream:
        made.write_to_file(stream)


if __name__ == "__main__":
    with open(sys.argv[1]) as stream:
        main(json.load(stream))
