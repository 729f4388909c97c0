"""`edgelora size`: every byte is accounted for, in files written by the real exporters and in files made to deceive."""

from __future__ import annotations

import importlib
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from edgelora import size
from edgelora.errors import ModelError
from tests.line import Line


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    from edgelora.export import gguf as exporter

    folder = tmp_path_factory.mktemp("sizes")
    return {kind: exporter.write(tiny_base, kind, folder, "tiny", lambda share, text: None) for kind in ("f16", "q8_0")}


def test_a_gguf_file_adds_up_and_agrees_with_gguf_py(gguf: dict[str, Path]) -> None:
    import gguf as library

    found = size.read(gguf["q8_0"])
    assert sum(part.n_bytes for part in found.parts) == found.size_bytes == gguf["q8_0"].stat().st_size
    theirs = {t.name: (t.tensor_type.name, int(t.n_bytes)) for t in library.GGUFReader(gguf["q8_0"]).tensors}
    ours = {p.name: (p.type, p.n_bytes) for p in found.parts if p.group not in (size.METADATA, size.PADDING)}
    assert ours == theirs
    groups = found.by("group")
    assert {"embedding", "attention", "feed-forward", "norm", "metadata"} <= set(groups)
    assert found.by("layer")["layer 2"] == sum(n for name, (_, n) in theirs.items() if name.startswith("blk.2."))
    tokens = next(p for p in found.parts if p.name == "tokenizer.ggml.tokens")
    assert tokens.n_bytes > sum(len(t) for t in library.GGUFReader(gguf["q8_0"]).get_field("tokenizer.ggml.tokens").contents())  # type: ignore[union-attr]


def test_the_difference_names_what_grew(gguf: dict[str, Path]) -> None:
    small, large = size.read(gguf["q8_0"]), size.read(gguf["f16"])
    moved = size.changes(small.by("name"), large.by("name"))
    assert sum(b - a for a, b in moved.values()) == large.size_bytes - small.size_bytes
    assert next(iter(moved)) == "token_embd.weight"  # the largest change first
    assert not any("norm" in name for name in moved)  # F32 in both


def test_safetensors_add_up_and_agree_with_the_library(tiny_base: Path) -> None:
    from safetensors import safe_open

    file = tiny_base / "model.safetensors"
    found = size.read(file)
    assert sum(part.n_bytes for part in found.parts) == file.stat().st_size
    with safe_open(file, "np") as shard:
        theirs = {name: shard.get_tensor(name).nbytes for name in shard.keys()}  # noqa: SIM118
    assert {p.name: p.n_bytes for p in found.parts if p.group not in (size.METADATA, size.PADDING)} == theirs
    whole = size.read(tiny_base)
    assert whole.size_bytes == sum(p.stat().st_size for p in tiny_base.rglob("*") if p.is_file())
    assert sum(part.n_bytes for part in whole.parts) == whole.size_bytes


@pytest.mark.parametrize("outside", [False, True])
def test_onnx_adds_up_with_data_inside_and_outside(tmp_path: Path, outside: bool) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = {
        "model.layers.1.mlp.up_proj.MatMul.weight_Q4": np.arange(4096, dtype=np.uint8),
        "model.layers.1.attn.q_proj.MatMul.weight_scales": np.ones(512, np.float32),
        "model.embed_tokens.weight": np.ones((64, 32), np.float16),
    }
    inits = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    inits.append(helper.make_tensor("model.norm.weight", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]))  # typed data, not raw
    graph = helper.make_graph([helper.make_node("Identity", ["model.norm.weight"], ["y"])], "g", [], [], inits)
    file = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph),
        file,
        save_as_external_data=outside,
        all_tensors_to_one_file=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    found = size.read(tmp_path)
    assert sum(part.n_bytes for part in found.parts) == found.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    ours = {p.name: p for p in found.parts}
    assert {name: ours[name].n_bytes for name in weights} == {name: value.nbytes for name, value in weights.items()}
    assert [ours[name].group for name in weights] == ["feed-forward", "attention", "embedding"]
    assert [ours[name].type for name in weights] == ["U8", "F32", "F16"]
    assert ours["model.norm.weight"].n_bytes == 12


def test_an_exported_onnx_folder_adds_up(finished: Line) -> None:
    folders = [p for p in finished.out.glob("onnx-*/*") if p.is_dir()]
    if not folders:
        pytest.skip("this line exports no ONNX")
    found = size.read(folders[0])
    assert sum(part.n_bytes for part in found.parts) == found.size_bytes


