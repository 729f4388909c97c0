"""ONNX export and its runtime, on tiny random models: the real builder, ONNX Runtime and onnxruntime-genai."""

from __future__ import annotations

import collections
import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgelora import artifact, models
from edgelora import recipe as recipes
from edgelora.errors import DiskFull, EdgeloraError, ModelError, Unsupported, UsageError
from edgelora.export import onnx as onnx_export
from edgelora.export import onnx_builder, onnx_graph, onnx_presets, stage
from edgelora.runtime import onnx_folder, onnx_runtime
from tests.line import edgelora
from tests.tiny_models import ARCHITECTURES, TEXTS, tiny_model

# (architecture, tied embeddings, type) -> the largest KL divergence from torch in float32, in nats a token: every preset,
# every architecture, both kinds of embedding. The quantized bounds are about twice what was measured. Rows of 96 values
# hold an odd number of blocks of 32, which k-quant cannot pack: int4-mixed of all of these shows the way around it.
MAX_KL = {
    ("llama", True, "int4"): 0.2,
    ("llama", True, "int4-mixed"): 0.05,
    ("llama", True, "int8"): 0.0015,
    ("llama", True, "fp32"): 1e-6,
    ("llama", False, "int8"): 0.004,
    ("qwen2", False, "fp32"): 1e-6,
    ("qwen3", True, "fp32"): 1e-6,
    ("qwen3", True, "int4-mixed"): 0.35,
}
IDS = np.random.default_rng(0).integers(3, 400, 200).tolist()  # longer than one chunk of the session

Case = tuple[str, bool, str]


def quiet(share: float, text: str) -> None:
    assert 0 <= share <= 1
    assert text


