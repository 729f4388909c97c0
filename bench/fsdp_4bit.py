"""Does FSDP split a base that bitsandbytes holds in 4 bits, and does it still train as without?

    accelerate launch --multi_gpu --num_processes 2 --main_process_port 0 bench/fsdp_4bit.py --version 2 --storage bfloat16

A tiny random llama in NF4 with LoRA, plain transformers and peft, wrapped by accelerate's FSDP 1 or 2; `--storage` is the type that
bitsandbytes keeps the packed weights in. Prints one JSON line: bytes of 4-bit weights on the first process over their
total, and the losses of four updates on one batch beside those of the same model unwrapped. What came of it: NOTES.md.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def build(storage: torch.dtype, device: str, adapter: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, use_cache=False
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            made = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=storage
            )
            made.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", quant_storage=storage, module=made
            )  # fmt: skip
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made)
    model = model.to(device).requires_grad_(False)
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
    return model


def losses(model: Any, backward: Any, optimizer: Any, device: str) -> list[float]:
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def local_bytes(model: Any) -> tuple[int, int]:
    """Bytes of frozen parameters that this process holds, and those of 4-bit ones among them as far as they can be told apart."""
    frozen = packed = 0
    for parameter in model.parameters():
        held = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not parameter.requires_grad:
            frozen += held.numel() * held.element_size()
            packed += held.numel() * held.element_size() * isinstance(parameter, bnb.nn.Params4bit)
    return frozen, packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", type=int, choices=[1, 2], required=True)
    parser.add_argument("--storage", choices=["uint8", "bfloat16"], required=True)
    options = parser.parse_args()
    on_cpu = not torch.cuda.is_available()
    device = "cpu" if on_cpu else f"cuda:{os.environ['LOCAL_RANK']}"
    found: dict[str, Any] = vars(options) | {"torch": torch.__version__}
    try:
        adapter = torch.bfloat16 if options.version == 1 else torch.float32
        plain = build(getattr(torch, options.storage), device, adapter)
        model = build(getattr(torch, options.storage), device, adapter)
        found["bytes_whole"], found["packed_whole"] = local_bytes(plain)
        trained = [p for p in plain.parameters() if p.requires_grad]
        found["losses_plain"] = losses(plain, torch.Tensor.backward, torch.optim.AdamW(trained, lr=1e-3), device)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=options.version, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False, reshard_after_forward=True if options.version == 2 else "FULL_SHARD",
        )  # fmt: skip
        accelerator = Accelerator(fsdp_plugin=plugin, cpu=on_cpu)
        found["kind"] = str(accelerator.distributed_type)
        if options.version == 1:
            from peft.utils.other import fsdp_auto_wrap_policy

            plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
            model = accelerator.prepare(model)
            optimizer = accelerator.prepare(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3))
        else:
            model, optimizer = accelerator.prepare(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3))
        found["bytes_here"], found["packed_here"] = local_bytes(model)
        found["losses_split"] = losses(model, accelerator.backward, optimizer, device)
    except Exception as error:
        found["error"] = repr(error)[:400]
        if os.environ.get("RANK") == "0":
            traceback.print_exc()
    if os.environ.get("RANK") == "0":
        print(json.dumps(found), flush=True)
    os._exit(0)  # where one process failed the other one would wait


if __name__ == "__main__":
    main()