def test_an_executorch_program_is_told_apart_from_its_segments(tmp_path: Path) -> None:
    file = tmp_path / "model.pte"
    file.write_bytes(b"\x20\0\0\0ET12" + b"eh00" + struct.pack("<IQQ", 32, 96, 128) + bytes(64) + bytes(32) + bytes(1000))
    found = size.read(file)
    assert {p.name: p.n_bytes for p in found.parts} == {"program": 96, "padding": 32, "segments": 1000}


def test_a_litertlm_bundle_is_told_apart_from_its_sections(tmp_path: Path) -> None:
    file = tmp_path / "model.litertlm"
    file.write_bytes(b"LITERTLM" + struct.pack("<IIIIQ", 1, 0, 0, 0, 100) + bytes(68) + bytes(16384 - 100) + bytes(5000))
    found = size.read(file)
    assert {p.name: p.n_bytes for p in found.parts} == {"header": 100, "padding": 16384 - 100, "sections": 5000}
    for end in (31, 30000, 1 << 63):
        file.write_bytes(b"LITERTLM" + struct.pack("<IIIIQ", 1, 0, 0, 0, end) + bytes(20000))
        with pytest.raises(ModelError, match="is no LiteRT-LM bundle"):
            size.read(file)


def test_every_reader_can_be_loaded() -> None:
    for module in size.READERS.values():
        assert callable(importlib.import_module(module).parts)


def test_four_gigabytes_are_read_from_the_header_alone(tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": {"dtype": "BF16", "shape": [1 << 31], "data_offsets": [0, 1 << 32]}}).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + (1 << 32))  # sparse
    code = (
        "import sys\nfrom pathlib import Path\nfrom edgelora import size\n"
        f"found = size.read(Path({str(file)!r}))\n"
        "assert found.by('group')['feed-forward'] == 1 << 32\n"
        "assert not {'torch', 'numpy', 'gguf', 'onnx'} & set(sys.modules)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000  # KiB


def test_damaged_files_give_one_clear_error(gguf: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    """Five hundred seeded mutations of each kind: the parts still add up, or ModelError says why not."""
    import numpy as np
    from onnx import helper, numpy_helper

    weight = numpy_helper.from_array(np.ones(300, np.float32), "w")
    model = helper.make_model(helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [], [weight]))
    pte = b"\x20\0\0\0ET12eh00" + struct.pack("<IQQ", 32, 96, 128) + bytes(200)
    kinds = {
        "a.gguf": gguf["q8_0"].read_bytes()[:20000] + bytes(1 << 18),
        "a.safetensors": (tiny_base / "model.safetensors").read_bytes()[:4000] + bytes(1 << 20),
        "a.onnx": model.SerializeToString(),
        "a.pte": pte,
    }
    chance = random.Random(0)
    refused = strange = 0
    for name, whole in kinds.items():
        for _ in range(500):
            data = bytearray(whole)
            for _ in range(chance.randint(1, 8)):
                at = chance.randrange(min(len(data), 3000))
                data[at : at + chance.choice([1, 4, 8])] = chance.randbytes(chance.choice([1, 4, 8]))
            if chance.random() < 0.3:
                del data[chance.randrange(len(data)) :]
            file = tmp_path / name
            file.write_bytes(data)
            try:
                found = size.read(file)
            except ModelError as error:
                refused += str(file) in error.message and len(error.message) < 500
                strange += not (str(file) in error.message and len(error.message) < 500)
            else:
                assert sum(part.n_bytes for part in found.parts) == found.size_bytes
    assert refused > 500
    assert strange == 0


def test_the_command(gguf: dict[str, Path], tmp_path: Path) -> None:
    def edgelora(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "edgelora.cli", "size", *map(str, arguments)], capture_output=True, text=True)

    done = edgelora(gguf["q8_0"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny-q8_0.gguf: ")
    assert "attention" in done.stdout
    document = json.loads(edgelora(gguf["q8_0"], gguf["f16"], "--by", "name", "--json").stdout)
    assert document["after"]["size_bytes"] - document["before"]["size_bytes"] == sum(
        row["after"] - row["before"] for row in document["changes"].values()
    )
    assert "and " in edgelora(gguf["q8_0"], "--by", "name", "--most", 3).stdout
    (tmp_path / "empty.gguf").touch()
    for bad, text in ((tmp_path / "none.gguf", "model not found"), (tmp_path / "empty.gguf", "is empty"), (tmp_path, "is an empty folder")):
        if bad == tmp_path:
            (tmp_path / "empty.gguf").unlink()
        done = edgelora(bad)
        assert (done.returncode, done.stdout) == (3, "")
        assert text in done.stderr