class Exports:
    """Models and exports of this module, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[Case, Path] = {}

    def model(self, arch: str, tied: bool) -> Path:
        folder = self.root / f"{arch}-{'tied' if tied else 'untied'}"
        if not folder.exists():
            calmed(tiny_model(arch, folder, tie_word_embeddings=tied))
        return folder

    def export(self, case: Case) -> Path:
        if case not in self.folders:
            model = self.model(*case[:2])
            self.folders[case] = onnx_export.write(model, case[2], self.root, model.name, quiet)
        return self.folders[case]

    def torch_model(self, case: Case) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model(*case[:2]), dtype=torch.float32, local_files_only=True)


def calmed(folder: Path) -> Path:
    """Halve the layers' matrices: random layers at full strength amplify a rounding until nothing can be compared."""
    path = folder / "model.safetensors"
    weights = {name: value / 2 if "_proj" in name else value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL divergence of rows of log-probabilities, normalized once more in float64."""
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p.astype(np.float64), q.astype(np.float64)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def torch_scores(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        scores: np.ndarray = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
    return scores


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    torch.set_num_threads(1)
    return Exports(tmp_path_factory.mktemp("privatepath"))


@pytest.fixture
def hostile(exports: Exports, tmp_path: Path) -> Path:
    """A copy of a good export, to be damaged."""
    return Path(shutil.copytree(exports.export(("llama", True, "fp32")), tmp_path / "copy"))


@pytest.mark.parametrize("case", MAX_KL, ids=lambda c: f"{c[0]}-{'tied' if c[1] else 'untied'}-{c[2]}")
class TestEveryPreset:
    def test_predicts_like_the_model(self, exports: Exports, case: Case) -> None:
        with onnx_runtime.open(exports.export(case), threads=1) as session:
            scores = session.score(IDS)
        assert scores.dtype == np.float32
        assert np.allclose(np.exp(scores.astype(np.float64)).sum(-1), 1, atol=1e-5)
        assert kl(torch_scores(exports.torch_model(case), IDS), scores) < MAX_KL[case]

    def test_decoding_token_by_token_gives_the_scores(self, exports: Exports, case: Case) -> None:
        with onnx_runtime.open(exports.export(case), threads=1) as session:
            together = session.score(IDS)
            feed = session._feeder(len(IDS))
            one_by_one = np.concatenate([onnx_folder.log_softmax(feed([token])) for token in IDS])
            assert np.array_equal(session.score(IDS, first=150), together[150:])
        # Quantized graphs round activations to 8 bits, and one row goes through another kernel than many.
        assert kl(together, one_by_one) < (1e-8 if case[2] == "fp32" else 1e-3)

    def test_genai_runs_it(self, exports: Exports, case: Case) -> None:
        import onnxruntime_genai as genai

        folder = exports.export(case)
        model = genai.Model(str(folder))
        text = TEXTS[0]
        with onnx_runtime.open(folder, threads=1) as session:
            ids = session.tokenize(text)
            ours = list(session.generate(ids, 12, stop=()))
        assert genai.Tokenizer(model).encode(text).tolist() == ids
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(ids) + 12, min_length=len(ids) + 12, do_sample=False)
        generator = genai.Generator(model, options)
        generator.append_tokens(np.array([ids], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_sequence(0).tolist() == ids + ours

    def test_autotokenizer_opens_it(self, exports: Exports, case: Case) -> None:
        ours = AutoTokenizer.from_pretrained(exports.export(case), local_files_only=True)
        theirs = AutoTokenizer.from_pretrained(exports.model(*case[:2]), local_files_only=True)
        chat = [{"role": "user", "content": "What is 7 x 8?"}]
        assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
        with onnx_runtime.open(exports.export(case), threads=1) as session:
            for text in TEXTS:
                ids = theirs(text, add_special_tokens=False)["input_ids"]
                assert ours(text, add_special_tokens=False)["input_ids"] == ids
                assert session.tokenize(text) == ids

    def test_size_is_predicted(self, exports: Exports, case: Case) -> None:
        actual = sum(path.stat().st_size for path in exports.export(case).iterdir())
        assert onnx_export.predict_bytes(exports.model(*case[:2]), case[2]) == pytest.approx(actual, rel=0.1)

    def test_says_nothing_about_where_it_was_made(self, exports: Exports, case: Case) -> None:
        private = [b"privatepath", b"onnx-builder", b"local_files_only"]
        for path in exports.export(case).iterdir():
            data = path.read_bytes()
            assert not [word for word in private if word in data], path.name
        graph = onnx.load(exports.export(case) / "model.onnx", load_external_data=False)
        assert (graph.producer_name, graph.producer_version) == ("onnxruntime-genai", "0.18.0")
        assert not graph.metadata_props
        assert not any(node.doc_string for node in graph.graph.node)


LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [2.0 + i for i in range(8)], "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("mistral", {"sliding_window": 16}),
        ("smollm3", {}),
        ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONG_ROPE}),
        ("gemma3_text", {}),
    ],
)
def test_every_other_architecture_of_the_gguf_converter_is_exact(arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Windows, layers without rotation, joined matrices, norms that count from one: what the builder does not carry over by itself."""
    model = calmed(tiny_model(arch, tmp_path / arch, **settings))
    with onnx_runtime.open(onnx_export.write(model, "fp32", tmp_path, arch, quiet), threads=1) as session:
        scores = session.score(IDS)
    assert kl(torch_scores(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), IDS), scores) < 1e-6


def test_no_architecture_is_left_out() -> None:
    """MAX_KL and the four of the test above."""
    assert {case[0] for case in MAX_KL} | {"mistral", "smollm3", "phi3", "gemma3_text"} == set(ARCHITECTURES)


def test_blocks_and_activations_by_name(exports: Exports, tmp_path: Path) -> None:
    model = exports.model("llama", True)
    folder = onnx_export.write(model, "int4", tmp_path, "fine", quiet, block=16, activations="fp32")
    nodes = [n for n in onnx.load(folder / "model.onnx", load_external_data=False).graph.node if n.op_type == "MatMulNBits"]
    assert {(a.name, a.i) for n in nodes for a in n.attribute if a.name in ("block_size", "accuracy_level")} == {
        ("block_size", 16),
        ("accuracy_level", 1),
    }
    actual = sum(path.stat().st_size for path in folder.iterdir())
    assert onnx_export.predict_bytes(model, "int4", block=16) == pytest.approx(actual, rel=0.1)
    reference, losses = torch_scores(exports.torch_model(("llama", True, "fp32")), IDS), []
    for one in (folder, exports.export(("llama", True, "int4"))):
        with onnx_runtime.open(one, threads=1) as session:
            losses.append(kl(reference, session.score(IDS)))
    assert losses[0] < losses[1]


