"""Write a .litertlm file: `python write_litert.py JOB.json` in the environment "litert"; `edgelora.export.litert` writes the job.

The graph is the exporter's (litert-torch), traced once in float32, then rounded by Google's quantizer. The bundle around it is put
together here: the exporter's own would add ends of answers made of text, and a template that LiteRT-LM's engine may not run.
"""

import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ai_edge_quantizer
import grid
import litert_lm
import litert_lm_builder as bundles
from ai_edge_litert import schema_py_generated
from ai_edge_quantizer import algorithm_manager
from ai_edge_quantizer import recipe as recipes
from ai_edge_quantizer.algorithms.uniform_quantize import naive_min_max_quantize
from litert_lm_builder.runtime.proto import llm_metadata_pb2, llm_model_type_pb2


def say(share: float, text: str) -> None:
    print(f"edgelora {share} {text}", flush=True)


def exporter() -> Callable[..., None]:
    """litert-torch's exporter, without TensorFlow.

    It imports one module of TensorFlow that it does not declare: the schema of .tflite files, which LiteRT brings along.

        The name is given away while the exporter is imported, and taken back: transformers would take TensorFlow as installed.
    """
    import torch._dynamo  # noqa: F401  before: it looks for TensorFlow too
    import transformers  # noqa: F401

    lent: dict[str, Any] = {name: types.ModuleType(name) for name in ("tensorflow", "tensorflow.lite", "tensorflow.lite.python")}
    for name, module in lent.items():
        module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
    lent["tensorflow.lite.python"].schema_py_generated = schema_py_generated
    lent["tensorflow.lite.python.schema_py_generated"] = schema_py_generated
    sys.modules.update(lent)
    from litert_torch.generative.export_hf import export

    for name in lent:
        del sys.modules[name]
    found: Callable[..., None] = export.export
    return found


def traced(job: dict[str, Any]) -> str:
    """The path of the graph in float32: a block of a prompt, and one token."""
    exporter()(
        model=job["model"],
        output_dir=job["scratch"],
        prefill_lengths=[job["block"]],
        cache_length=job["context"],
        quantization_recipe="none",
        keep_temporary_files=True,
        bundle_litert_lm=False,
    )
    return os.path.join(job["scratch"], "model.tflite")


def rounded(graph: str, job: dict[str, Any]) -> str:
    """The path of the graph with its matrices rounded by the quantizer's recipe of that name; None leaves them."""
    if job["rounding"] is None:
        return graph
    if job["grid"]:
        for op, materialize in algorithm_manager.MIN_MAX_OP_NAME_MATERIALIZE_FUNC_DICT.items():
            algorithm_manager.register_quantized_op(
                algorithm_manager.AlgorithmName.MIN_MAX_UNIFORM_QUANT,
                op,
                naive_min_max_quantize.init_qsvs,
                calibration_func=naive_min_max_quantize.min_max_calibrate,
                materialize_func=partial(materialize, partial(read_off, job["grid"])),
            )
    quantizer = ai_edge_quantizer.Quantizer(graph)
    quantizer.load_quantization_recipe(getattr(recipes, job["rounding"])())
    target = os.path.join(job["scratch"], "rounded.tflite")
    quantizer.quantize().export_model(target, overwrite=True)
    return target


def read_off(block: int, op: Any, config: Any, weights: Any = None, span: Any = None) -> Any:
    """The quantizer's parameters of weights that lie on the grid: it divides the largest value by the largest code."""
    if weights is not None:
        largest = grid.LARGEST * grid.steps(weights, block, signed=True)
        span = {"min": -largest, "max": largest}
    return naive_min_max_quantize.get_tensor_quant_params(op, config, weights, span)


def bundle(graph: str, template: str, job: dict[str, Any]) -> None:
    metadata = llm_metadata_pb2.LlmMetadata(max_num_tokens=job["context"], jinja_prompt_template=template)
    metadata.llm_model_type.CopyFrom(llm_model_type_pb2.LlmModelType(generic_model=llm_model_type_pb2.GenericModel()))
    for i in job["stop_ids"]:
        metadata.stop_tokens.add().token_ids.ids.append(i)
    path = os.path.join(job["scratch"], "metadata.pb")
    with open(path, "wb") as stream:
        stream.write(metadata.SerializeToString())
    builder = bundles.LitertLmFileBuilder()
    builder.add_llm_metadata(path)
    builder.add_hf_tokenizer(job["tokenizer"])
    builder.add_tflite_model(graph, bundles.TfLiteModelType.PREFILL_DECODE)
    with open(job["output"], "wb") as stream:
        builder.build(stream)


def runnable(job: dict[str, Any]) -> str | None:
    """The first of the templates that LiteRT-LM's engine renders as training did, with a bundle at hand; None when it runs none of them.

    `conversations`: pairs of messages and what they should render to. The engine logs what it cannot run and renders nothing.
    """
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
    with litert_lm.Engine(job["output"], backend=litert_lm.Backend.CPU(thread_count=1), cache_dir=":nocache") as engine:
        for template in job["templates"]:
            if all(rendered(engine, template, messages) == expected for messages, expected in job["conversations"]):
                return str(template)
    return None


def rendered(engine: Any, template: str, messages: Sequence[tuple[str, str]]) -> str | None:
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        with engine.create_conversation(messages=turns[:-1], chat_template=template) as conversation:
            return str(conversation.render_message_to_string(turns[-1]))
    except RuntimeError:  # it does not even parse
        return None


def main(job: dict[str, Any]) -> None:
    say(0.02, "tracing the model")
    graph = traced(job)
    say(0.9, "rounding")
    graph = rounded(graph, job)
    say(0.95, "trying the chat template in LiteRT-LM")
    first = job["templates"][0]
    bundle(graph, first, job)
    template = runnable(job)
    if template is None:
        print("edgelora refused LiteRT-LM's template engine does not render the chat template as training did", flush=True)
    elif template != first:
        bundle(graph, template, job)


if __name__ == "__main__":
    with open(sys.argv[1]) as stream:
        main(json.load(stream))
