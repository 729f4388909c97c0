"""Write an MNN folder: `python write_mnn.py JOB.json` in the environment "mnn"; `edgelora.export.mnn` writes the job.

The exporter is MNN's own (llmexport), as a library: its console script looks for its modules where they are not.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
from typing import Any

import grid
import numpy as np
import torch

# MNN's converter would install a package with whatever pip comes first on the path, and report each conversion to a server.
sys.modules["MNN.tools.utils.log"] = None  # type: ignore[assignment]


def say(share: float, text: str) -> None:
    print(f"edgelora {share} {text}", flush=True)


def exporter() -> Any:
    """The module that holds llmexport's exporter; it imports its neighbours as if they lay at the top."""
    found = importlib.util.find_spec("llmexport")
    package = os.path.dirname(str(found and found.origin))
    sys.path.insert(0, package)
    spec = importlib.util.spec_from_file_location("llmexport_script", os.path.join(package, "llmexport.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_off(weight: Any, bits: int, block: int, *others: bool) -> tuple[Any, Any]:
    """Codes, two a byte, and offset and scale of every block of weights that lie on the grid; stands in for the exporter's rounding."""
    block = math.gcd(block, weight.shape[1])
    step = grid.steps(weight.numpy(), block, signed=False).reshape(-1, 1)
    blocks = weight.numpy().reshape(-1, block)
    low = np.minimum(blocks.min(1, keepdims=True), 0)
    codes = np.rint((blocks - low) / step).astype(np.uint8).reshape(-1, 2)
    alpha = np.concatenate([low + step * (1 << bits - 1), step], 1)
    return torch.from_numpy(codes[:, 0] << 4 | codes[:, 1]), torch.from_numpy(alpha.reshape(-1))


def main(job: dict[str, Any]) -> None:
    script = exporter()
    if job["on_grid"]:
        sys.modules["utils.torch_utils"]._quant_on_device = read_off  # type: ignore[attr-defined]
    say(0.2, "loading the model")
    parser = argparse.ArgumentParser()
    script.build_args(parser)
    options = ["--path", job["model"], "--dst_path", job["output"], "--export", "mnn", *job["options"]]
    made = script.LlmExporter(parser.parse_args(options))
    made.tokenizer.stop_ids = job["stop_ids"]  # it knows the tokenizer's end and a few names, not what the model was trained to end with
    say(0.4, "tracing and rounding")
    made.export("mnn")


if __name__ == "__main__":
    with open(sys.argv[1]) as stream:
        main(json.load(stream))
