"""Environments of their own for tools that clash with edgelora's packages, made only by `edgelora doctor --install NAME`.

Each lies in a folder of the user's data, every version pinned, and is used through a program in it; nothing of it is
ever imported. A folder whose stamp is missing or names other versions counts as absent.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelora.errors import EdgeloraError, ToolMissing, UsageError

_STAMP = "edgelora.json"
_INSTALL_S = 3600.0


@dataclass(frozen=True)
class Environment:
    """`packages` are installed in this order, each line with one command; `licences`: of what is not only used but shipped on."""

    about: str
    manager: str  # "pip" or "npm"
    packages: tuple[tuple[str, ...], ...]


ENVIRONMENTS = {
    "optimum": Environment(
        "Hugging Face's ONNX exporter, an independent second one: it wants transformers 4",
        "pip",
        (
            ("torch==2.13.0",),
            (
                "optimum-onnx==0.1.0",
                "optimum==2.1.0",
                "transformers==4.57.6",
                "onnx==1.23.2",
                "onnxruntime==1.32.0",
                "numpy==2.4.6",
                "accelerate==1.15.0",
            ),
        ),
    ),
    "executorch": Environment(
        "ExecuTorch, PyTorch's runtime for phones: exporter and runtime of --format executorch",
        "pip",
        (
            ("torch==2.13.0",),
            (
                "executorch==1.5.1",
                "torchao==0.18.0",
                "pytorch-tokenizers==1.5.0",
                "tokenizers==0.23.3",
                "safetensors==0.8.0",
                "numpy==2.4.6",
            ),
        ),
    ),
    "litert": Environment(
        "LiteRT's exporter and LiteRT-LM, Google's runtime for phones, of --format litert",
        "pip",
        (
            ("torch==2.13.0",),
            (
                "litert-torch==0.10.0",
                "ai-edge-litert==2.3.0",
                "ai-edge-quantizer==0.10.0",
                "litert-converter==0.5.0",
                "litert-lm-api==0.18.1",
                "litert-lm-builder==0.18.1",
                "torchao==0.18.0",
                "jax==0.10.2",
                "transformers==5.23.0",
                "numpy==2.4.6",
                "protobuf==7.36.2",
            ),
        ),
    ),
    "mnn": Environment(
        "MNN, Alibaba's runtime for phones, and its exporter, which wants transformers 4, of --format mnn",
        "pip",
        (
            ("torch==2.13.0",),
            (
                "MNN==3.6.1",
                "llmexport==0.0.5",
                "transformers==4.57.6",
                "onnx==1.23.2",
                "onnxslim==0.1.98",
                "onnxruntime==1.32.0",
                "numpy==2.4.6",
            ),
        ),
    ),
    "web": Environment(
        "transformers.js, onnxruntime-web and wllama, for models in browsers; playwright-core drives one in benches",
        "npm",
        (("@huggingface/transformers@4.3.1", "@wllama/wllama@3.8.1", "playwright-core@1.65.1"),),
    ),
    "arm64": Environment(
        "llama.cpp built for arm64 and x86-64 from one release: tests and bench/arm64_logits.py run it through qemu-user",
        "npm",
        (("--force", "@node-llama-cpp/linux-arm64@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"),),  # npm: not for this processor
    ),
}


def folder(name: str) -> Path:
    """Where an environment lies or would lie (XDG base directory specification)."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "edgelora" / name


def installed(name: str) -> bool:
    """Whether an environment is complete and holds the versions that this edgelora was tried with."""
    try:
        return bool(json.loads((folder(name) / _STAMP).read_text(encoding="utf-8")) == _wanted(name))
    except (OSError, ValueError):
        return False


def require(name: str) -> Path:
    """The folder of an environment; ToolMissing with the command that makes it."""
    if not installed(name):
        raise ToolMissing(f"the environment {name!r} is not installed", f"edgelora doctor --install {name}")
    return folder(name)


def python(name: str) -> Path:
    """The interpreter of an environment that pip made."""
    return require(name) / "bin" / "python"


def versions(name: str) -> dict[str, str]:
    """Package -> version of what an environment that pip made holds by name."""
    return dict(word.split("==", 1) for packages in ENVIRONMENTS[name].packages for word in packages)


def install(name: str, progress: Callable[[float, str], None]) -> Path:
    """Make an environment anew, or leave one that is complete as it is. Returns its folder; ToolMissing shows why an installer failed."""
    if name not in ENVIRONMENTS:
        raise UsageError(f"there is no environment {name!r}", f"known: {', '.join(ENVIRONMENTS)}")
    place, environment = folder(name), ENVIRONMENTS[name]
    if installed(name):
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    commands = _commands(environment, place)
    for number, command in enumerate(commands):
        progress(number / len(commands), " ".join(command[-2:])[:60])
        _run(command, place)
    (place / _STAMP).write_text(json.dumps(_wanted(name)), encoding="utf-8")
    progress(1.0, str(place))
    return place


def _commands(environment: Environment, place: Path) -> list[list[str]]:
    if environment.manager == "npm":
        if shutil.which("npm") is None:
            raise ToolMissing("npm is not installed", "apt-get install -y npm")
        # No install scripts: they fetch GPU libraries, and run code of packages nobody named.
        flags = ["--prefix", str(place), "--ignore-scripts", "--no-audit", "--no-fund", "--save-exact"]
        return [["npm", "install", *flags, *packages] for packages in environment.packages]
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    return [[sys.executable, "-m", "venv", str(place)], *([*pip, *packages] for packages in environment.packages)]


def _run(command: Sequence[str], place: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_INSTALL_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EdgeloraError(f"{command[0]} could not run: {error}", "try again, or see what its registry says") from error
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ToolMissing(
            f"{Path(command[0]).name} failed in {place}: {said[-1][:300] if said else 'it said nothing'}", "is the registry within reach?"
        )


def _wanted(name: str) -> dict[str, object]:
    environment = ENVIRONMENTS[name]
    return {"manager": environment.manager, "packages": [list(packages) for packages in environment.packages]}
