"""The quick start's model in every runtime that is here, in one report: size, quality, load, first token, decode, memory.

    make bench-mobile        after `make quickstart` and `edgelora doctor --install executorch`, `litert`, `mnn`

A format whose environment is absent is left out, and said. The files of `make quickstart` (llama.cpp, ONNX Runtime) are measured as
they are; the others are exported from the same merged model and verified on the rows that choose. The report compares all of
them with that model on rows that never chose. The process that holds the runtime is measured, its interpreter and libraries included:
for ExecuTorch that means PyTorch, which is on no phone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import results

from edgelora import artifact, environments
from edgelora.export import FORMATS, stage

ROOT = Path(__file__).parent.parent
DATA = ROOT / "recipes" / "data"
PACKAGES = ("llama-cpp-python", "onnxruntime", "torch", "transformers")


def edgelora(*words: object) -> None:
    subprocess.run([sys.executable, "-c", "from edgelora.cli import main; main()", *map(str, words)], check=True)


def newest(run: Path, kind: str) -> Path:
    """The newest finished folder whose name begins with `kind`."""
    found = sorted((p for p in run.glob(f"{kind}-*") if (p / artifact.MANIFEST).is_file()), key=lambda p: p.stat().st_mtime)
    if not found:
        raise SystemExit(f"error: {run} holds no {kind}-* folder\nmake quickstart")
    return found[-1]


def files(run: Path, threads: int) -> list[Path]:
    """What every format left, exported where it is not there yet."""
    model, found = newest(run, "model"), []
    for name in FORMATS:
        if name == "gguf-lora":  # the same runtime with the adapter apart
            continue
        needed = getattr(stage.format_module(name), "ENVIRONMENT", None)
        if needed and not environments.installed(needed):
            print(f"{name}: left out; make its environment with edgelora doctor --install {needed}")
            continue
        if needed:
            edgelora(
                "export", model, "--format", name, "--rows", DATA / "edgelora-faq-valid.jsonl", "--name", run.name, "--threads", threads
            )
        found.append(stage.exported_path(artifact.load(newest(run, name))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, for instance runs/quickstart")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=int, default=40, help="rows that are compared")
    parser.add_argument("--save", action="store_true", help="keep the figures among the results")
    given = parser.parse_args()
    measured = files(given.run, given.threads)
    rows, model = DATA / "edgelora-faq-paraphrase.jsonl", newest(given.run, "model")
    edgelora("bench", *measured, "--rows", rows, "--reference", model, "--most", given.most, "--threads", given.threads, "-o", given.output)
    report: dict[str, Any] = json.loads((given.output / "report.json").read_text(encoding="utf-8"))
    kl = {row["file"]: row["kl"] for row in report["files"]}
    headline = [
        (
            f"{row['runtime']}, {row['prompt_tokens']} tokens",
            f"{row['size_bytes'] / 1e6:.1f} MB, KL {kl[row['file']]:.3f}, load {row['load_ms']:.0f} ms, first token {row['ttft_ms']:.0f} ms, "
            f"{row['decode_tok_per_s']:.1f} tok/s, {row['peak_rss_bytes'] / 1e6:.0f} MB",
        )
        for row in report["bench"]
        if row["prompt_tokens"] == max(r["prompt_tokens"] for r in report["bench"])
    ]
    for name, figure in headline:
        print(f"{name}: {figure}")
    if given.save:
        results.save("mobile", "make bench-mobile", PACKAGES, headline, {key: report[key] for key in ("files", "bench", "losses")})


if __name__ == "__main__":
    main()