def test_time_and_memory_are_predicted(exports: Exports, tmp_path: Path) -> None:
    model = exports.model("llama", True)
    done = edgelora("export", model, "--format", "onnx", "--type", "int4-mixed", "--dry-run", "--json", cwd=tmp_path)
    planned = done.document
    assert 5 < planned["seconds"] < 10  # nearly nothing but imports
    assert 6e8 < planned["peak_bytes"] < 2e9
    assert planned["predicted_bytes"] == onnx_export.predict_bytes(model, "int4-mixed")
    plain, weighed = (
        onnx_export.estimate_of(models.config(model), models.shapes(model), "int4-mixed", importance) for importance in (False, True)
    )
    assert all(plain[key] < weighed[key] for key in plain)


def test_types_differ_in_the_way_they_should(exports: Exports) -> None:
    folders = {type: exports.export(("llama", True, type)) for type in ("int4", "int4-mixed", "int8", "fp32")}
    reference = torch_scores(exports.torch_model(("llama", True, "fp32")), IDS)
    loss, size = {}, {}
    for type, folder in folders.items():
        with onnx_runtime.open(folder, threads=1) as session:
            loss[type] = kl(reference, session.score(IDS))
        size[type] = (folder / "model.onnx.data").stat().st_size
    assert list(size) == sorted(size, key=lambda type: size[type])
    assert list(loss) == sorted(loss, key=lambda type: -loss[type])


def test_greedy_answer_is_that_of_torch(exports: Exports) -> None:
    case = ("qwen3", True, "fp32")
    model = exports.torch_model(case)
    expected = model.generate(torch.tensor([IDS[:140]]), max_new_tokens=30, do_sample=False, eos_token_id=-1)[0, 140:].tolist()
    with onnx_runtime.open(exports.export(case), threads=1) as session:
        assert list(session.generate(IDS[:140], 30, stop=())) == expected
        assert list(session.generate(IDS[:140], 30, stop=[expected[7]])) == expected[: expected.index(expected[7])]
        assert list(session.generate(IDS[:140], 1, stop=())) == expected[:1]
        assert list(session.generate(IDS[:140], 0, stop=())) == []


def test_tied_embedding_is_on_the_disk_once(exports: Exports) -> None:
    folder = exports.export(("llama", True, "int8"))
    tensors = {t.name: t for t in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer}
    spans = [[e.value for e in tensors[name].external_data] for name in ("model.embed_tokens.weight_quantized", "lm_head.MatMul.weight_Q8")]
    assert spans[0] == spans[1]
    # 64 columns in two blocks of 32, a byte each, and a float32 scale a block: 72 bytes a row, and nothing in float32.
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert (folder / "model.onnx.data").stat().st_size < 2 * rows * 72 + 120_000


def test_untied_embedding_is_rounded_to_the_nearest_of_255_steps() -> None:
    weight = np.random.default_rng(1).normal(size=(5000, 64)).astype(np.float32)
    weight[7] = 0
    table, scales = onnx_graph._round_rows(weight, 32)
    again = (table.reshape(5000, 2, 32).astype(np.float32) - 128) * scales[..., None]
    assert np.abs(again.reshape(5000, 64) - weight).max() <= scales.max() / 2 * 1.0001
    assert not again[7].any()
    assert (scales[0, 0], table.min()) == (np.abs(weight[0, :32]).max() / np.float32(127), 1)


