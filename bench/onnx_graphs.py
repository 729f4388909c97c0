"""Are the fp32 graphs right? Two exporters that share no code against each other, and every mistake against torch, on tiny models.

    edgelora doctor --install optimum
    python bench/onnx_graphs.py

agreement   largest difference of a log-probability between onnxruntime-genai's builder and optimum, over the standard deviation
            of the builder's log-probabilities, every architecture (aim: below 1e-3)
mistakes    KL from torch of a graph that was built from a model read wrongly, nats a token (aim: above 1e-2)
The models and mistakes are those of tests/test_optimum.py and tests/test_onnx_mutations.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import results

from edgelora.export import onnx as onnx_export
from edgelora.runtime import onnx_runtime
from tests.test_onnx_export import IDS, calmed, quiet
from tests.test_onnx_mutations import MISTAKES, divergence
from tests.tiny_models import ARCHITECTURES, tiny_model


def agreement(arch: str, folder: Path) -> float:
    model = calmed(tiny_model(arch, folder / arch))
    scores = {}
    for exporter in onnx_export.EXPORTERS:
        (folder / exporter).mkdir()
        with onnx_runtime.open(onnx_export.write(model, "fp32", folder / exporter, arch, quiet, exporter=exporter), threads=1) as session:
            scores[exporter] = session.score(IDS)
    return float(np.abs(scores["builder"] - scores["optimum"]).max() / scores["builder"].std())


def main() -> None:
    apart, seen = {}, {}
    for arch in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            apart[arch] = agreement(arch, Path(folder))
        print(f"{arch}: {apart[arch]:.1e} of the standard deviation", flush=True)
    for name in MISTAKES:
        with tempfile.TemporaryDirectory() as folder:
            seen[name] = divergence(name, Path(folder))
        print(f"{name}: KL {seen[name]:.3g}", flush=True)
    least = min(seen, key=seen.__getitem__)
    headline = [
        [f"two exporters, {len(apart)} architectures", f"at most {max(apart.values()):.1e} of the standard deviation apart"],
        [f"{len(seen)} mistakes", f"KL at least {seen[least]:.2g} ({least})"],
    ]
    packages = ("onnx", "onnxruntime", "onnxruntime-genai", "torch", "transformers")
    results.save("onnx-graphs", "python bench/onnx_graphs.py", packages, headline, {"apart": apart, "mistakes": seen})


if __name__ == "__main__":
    main()
