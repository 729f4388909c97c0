"""onnxruntime-genai's model builder, in a process of its own: it rewrites sys.path, keeps a gigabyte or two, prints a lot."""

from __future__ import annotations

import collections
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from edgelora.errors import ModelError
from edgelora.export import child
from edgelora.progress import Progress


def run(model: Path, options: Sequence[str], scratch: Path, layers: int, progress: Progress) -> None:
    """Run the builder into ``scratch/model``; ModelError with the last meaningful line of its output when it fails."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(model), "--output", str(scratch / "model")]
    command += ["--execution_provider", "cpu", "--cache_dir", str(scratch / "cache"), *options]
    tail: collections.deque[str] = collections.deque(maxlen=200)

    def hear(line: str) -> None:
        tail.append(line)
        if match := re.match(r"Reading layer (\d+)", line):
            progress(0.05 + 0.35 * int(match[1]) / layers, f"reading layer {match[1]} of {layers}")
        elif match := re.match(r"Progress: \[.*\] ([\d.]+)%", line):
            progress(0.4 + 0.5 * float(match[1]) / 100, "quantizing")

    if code := child.run(command, scratch, child.environment(scratch), hear):
        raise _failure(tail, code, model)


def readable(model: Path, scratch: Path) -> Path:
    """`model`, or a folder of links to its files whose config.json says what the builder looks for elsewhere than transformers 5 puts it.

    Gemma 3: the rotary settings of both kinds of layer at one place, and float32, since the builder adds one to the norms'
    weights in the type that they are stored in. Phi-3 without LongRoPE: the two lengths of the context equal, or it is taken for one with.
    Phi-3 with LongRoPE: the scaling's name under its old key. SmolLM3: layers without rotation as if they had one, which `onnx_graph` takes out again; the builder stops at them.
    """
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rope = values.get("rope_parameters") or {}
    if values.get("model_type") == "gemma3_text" and "full_attention" in rope:
        near, far = rope["sliding_attention"], rope["full_attention"]
        values["rope_parameters"] = rope | {
            "rope_type": "default",
            "rope_theta": far["rope_theta"],
            "rope_local_base_freq": near["rope_theta"],
        }
        values["dtype"] = "float32"
    elif values.get("model_type") == "phi3" and rope.get("rope_type", "default") == "default":
        values["original_max_position_embeddings"] = values.get("max_position_embeddings")
    elif values.get("model_type") == "phi3":
        values["rope_parameters"] = rope | {"type": rope["rope_type"]}
    elif values.get("model_type") == "smollm3":
        values["no_rope_layers"] = [1] * int(values["num_hidden_layers"])
    else:
        return model
    described = scratch / "described"
    described.mkdir()
    for path in model.iterdir():
        if path.is_file() and path.name != "config.json":
            (described / path.name).symlink_to(path)
    (described / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return described


def _failure(tail: collections.deque[str], code: int, model: Path) -> Exception:
    """The builder's own last words as an error; a full disk as the OSError it was."""
    for line in tail:
        if "no space left" in line.lower():
            return OSError(f"the ONNX builder: {line}")
    if code < 0:
        cause = f"was ended by {signal.Signals(-code).name}"
        return ModelError(f"the ONNX builder {cause} on {model.name}", "this is usually too little memory: close other programs")
    said = (line for line in reversed(tail) if line.strip() and not line.startswith((" ", "Progress:")))
    last = next(said, "it printed nothing")[:400]
    return ModelError(f"the ONNX builder cannot export {model.name}: {last}", "export it as GGUF instead")