def test_the_same_model_gives_the_same_bytes(exports: Exports, tmp_path: Path) -> None:
    first = exports.export(("llama", True, "int4-mixed"))
    model = Path(shutil.copytree(exports.model("llama", True), tmp_path / "elsewhere"))
    second = onnx_export.write(model, "int4-mixed", tmp_path, "again", quiet)
    assert second == tmp_path / "again-int4-mixed-onnx"
    assert {p.name: artifact.sha256(p) for p in first.iterdir()} == {p.name: artifact.sha256(p) for p in second.iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again-int4-mixed-onnx", "elsewhere"]


def test_runtime_loads_neither_torch_nor_transformers(exports: Exports) -> None:
    code = (
        "import sys; from pathlib import Path; from edgelora.runtime import onnx_runtime as r\n"
        "s = r.open(Path(sys.argv[1]), 1); s.tokenize('x'); s.score([1, 2])\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'google.protobuf'} & set(sys.modules)), r.version())"
    )
    command = [sys.executable, "-c", code, str(exports.export(("llama", True, "int4")))]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith("[] onnxruntime 1.")


class TestRefusals:
    def test_unknown_type(self, exports: Exports, tmp_path: Path) -> None:
        with pytest.raises(EdgeloraError, match="onnx has no type 'int3'"):
            onnx_export.write(exports.model("llama", True), "int3", tmp_path, "x", quiet)
        with pytest.raises(EdgeloraError, match="onnx has no type 'int3'"):
            onnx_export.predict_bytes(exports.model("llama", True), "int3")

    def test_builder_failure_shows_its_cause(self, exports: Exports, tmp_path: Path) -> None:
        model = Path(shutil.copytree(exports.model("llama", True), tmp_path / "odd"))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
        with pytest.raises(ModelError, match=r"cannot export odd: NotImplementedError: .*not currently supported"):
            onnx_export.write(model, "int4", tmp_path, "x", quiet)
        assert [p.name for p in tmp_path.iterdir()] == ["odd"]

    def test_interruption_ends_the_builder_and_cleans_up(self, exports: Exports, tmp_path: Path) -> None:
        def interrupt(share: float, text: str) -> None:
            raise KeyboardInterrupt(text)

        with pytest.raises(KeyboardInterrupt, match="reading layer 0 of 3"):
            onnx_export.write(exports.model("llama", True), "int4", tmp_path, "x", interrupt)
        assert list(tmp_path.iterdir()) == []

    def test_full_disk_is_recognised(self, tmp_path: Path) -> None:
        said = collections.deque(["Saving", "OSError: [Errno 28] No space left on device", "  at the end"])
        with pytest.raises(DiskFull), artifact.writing(tmp_path):
            raise onnx_builder._failure(said, 1, tmp_path)

    def test_rows_that_no_block_divides_evenly(self) -> None:
        shapes = {"model.embed_tokens.weight": [300, 80]}
        with pytest.raises(Unsupported, match="int4-mixed cannot pack a matrix 80 wide"):
            onnx_presets.block_of("int4-mixed", shapes)
        assert [onnx_presets.block_of(type, shapes) for type in ("int4", "int8", "fp32")] == [32, 32, 32]

    def test_blocks_that_would_break_are_refused_with_the_alternative(self) -> None:
        shapes = {"model.embed_tokens.weight": [300, 96]}
        assert [onnx_presets.block_of("int4", shapes, block) for block in (16, 32)] == [16, 32]
        with pytest.raises(Unsupported, match="int4: rows of 96 weights do not hold blocks of 64") as caught:
            onnx_presets.block_of("int4", shapes, 64)
        assert caught.value.hint == "choose 16 or 32"
        with pytest.raises(Unsupported, match="int4-mixed: rows of 96 weights do not hold an even number of blocks of 32") as caught:
            onnx_presets.block_of("int4-mixed", shapes, 32)
        assert caught.value.hint == "choose 16"
        with pytest.raises(UsageError, match="int4 has no blocks of 48"):
            onnx_presets.block_of("int4", shapes, 48)
        with pytest.raises(UsageError, match="fp32 has no blocks of 32"):
            onnx_presets.block_of("fp32", shapes, 32)

    def test_settings_of_another_format(self) -> None:
        with pytest.raises(UsageError, match="gguf has no block") as caught:
            stage.resolve(recipes.Export("gguf", "q4_0", block=32))
        assert caught.value.hint == "leave it out, or export to onnx"

    @pytest.mark.parametrize(
        ("kind", "rope"),
        [
            ("llama", {"rope_type": "linear", "factor": 4.0}),
            ("qwen2", {"rope_type": "yarn", "factor": 4.0}),
            ("gemma3_text", {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}),
        ],
    )
    def test_rotations_that_the_builder_drops(self, exports: Exports, kind: str, rope: dict[str, Any], tmp_path: Path) -> None:
        model = Path(shutil.copytree(exports.model("llama", True), tmp_path / "odd"))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"model_type": kind, "rope_parameters": rope}))
        for action in (lambda: onnx_export.predict_bytes(model, "int4"), lambda: onnx_export.write(model, "int4", tmp_path, "x", quiet)):
            with pytest.raises(Unsupported, match=f"does not carry over the rotary scaling .* of this {kind} model"):
                action()

    def test_model_folder_without_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ModelError, match=r"holds no tensor model.embed_tokens.weight"):
            onnx_export.predict_bytes(tmp_path, "int4")
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
        with pytest.raises(ModelError, match="its header is longer than the file"):
            onnx_export.predict_bytes(tmp_path, "int4")

    def test_sequences_that_cannot_be_run(self, exports: Exports) -> None:
        with onnx_runtime.open(exports.export(("llama", True, "fp32")), threads=1) as session:
            with pytest.raises(Unsupported, match="empty sequence"):
                session.score([])
            with pytest.raises(Unsupported, match="257 tokens do not fit into the 256"):
                session.score([3] * 257)
            with pytest.raises(ModelError, match="cannot run"):
                session.score([10**6])
        with pytest.raises(EdgeloraError, match="was closed"):
            session.score([3])
        session.close()


