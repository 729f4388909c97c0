"""A folder for browsers: what transformers.js and onnxruntime-web load as it is, with a page that talks to the model.

    NAME/chat.html                    the page: no network but this folder (Content-Security-Policy)
    NAME/config.json, tokenizer.json, tokenizer_config.json with the chat template, generation_config.json
    NAME/onnx/model_q4.onnx           graph and weights in one file, under the name that transformers.js derives from the type
    NAME/js/                          transformers.js and onnxruntime-web's CPU build, from `edgelora doctor --install web`

onnxruntime-web's build for WebGPU lacks GatherBlockQuantized, so the page runs on the CPU. Threads need a server that sends
Cross-Origin-Opener-Policy: same-origin and Cross-Origin-Embedder-Policy: require-corp.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import onnx

from edgelora import environments
from edgelora.errors import EdgeloraError, Unsupported, UsageError, VerifyError
from edgelora.export import digits
from edgelora.runtime.onnx_folder import GRAPH

# What transformers.js calls a file's type, and how its name ends (src/utils/dtypes.js).
_DTYPES = {
    "int4": ("q4", "_q4"),
    "int4-mixed": ("q4", "_q4"),
    "int8": ("q8", "_quantized"),
    "fp16": ("fp16", "_fp16"),
    "fp32": ("fp32", ""),
}
_LIBRARIES = {
    "@huggingface/transformers": ("transformers.web.min.js",),
    "onnxruntime-web": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
}
_TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_MOST_BYTES = 2_000_000_000  # protobuf ends at 2 GiB
_CHECK_S = 600.0


def write(exported: Path, type: str, target: Path) -> Path:
    """Make `target` out of an exported ONNX folder. ToolMissing without the environment, Unsupported for a model too large for one file."""
    place = environments.require("web")
    if not re.fullmatch(r"[\w.-]+", target.name):
        raise UsageError(f"transformers.js loads no folder called {target.name!r}", "choose a --name of letters, digits, '.', '_' and '-'")
    size = sum(path.stat().st_size for path in exported.glob(f"{GRAPH}*"))
    if size > _MOST_BYTES:
        raise Unsupported(f"{exported.name} has {size / 1e9:.1f} GB, and a browser's file holds 2 GB", "take a smaller type or base")
    dtype, ending = _DTYPES[type]
    for folder in (target / "onnx", target / "js"):
        folder.mkdir(parents=True)
    onnx.save(onnx.load(exported / GRAPH), target / "onnx" / f"model{ending}.onnx")
    for name in _TEXTS:
        if (exported / name).is_file():
            shutil.copyfile(exported / name, target / name)
    digits.as_pattern(target / "tokenizer.json")
    _change(target / "config.json", {"transformers.js_config": {"dtype": dtype}})
    template = exported / "chat_template.jinja"
    if template.is_file():
        _change(target / "tokenizer_config.json", {"chat_template": template.read_text(encoding="utf-8")})
    (target / "chat.html").write_bytes(_own("chat.html"))
    _libraries(place / "node_modules", target / "js")
    return target


def check(folder: Path, texts: Mapping[str, Sequence[int]], prompts: Mapping[str, Sequence[int]], rendered: str) -> dict[str, Any]:
    """How transformers.js in Node answers: facts, or empty without Node.

    `texts`: text -> the ids it should be split into; `prompts`: prompt -> the greedy ids that ONNX Runtime goes on with;
    `rendered`: the template around one user message "Hello". VerifyError when the tokenizer or the template differ, or no
    answer begins alike.
    """
    node = shutil.which("node")
    if node is None:
        return {}
    library = environments.require("web") / "node_modules" / "@huggingface" / "transformers" / "dist" / "transformers.node.mjs"
    most = max(map(len, prompts.values()), default=1)
    asked = {"library": library.as_uri(), "folder": str(folder.resolve()), "texts": list(texts), "prompts": list(prompts), "tokens": most}
    with resources.as_file(resources.files("edgelora.export") / "web" / "check.mjs") as script:
        done = subprocess.run([node, str(script)], input=json.dumps(asked), capture_output=True, text=True, timeout=_CHECK_S)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if "Error" in line] or ["it printed nothing"]
        raise VerifyError(f"{folder.name}: transformers.js cannot run it: {said[0][:300]}", "the culprit is the runtime or the graph")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for text, expected, ids in zip(texts, texts.values(), found["tokens"], strict=True):
        if list(expected) != ids:
            raise VerifyError(f"{folder.name}: transformers.js splits {text[:40]!r} otherwise", "the culprit is the tokenizer")
    if found["rendered"] != rendered:
        raise VerifyError(f"{folder.name}: transformers.js renders {found['rendered'][:80]!r}", "the culprit is the chat template")
    pairs = [(list(expected), made[: len(expected)]) for expected, made in zip(prompts.values(), found["answers"], strict=True)]
    if pairs and not any(expected[:1] == made[:1] for expected, made in pairs):
        raise VerifyError(
            f"{folder.name}: transformers.js answers otherwise from the first token on", "the culprit is the runtime or the graph"
        )
    return {"version": found["version"], "same_text": all(expected == made for expected, made in pairs), "prompts": len(pairs)}


def _libraries(modules: Path, target: Path) -> None:
    """The libraries' files, and under what licences they come."""
    notes = []
    for package, names in _LIBRARIES.items():
        for name in names:
            source = modules / package / "dist" / name
            if not source.is_file():
                raise EdgeloraError(f"{source} is missing", "edgelora doctor --install web, after removing that folder")
            shutil.copyfile(source, target / name)
        about = json.loads((modules / package / "package.json").read_text(encoding="utf-8"))
        repository = about.get("repository") or {}
        notes.append(f"{package} {about['version']}, {about.get('license')}, {repository.get('url', repository) if repository else ''}")
        if (modules / package / "LICENSE").is_file():
            shutil.copyfile(modules / package / "LICENSE", target / f"LICENSE-{package.split('/')[-1]}.txt")
    (target / "LICENCES.txt").write_text("\n".join(notes) + "\n", encoding="utf-8")


def _change(path: Path, more: Mapping[str, Any]) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) | more
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _own(name: str) -> bytes:
    return (resources.files("edgelora.export") / "web" / name).read_bytes()
