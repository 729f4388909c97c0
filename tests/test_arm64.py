"""A GGUF file says on arm64 what it says on x86-64: llama.cpp's kernels of both, the former through qemu-user. Numbers, never speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelora import machine
from edgelora.export import gguf
from tests.device_tools import packaged_runner
from tests.llama_kernels import apart, logits
from tests.tiny_models import tiny_model

IDS = [1 + 37 * i % 400 for i in range(24)]


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if "avx2" not in machine.cpu_features():
        pytest.skip("no x86-64 processor with AVX2 to compare with")
    root = tmp_path_factory.mktemp("runners")
    return packaged_runner(root / "x64", "x64"), packaged_runner(root / "arm64", "arm64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, so that K-quants are what they say."""
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "hf", hidden_size=256, intermediate_size=512, num_hidden_layers=2)


# KL in nats, at most a tenth of what the type costs this model (0.05 for Q8_0, 1.5 and 2.1 for the others), and standard deviations.
@pytest.mark.parametrize("kernels", ["armv8.0_1", "armv8.2_2", "armv8.6_1"])
@pytest.mark.parametrize(("kind", "kl", "moved"), [("f16", 1e-3, 0.1), ("q8_0", 5e-3, 0.2), ("q4_k_s", 2e-2, 0.3), ("q4_0", 1e-2, 0.2)])
def test_logits_are_those_of_x86(
    runners: tuple[Path, Path], model: Path, tmp_path: Path, kind: str, kernels: str, kl: float, moved: float
) -> None:
    x64, arm64 = runners
    file = gguf.write(model, kind, tmp_path, "tiny", lambda share, text: None)
    ours = logits(x64, "haswell", file, IDS)
    found = apart(ours, logits(arm64, kernels, file, IDS))
    assert found["kl"] < kl
    assert found["moved"] < moved
    assert apart(ours, ours[::-1])["kl"] > 100 * kl  # the measure sees what is wrong


def test_q4_0_differs_by_its_kernels_and_not_by_the_processor(runners: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    """AVX2 and arm's dot products both repack Q4_0 and then compute the same; without either, both compute block by block."""
    x64, arm64 = runners
    file = gguf.write(model, "q4_0", tmp_path, "tiny", lambda share, text: None)
    repacked, plain = logits(x64, "haswell", file, IDS), logits(x64, "sse42", file, IDS)
    assert apart(repacked, logits(arm64, "armv8.2_1", file, IDS))["kl"] < 1e-9
    assert apart(repacked, plain)["kl"] > 1e-6
    assert apart(repacked, logits(arm64, "armv8.0_1", file, IDS))["kl"] > 1e-6