def first_tensor(**entry: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        def change(model: onnx.ModelProto) -> None:
            for item in model.graph.initializer[0].external_data:
                item.value = entry.get(item.key, item.value)

        edit(folder, change)

    return damage


def edit(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def shape(*dims: int) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda model: model.graph.initializer[0].dims.__setitem__(slice(None), dims))


def inline_shape(folder: Path) -> None:
    """A tensor whose few bytes lie in the graph and whose shape asks for a terabyte."""
    tensor = onnx.TensorProto(name="huge", data_type=1, dims=[1 << 20, 1 << 20], raw_data=b"\0" * 16)
    edit(folder, lambda model: model.graph.initializer.append(tensor))


def hidden_reference(folder: Path) -> None:
    """The reference to a file outside sits in a constant of a branch of a function, where no initializer list shows it."""
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    branch = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["y"], value=tensor)], "b", [], [])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    opset = [onnx.helper.make_opsetid("", 22)]
    edit(folder, lambda model: model.functions.append(onnx.helper.make_function("d", "f", ["c"], ["y"], [node], opset)))


def link(folder: Path) -> None:
    data = (folder / "model.onnx.data").rename(folder.parent / "outside.data")
    (folder / "model.onnx.data").symlink_to(data)


def nested(folder: Path) -> None:
    """Graph in attribute in node in graph, a thousand times."""
    message = b""
    for _ in range(1000):
        for key in (0x32, 0x2A, 0x0A):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            message = bytes([key]) + varint(len(message)) + message
    (folder / "model.onnx").write_bytes(b"\x3a" + varint(len(message)) + message)


def varint(value: int) -> bytes:
    return (bytes([value & 127 | 128]) + varint(value >> 7)) if value > 127 else bytes([value])


def half(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 2]) and None


