"""onnxruntime-genai's model builder, in a process of its own: it rewrites sys.path, keeps a gigabyte or two, prints a lot.

It runs without network and without credentials, and dies with us.
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgelora.errors import ModelError

Progress = Callable[[float, str], None]


def run(model: Path, options: Sequence[str], scratch: Path, layers: int, progress: Progress) -> None:
    """Run the builder into ``scratch/model``; ModelError with the last meaningful line of its output when it fails."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(model), "--output", str(scratch / "model")]
    command += ["--execution_provider", "cpu", "--cache_dir", str(scratch / "cache"), *options]
    tail: collections.deque[str] = collections.deque(maxlen=200)
    # Its own working folder, so that no onnx.py of the user's is imported; its own session, so that it dies whole.
    with subprocess.Popen(
        command,
        cwd=scratch,
        env=environment(scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_us(),
    ) as process:
        try:
            for line in _lines(process):
                tail.append(line)
                if match := re.match(r"Reading layer (\d+)", line):
                    progress(0.05 + 0.35 * int(match[1]) / layers, f"reading layer {match[1]} of {layers}")
                elif match := re.match(r"Progress: \[.*\] ([\d.]+)%", line):
                    progress(0.4 + 0.5 * float(match[1]) / 100, "quantizing")
            code = process.wait()
        except BaseException:
            _kill(process)
            raise
    if code:
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


def environment(scratch: Path) -> dict[str, str]:
    """For the child only: no network, no credentials, one thread, every temporary file inside `scratch`."""
    ours = {name: value for name, value in os.environ.items() if not name.endswith("_TOKEN")}
    folders = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch / "tmp")) | {"HF_HOME": str(scratch / "home")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    fixed = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
    return ours | folders | threads | fixed


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Lines of the child's output; a carriage return ends one too, as progress bars use it."""
    assert process.stdout is not None
    rest = b""
    while block := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
        *whole, rest = re.split(rb"[\r\n]+", rest + block)
        yield from (line.decode("utf-8", "replace") for line in whole)
    yield rest.decode("utf-8", "replace")


def die_with_us() -> Callable[[], object] | None:
    """On Linux the kernel ends the builder when we die, however we die: else it writes into the next attempt's folder."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg") and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
