"""A base and its adapter straight to GGUF: how much memory and disk it takes, and how long beside llama.cpp's own two steps.

    python bench/stream_export.py memory                      # 7B shape, Q4_K_M, 13.5 GB of safetensors made and deleted
    python bench/stream_export.py time --llama-cpp SOURCES    # 1.07B shape, Q4_K_M and Q4_0, in turns
    python bench/stream_export.py command                     # the same two files, by the command that users type

memory  `edgelora export BASE --adapter DIR --format gguf --type q4_k_m --base 16bit`, verification included, in a process
        whose private writable memory may not exceed 3 GiB (RLIMIT_DATA). Sampled: its resident anonymous memory (RssAnon),
        and the bytes of the folder it writes into.
time    ours: the pass that writes the file, from bfloat16 safetensors and a LoRA to the quantized file on the disk (fsync
        included), without its verification. Theirs: convert_hf_to_gguf.py to F16, then llama_model_quantize with as many
        threads, from the same weights without a LoRA; neither flushes. Wall time of whole processes, imports included,
        page cache warm, in turns. Both quantize with the libggml-base that llama-cpp-python carries. SOURCES is
        vendor/llama.cpp of llama-cpp-python's unpacked sdist.
command `edgelora export`, as in `memory`: the model as trained is run in float32, the file opened in llama.cpp and compared
        with it. They do nothing of the kind, so this is set against nothing.

The weights are random and small enough that the model is calm: its verification passes. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import results

from edgelora import artifact, machine, models
from tests.tiny_models import tiny_tokenizer

HERE = Path(__file__).resolve()
LIMIT = 3 << 30  # bytes of private writable memory
RANK = 16
KINDS = ("q4_k_m", "q4_0")
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
           "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096},
    "1.07b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
              "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 4096},
}  # fmt: skip


def checkpoint(shape: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Write a random Llama in bfloat16, in shards of one layer's matrices; returns the shapes of its weights."""
    from transformers import LlamaConfig

    values = SHAPES[shape]
    tokenizer = tiny_tokenizer("smollm")
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**values, **ids, rms_norm_eps=1e-5)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    key_values = config.num_key_value_heads * hidden // config.num_attention_heads
    layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_values, hidden), "self_attn.v_proj": (key_values, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    parts = [{f"model.layers.{i}.{name}.weight": dims for name, dims in layer.items()} for i in range(config.num_hidden_layers)]
    ends = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    parts.append(ends if config.tie_word_embeddings else ends | {"lm_head.weight": (config.vocab_size, hidden)})
    noise = np.random.default_rng(0).standard_normal(1 << 25, dtype=np.float32)
    index = {}
    for number, shapes in enumerate(parts):
        file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for name, dims in shapes.items():
            header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [end, end + 2 * int(np.prod(dims))]}
            end, index[name] = header[name]["data_offsets"][1], file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for turn, (name, dims) in enumerate(shapes.items()):
                size = int(np.prod(dims))
                spread = _spread(name, config)
                drawn = (
                    np.ones(size, np.float32) if "norm" in name else spread * np.resize(np.roll(noise, 999983 * (7 * number + turn)), size)
                )
                stream.write((drawn.view(np.uint32) >> 16).astype(np.uint16).tobytes())  # bfloat16 by cutting
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return {name: dims for shapes in parts for name, dims in shapes.items()}


def _spread(name: str, config: Any) -> float:
    """Of a matrix's values, so that what the layers add stays small beside what they are given: rounding then moves few answers."""
    if name.endswith("embed_tokens.weight") and not config.tie_word_embeddings:
        return 1.0
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return 0.032 / config.num_hidden_layers
    return 0.02