def cache_of(*dims: int) -> Callable[[Path], None]:
    """The cache's inputs and outputs promise another shape: (heads, dimension)."""

    def change(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            if len(value.type.tensor_type.shape.dim) == 4:
                for at, dim in zip((1, 3), dims, strict=True):
                    value.type.tensor_type.shape.dim[at].dim_value = dim

    return lambda folder: edit(folder, change)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no graph": (lambda f: (f / "model.onnx").unlink(), "holds no model.onnx"),
    "empty": (lambda f: (f / "model.onnx").write_bytes(b""), "truncated or not an ONNX file"),
    "text": (lambda f: (f / "model.onnx").write_text("<html>404 not found</html>"), "truncated or not an ONNX file"),
    "truncated graph": (half("model.onnx"), "truncated or not an ONNX file"),
    "truncated data": (half("model.onnx.data"), r"needs \d+ bytes, its entry names bytes"),
    "no data": (lambda f: (f / "model.onnx.data").unlink(), "data file 'model.onnx.data' of tensor .* is missing or a link"),
    "linked data": (link, "is missing or a link"),
    "parent folder": (first_tensor(location="../outside"), "wants its data from '../outside', outside the folder"),
    "absolute path": (first_tensor(location="/etc/passwd"), "wants its data from '/etc/passwd', outside the folder"),
    "windows path": (first_tensor(location="C:\\secret"), "outside the folder"),
    "folder itself": (first_tensor(location=".."), "outside the folder"),
    "hidden reference": (hidden_reference, "wants its data from '../../secret', outside the folder"),
    "offset": (first_tensor(offset=str(1 << 60)), r"needs \d+ bytes, its entry names bytes"),
    "negative offset": (first_tensor(offset="-64"), "its entry names bytes -64"),
    "offset of letters": (first_tensor(offset="ten"), "truncated or not an ONNX file"),
    "huge shape": (shape(1 << 40, 1 << 40), r"needs \d{20,} bytes"),
    "negative shape": (shape(-4), "has type 1 and shape"),
    "many dimensions": (shape(*[1] * 100), "more than 64 dimensions"),
    "huge shape inside": (inline_shape, "does not fit its 16 bytes"),
    "huge cache": (cache_of(1 << 40, 16), "wants a cache of 1099511627776 heads of 16 values"),
    "empty cache": (cache_of(0, 16), "wants a cache of 0 heads"),
    "nesting": (nested, "nested more than 100 deep"),
    "unknown operator": (lambda f: edit(f, lambda m: setattr(m.graph.node[-1], "op_type", "Odd")), "cannot run copy/model.onnx"),
    "configuration": (lambda f: (f / "genai_config.json").write_text("[" * 100_000), "genai_config.json is damaged"),
    "context length": (lambda f: (f / "genai_config.json").write_text('{"model": {"context_length": "x"}}'), "context_length is 'x'"),
}


@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused(hostile: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(hostile)
    with pytest.raises(ModelError, match=message):
        onnx_runtime.open(hostile, threads=1)


# `bench` looks at a file's parts before it opens it.
PARTS = {
    "truncated graph": "is no usable ONNX file: a field at byte",
    "truncated data": "model.onnx.data is damaged: .* lies outside of the file",
}


@pytest.mark.parametrize("name", ["truncated graph", "truncated data", "absolute path", "huge shape", "huge cache"])
@pytest.mark.parametrize("command", ["eval", "bench", "predict", "chat"])
def test_every_command_refuses_them(command: str, name: str, hostile: Path, faq: Path) -> None:
    damage, message = HOSTILE[name]
    damage(hostile)
    arguments = {
        "eval": (hostile, faq),
        "bench": (hostile, "--prompt-tokens", "4", "--repeats", "3"),
        "predict": (hostile, faq, "-o", "answers.csv"),
        "chat": (hostile, "--prompt", "Hello"),
    }[command]
    done = edgelora(command, *arguments, cwd=hostile.parent)
    assert (done.code, done.out) == (3, "")
    first, hint = done.err.strip().splitlines()
    assert first.startswith("error: ")
    assert re.search(PARTS.get(name, message) if command == "bench" else message, first)
    assert hint
    assert not (hostile.parent / "answers.csv").exists()


def test_damaged_tokenizer(hostile: Path) -> None:
    (hostile / "tokenizer.json").write_text("{}")
    with onnx_runtime.open(hostile, threads=1) as session, pytest.raises(ModelError, match=r"tokenizer.json cannot be read"):
        session.tokenize("x")


def test_unknown_input_is_named(hostile: Path) -> None:
    edit(hostile, lambda model: model.graph.input.append(onnx.helper.make_tensor_value_info("pixel_values", 1, [1])))
    with pytest.raises(Unsupported, match="unknown input 'pixel_values'"):
        onnx_runtime.open(hostile, threads=1)


def test_checking_takes_no_memory(hostile: Path) -> None:
    nodes = b"\x0a\x00" * 200_000  # empty nodes: two bytes each here, a hundred as objects
    (hostile / "model.onnx").write_bytes(b"\x3a" + varint(len(nodes)) + nodes)
    tracemalloc.start()
    with pytest.raises(ModelError, match="it holds no tensors"):
        onnx_folder.check_folder(hostile)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
