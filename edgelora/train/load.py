"""Load a base the way training sees it: in 4-bit NF4, or as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from edgelora.errors import ModelError, Unsupported

Method = Literal["qlora", "lora"]


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def own_device() -> str:
    """The device of this process: of several on one machine each has its own GPU, as accelerate numbers them."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device() == "cuda" else "cpu"


def arithmetic(wish: str) -> Any:
    """The torch dtype that training computes in; Unsupported when this machine cannot compute in the one asked for.

    `auto` is bf16 where the processor has it, else fp16 on a GPU and fp32 on a CPU (there bf16 would be emulated and slower).
    """
    import torch

    from edgelora import machine

    on_gpu = device() == "cuda"
    bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if on_gpu
        else bool({"avx512_bf16", "amx_bf16", "bf16"} & set(machine.cpu_features()))
    )
    if wish == "auto":
        return torch.bfloat16 if bf16 else torch.float16 if on_gpu else torch.float32
    if wish == "fp16" and not on_gpu:
        raise Unsupported("train.dtype fp16 needs a GPU: it wants a loss scaler and kernels that CPUs lack", "write dtype: auto")
    if wish == "bf16" and on_gpu and not bf16:
        raise Unsupported("train.dtype bf16: this GPU has no bf16 arithmetic", "write dtype: fp16, or auto")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wish]


def load_base(folder: Path, method: Method, dtype: Any, attention: str = "sdpa", place: str | None = None) -> Any:
    """A base on this process's device, or in `place`, ready for an adapter. `qlora`: NF4 with double quantization (Dettmers et al. 2023)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": place or own_device()}, "local_files_only": True}
    options["attn_implementation"] = attention
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        raise ModelError(
            f"{folder.name} cannot be loaded as a base: {error}", "see `edgelora doctor`; the folder needs config.json and *.safetensors"
        ) from error
    _one_path(model)
    model.config.use_cache = False
    return model


def _one_path(model: Any) -> None:
    """Keep bitsandbytes on the kernels that training uses.

    In evaluation on a processor with AVX512-BF16 it would repack the weights for another kernel (bitsandbytes 0.50,
    Linear4bit.forward): other rounding than training saw, and packed weights afterwards.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