def adapter(shapes: dict[str, tuple[int, ...]], base: Path, out: Path) -> artifact.Artifact:
    """A random LoRA on every linear layer, as `edgelora finetune` would leave it."""
    from safetensors.numpy import save_file

    chance, halves = np.random.default_rng(1), {}
    for name, dims in shapes.items():
        if name.endswith("_proj.weight"):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            halves[f"{key}.lora_A.weight"] = chance.standard_normal((RANK, dims[1]), dtype=np.float32) / dims[1] ** 0.5
            halves[f"{key}.lora_B.weight"] = 0.001 * chance.standard_normal((dims[0], RANK), dtype=np.float32)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "base_model_name_or_path": "random",
              "target_modules": sorted({name.split(".")[-2] for name in shapes if name.endswith("_proj.weight")})}  # fmt: skip

    def make(folder: Path) -> dict[str, Any]:
        save_file(halves, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return {"method": "lora"}

    key = models.open_base(str(base), Path(), out).key
    return artifact.build(out, "adapter", "adapter", make, made_from={"base": key}, recipe={}, versions={})


class Watch(threading.Thread):
    """Peak of a process's resident anonymous memory and of the bytes below a folder, sampled every 50 ms."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.folder = process, folder
        self.anonymous = self.disk = 0

    def run(self) -> None:
        while self.process.poll() is None:
            try:
                status = Path(f"/proc/{self.process.pid}/status").read_text()
                self.anonymous = max(
                    self.anonymous, *(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))
                )
                self.disk = max(self.disk, sum(p.stat().st_blocks * 512 for p in self.folder.rglob("*") if p.is_file()))
            except (OSError, TypeError):
                pass  # it ended, or a file went between two looks
            time.sleep(0.05)


def memory(work: Path) -> dict[str, Any]:
    base, out = work / "base", work / "out"
    base.mkdir()
    shapes = checkpoint("7b", base)
    made = adapter(shapes, base, work / "adapters")
    out.mkdir()
    started = time.monotonic()
    process = subprocess.Popen(
        command(base, made, "q4_k_m", out),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "MALLOC_ARENA_MAX": "2"},
    )
    watch = Watch(process, out)
    watch.start()
    said, _ = process.communicate()
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(f"the export failed with {process.returncode}")
    facts = json.loads(said)
    return {
        "weights": sum(int(np.prod(dims)) for dims in shapes.values()),
        "base_bytes": sum(p.stat().st_size for p in base.glob("*.safetensors")),
        "limit_bytes": LIMIT,
        "peak_anonymous_bytes": watch.anonymous,
        "temporary_disk_bytes": watch.disk - facts["size_bytes"],
        "seconds": seconds,
        "file": {key: facts[key] for key in ("size_bytes", "predicted_bytes", "kl", "top1", "rows", "tokens")},
    }


def command(base: Path, made: artifact.Artifact, kind: str, out: Path) -> list[str]:
    """`edgelora export` of an adapter in one type."""
    line = [sys.executable, "-m", "edgelora.cli", "export", base, "--adapter", made.path, "--base", "16bit", "--format", "gguf"]
    return [str(part) for part in (*line, "--type", kind, "--out", out, "--json")]


def commands(work: Path) -> dict[str, Any]:
    base = work / "base"
    base.mkdir()
    shapes = checkpoint("1.07b", base)
    made = adapter(shapes, base, work / "adapters")
    taken = {kind: timed(*command(base, made, kind, work / kind)[1:]) for kind in KINDS}
    return {"weights": sum(int(np.prod(dims)) for dims in shapes.values()), "taken": taken}


_OURS = """
import sys
from pathlib import Path
from edgelora.export import gguf
from edgelora.weights import Merged
base, adapter, kind, folder = map(Path, sys.argv[1:])
gguf.write(base, str(kind), folder, "ours", lambda share, name: None, weights=Merged(base, adapter, "16bit"))
"""
_QUANTIZE = """
import sys, llama_cpp
from gguf import LlamaFileType
source, target, kind, threads = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.nthread = LlamaFileType["MOSTLY_" + kind.upper()], int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings))
"""


def timed(*command: Any) -> dict[str, float]:
    """Wall and CPU seconds of a process."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"s": time.monotonic() - started, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def turns(work: Path, sources: Path, rounds: int) -> dict[str, Any]:
    base = work / "base"
    base.mkdir()
    shapes = checkpoint("1.07b", base)
    made = adapter(shapes, base, work / "adapters")
    f16, theirs = work / "f16.gguf", work / "theirs.gguf"
    samples = []
    for number in range(rounds):
        convert = timed(HERE.parents[1] / "tests" / "llama_cpp_converter.py", sources, base, f16)
        for kind in KINDS:
            ours = timed("-c", _OURS, base, made.path, kind, work)
            quantize = timed("-c", _QUANTIZE, f16, theirs, kind, machine.cores())
            sizes = [(work / f"ours-{kind}.gguf").stat().st_size, theirs.stat().st_size]
            samples.append({"round": number, "type": kind, "convert": convert, "ours": ours, "quantize": quantize, "sizes": sizes})
            print(samples[-1], file=sys.stderr)
    best = {
        kind: {step: min(sample[step]["s"] for sample in samples if sample["type"] == kind) for step in ("ours", "convert", "quantize")}
        for kind in KINDS
    }
    return {"weights": sum(int(np.prod(dims)) for dims in shapes.values()), "best_s": best, "samples": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "time", "command"])
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    if options.what == "time" and options.llama_cpp is None:
        parser.error("time needs --llama-cpp")
    needed = 20e9 if options.what == "memory" else 8e9
    if shutil.disk_usage(options.work).free < needed:
        sys.exit(f"{options.work} has less than {needed / 1e9:.0f} GB free: name another folder with --work")
    command = f"python bench/stream_export.py {options.what}"
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        if options.what == "time":
            command += f" --llama-cpp SOURCES --rounds {options.rounds}"
            found = turns(work, options.llama_cpp, options.rounds)
        else:
            found = memory(work) if options.what == "memory" else commands(work)
    results.save(f"stream-export-{options.what}", command, PACKAGES, HEADLINES[options.what](found), found)


def memory_headline(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("weights", f"{found['weights'] / 1e9:.1f}B"),
        ("peak anonymous memory", f"{found['peak_anonymous_bytes'] / 1e9:.2f} GB"),
        ("temporary disk", f"{found['temporary_disk_bytes'] / 1e6:.0f} MB"),
        ("time", f"{found['seconds']:.0f} s"),
    ]


def time_headline(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            f"{kind} against llama.cpp's converter and quantizer, best times",
            f"{b['ours']:.1f} s against {b['convert']:.1f} + {b['quantize']:.1f} s: {b['ours'] / (b['convert'] + b['quantize']):.2f}",
        )
        for kind, b in found["best_s"].items()
    ]


def command_headline(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"edgelora export to {kind}, verified", f"{taken['s']:.0f} s") for kind, taken in found["taken"].items()]


PACKAGES = ("torch", "numpy", "gguf", "llama-cpp-python", "transformers")
HEADLINES = {"memory": memory_headline, "time": time_headline, "command": command_headline}


if __name__ == "__main__":
    main()
