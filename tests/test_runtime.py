"""llama.cpp and torch sessions on tiny models, and the GGUF header reader on good and hostile files."""

from __future__ import annotations

import json
import random
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from edgelora import gguf_header
from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.export import gguf as exporter
from edgelora.gguf_header import read_header
from edgelora.runtime import llama_cpp, torch_reference
from tests.tiny_models import ARCHITECTURES, CHAT_TEMPLATE, TEXTS, tiny_model, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and it isn't the dog's fault.<|im_end|>\n"


def quiet(share: float, text: str) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Path:
    return exporter.write(folder, "f16", folder.parent, "tiny", quiet)


@pytest.fixture(scope="module")
def llama(tiny: Path) -> Iterator[llama_cpp.LlamaSession]:
    with llama_cpp.open(tiny, 1) as session:
        yield session


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[torch_reference.TorchSession]:
    with torch_reference.open(folder, 1) as session:
        yield session


@pytest.fixture(params=["llama", "reference"])
def session(request: pytest.FixtureRequest) -> llama_cpp.LlamaSession | torch_reference.TorchSession:
    return request.getfixturevalue(request.param)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p || q) in nats of rows of log-probabilities."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


# --- sessions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_llama_cpp_scores_as_torch_does(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch, tmp_path / "hf")
    path = exporter.write(model, "f16", tmp_path, "tiny", quiet)
    with llama_cpp.open(path, 1) as ours, torch_reference.open(model, 1) as reference:
        ids = reference.tokenize(TEXT)
        expected, found = reference.score(ids), ours.score(ids)
        assert found.shape == expected.shape == (len(ids), json.loads((model / "config.json").read_text())["vocab_size"])
        assert found.dtype == expected.dtype == np.float32
        np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(-1), 1, atol=1e-5)
        assert kl(expected, found) < 5e-4  # weights are exact in F16; llama.cpp rounds activations to F16 too
        assert kl(expected[1:], expected[:-1]) > 0.1  # the rows do differ: agreement means something


def test_score_from_first_is_the_end_of_the_whole(session: llama_cpp.LlamaSession) -> None:
    ids = session.tokenize(TEXT)
    whole = session.score(ids)
    for first in (1, 3, len(ids) - 2, len(ids) - 1, len(ids)):
        part = session.score(ids, first)
        assert part.shape == (len(ids) - first, whole.shape[1])
        np.testing.assert_allclose(part, whole[first:], atol=0.02)


def test_score_beyond_one_batch(folder: Path, tmp_path: Path) -> None:
    """600 tokens are two batches; scored rows begin in the second."""
    model = tiny_model("llama", tmp_path / "hf", max_position_embeddings=1024)
    with llama_cpp.open(exporter.write(model, "f16", tmp_path, "long", quiet), 1) as ours, torch_reference.open(model, 1) as reference:
        ids = (reference.tokenize(TEXT) * 40)[:600]
        whole = ours.score(ids)
        assert kl(reference.score(ids), whole) < 1e-3
        for first in (100, 530):
            np.testing.assert_allclose(ours.score(ids, first), whole[first:], atol=0.05)
        assert next(ours.generate(ids, 1, ())) == whole[-1].argmax()


def test_generate_is_repeated_argmax(session: llama_cpp.LlamaSession) -> None:
    ids = session.tokenize("question: what is 7 x 8?")
    made = list(session.generate(ids, 12, ()))
    assert len(made) == 12
    grown = list(ids)
    for token in made:
        assert session.score(grown, len(grown) - 1)[0].argmax() == token
        grown.append(token)
    stop = made[5]
    assert list(session.generate(ids, 12, (stop,))) == made[: made.index(stop)]
    assert list(session.generate(ids, 0, ())) == []


def test_both_runtimes_say_the_same_of_a_file(llama: llama_cpp.LlamaSession, reference: torch_reference.TorchSession) -> None:
    assert llama.chat_template == reference.chat_template == CHAT_TEMPLATE
    assert llama.special_tokens == reference.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    end = reference.tokenize("<|im_end|>")
    assert [llama.stop_ids[0], reference.stop_ids[0]] == end * 2
    for text in (*TEXTS, "", "<|im_start|>user\n", "a" * 5000, "nul \0 inside"):
        ids = reference.tokenize(text)
        assert llama.tokenize(text) == ids
        assert llama.detokenize(ids) == reference.detokenize(ids)
    assert llama.detokenize(reference.tokenize("a<|im_end|>b")) == "ab"
    assert llama.detokenize([]) == ""


def test_vocabulary_alone(tiny: Path, llama: llama_cpp.LlamaSession) -> None:
    with llama_cpp.open_vocabulary(tiny) as vocabulary:
        assert vocabulary.tokenize(TEXT) == llama.tokenize(TEXT)
        assert vocabulary.stop_ids == llama.stop_ids


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: s.score([0] * 257), Unsupported, "257 tokens do not fit the model's context of 256"),
        (lambda s: s.generate([0] * 250, 8, ()), Unsupported, "257 tokens do not fit"),
        (lambda s: s.score([0, 100_000]), Unsupported, "the id 100000 is not in the vocabulary"),
        (lambda s: s.score([-1]), Unsupported, "the id -1 is not in the vocabulary"),
        (lambda s: s.score([]), Unsupported, "an empty sequence"),
        (lambda s: s.generate([], 3, ()), Unsupported, "an empty sequence"),
        (lambda s: s.score([0, 0], 3), ValueError, "first is 3, expected 0 to 2"),
    ],
)
def test_what_a_session_refuses(session: llama_cpp.LlamaSession, call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(session)  # type: ignore[operator]
    assert session.score([0] * 256, 255).shape[0] == 1  # and it still works, up to the last position
    assert len(list(session.generate([0] * 249, 8, ()))) == 8


def test_a_call_in_the_middle_of_generate_ends_it(session: llama_cpp.LlamaSession) -> None:
    tokens = session.generate(session.tokenize(TEXT), 5, ())
    next(tokens)
    session.score([1, 2])
    with pytest.raises(EdgeloraError, match="in the middle of generate"):
        next(tokens)


def test_sessions_do_not_disturb_each_other_and_close_twice(tiny: Path) -> None:
    first, second = llama_cpp.open(tiny, 1), llama_cpp.open(tiny, 1)
    ids = first.tokenize(TEXT)
    expected = list(first.generate(ids, 6, ()))
    one, other = first.generate(ids, 6, ()), second.generate(ids, 6, ())
    assert [x for pair in zip(one, other, strict=True) for x in pair] == [x for x in expected for _ in range(2)]
    first.close()
    first.close()
    assert list(second.generate(ids, 6, ())) == expected
    for call in (lambda: first.score(ids), lambda: first.tokenize("a"), lambda: first.detokenize([1])):
        with pytest.raises(EdgeloraError, match="session is closed"):
            call()
    second.close()


def test_torch_session_around_a_model_gives_it_back_as_it_was(folder: Path, reference: torch_reference.TorchSession) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32, attention_dropout=0.5)
    model.train()
    session = torch_reference.TorchSession(model, tiny_tokenizer("smollm"))
    ids = session.tokenize(TEXT)
    np.testing.assert_allclose(session.score(ids), reference.score(ids), atol=1e-4)  # no dropout
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    session.close()
    session.close()
    with pytest.raises(EdgeloraError, match="session is closed"):
        session.score(ids)
    assert model.training


def test_torch_folder_that_cannot_be_loaded(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match="transformers cannot load"):
        torch_reference.open(tmp_path, 1)


def test_failed_load_names_the_cause_and_keeps_quiet(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.X.attn_q.weight"))
    with pytest.raises(ModelError, match=r"cannot load .*broken.gguf: .*tensor 'blk.1.attn_q.weight' not found"):
        llama_cpp.open(broken, 1)
    with llama_cpp.open(tiny, 1) as session:
        session.score([1, 2, 3])
    assert capfd.readouterr() == ("", "")


def test_versions_name_program_and_package() -> None:
    assert "llama-cpp-python" in llama_cpp.version()
    assert torch.__version__ in torch_reference.version()


def test_bytes_a_token_reads(tiny: Path, tmp_path: Path) -> None:
    header = read_header(tiny)
    assert llama_cpp.bytes_per_token(tiny) == sum(t.n_bytes for t in header.tensors)  # tied: the table is the output layer too
    untied = exporter.write(tiny_model("llama", tmp_path / "hf", tie_word_embeddings=False), "f16", tmp_path, "untied", quiet)
    tensors = read_header(untied).tensors
    table = next(t for t in tensors if t.name == "token_embd.weight")
    assert llama_cpp.bytes_per_token(untied) == sum(t.n_bytes for t in tensors) - table.n_bytes + 2 * 64


# --- the header -----------------------------------------------------------------------------------------------------


def test_header_agrees_with_gguf_py(tiny: Path) -> None:
    ours, theirs = read_header(tiny), gguf.GGUFReader(tiny)
    assert {t.name: (t.shape, t.type, t.offset, t.n_bytes) for t in ours.tensors} == {
        t.name: (tuple(int(n) for n in t.shape), t.tensor_type.name, int(t.data_offset), int(t.n_bytes)) for t in theirs.tensors
    }
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert {name: list(v) if isinstance(v, gguf_header.Array) else v for name, v in ours.metadata.items()} == fields
    assert gguf_header.chat_template(tiny) == CHAT_TEMPLATE
    tokens = ours.metadata["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[2], tokens[:2]) == (len(tiny_tokenizer("smollm")), "<|im_end|>", ["<|endoftext|>", "<|im_start|>"])


def test_block_sizes_are_ggmls() -> None:
    known = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    newer = {42: ("Q2_0", 64, 18)}
    assert {k: known[k] for k in gguf_header.BLOCKS.keys() - newer} == {k: v for k, v in gguf_header.BLOCKS.items() if k not in newer}
    assert {v[0] for k, v in known.items() if k not in gguf_header.BLOCKS} == {"Q8_1"}  # never stored: an activation type


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def file(kv: list[bytes] = [], tensors: list[bytes] = [], data: bytes = b"", version: int = 3, n_kv: int | None = None) -> bytes:  # noqa: B006
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(kv) if n_kv is None else n_kv) + b"".join(kv + tensors)
    return head + bytes(-len(head) % 32) + data


def tensor(name: bytes = b"a", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def test_header_of_literal_bytes(tmp_path: Path) -> None:
    path = tmp_path / "literal.gguf"
    kv = [
        string(b"a") + struct.pack("<Ib", 1, -3),
        string(b"b") + struct.pack("<If", 6, 0.5),
        string(b"c") + struct.pack("<I?", 7, True),
        string(b"d") + struct.pack("<I", 8) + string("é".encode()),
        string(b"e") + struct.pack("<IIQ3h", 9, 3, 3, 1, -2, 3),
        string(b"f") + struct.pack("<IIQ", 9, 8, 2) + string(b"x") + string(b""),
        string(b"g") + struct.pack("<IQ", 10, 1 << 63),
    ]
    path.write_bytes(file(kv, [tensor(dims=(32, 3), kind=8), tensor(b"b", (), 0, 128)], bytes(132)))
    header = read_header(path)
    values = {k: list(v) if isinstance(v, gguf_header.Array) else v for k, v in header.metadata.items()}
    assert values == {"a": -3, "b": 0.5, "c": True, "d": "é", "e": [1, -2, 3], "f": ["x", ""], "g": 1 << 63}
    start = path.stat().st_size - 132
    assert header.tensors == (gguf_header.Tensor("a", (32, 3), "Q8_0", start, 102), gguf_header.Tensor("b", (), "F32", start + 128, 4))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it starts with b''"),
        (b"GGML" + bytes(40), "it starts with b'GGML'"),
        (b"GGUF", "the header goes past the end"),
        (file(version=1), "of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
        (file(n_kv=1 << 60), f"it claims {1 << 60} metadata entries"),
        (file(n_kv=5), "a key is 0 bytes long"),
        (file([struct.pack("<Q", 1 << 40)]), f"a key is {1 << 40} bytes long"),
        (file([string(b"\xff") + struct.pack("<IB", 0, 0)]), "a key is not UTF-8"),
        (file([string(b"k") + struct.pack("<IB", 0, 0)] * 2), "the key 'k' stands twice"),
        (file([string(b"k") + struct.pack("<I", 13)]), "the value of 'k' is of the unknown type 13"),
        (file([string(b"k") + struct.pack("<IQ", 8, 1 << 62)]), "k goes past the end"),
        (file([string(b"k") + struct.pack("<IIQ", 9, 10, 1 << 61)]), "k goes past the end"),
        (file([string(b"k") + struct.pack("<IIQ", 9, 8, 1 << 61)]), "k goes past the end"),
        (file([string(b"k") + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 1 << 63)]), "a string of 'k' goes past the end"),
        (file([string(b"k") + struct.pack("<IIQ", 9, 9, 1)]), "the value of 'k' is of the unknown type 9"),  # arrays of arrays
        (file([string(b"general.alignment") + struct.pack("<II", 4, 0)]), "general.alignment is 0"),
        (file([string(b"general.alignment") + struct.pack("<II", 4, 24)]), "general.alignment is 24"),
        (file([string(b"general.alignment") + struct.pack("<I", 8) + string(b"32")]), "general.alignment is '32'"),
        (file([], [tensor(b"n" * 64)], bytes(128)), "a tensor name is 64 bytes long"),
        (file([], [tensor(dims=(1, 1, 1, 1, 32))], bytes(128)), "has 5 dimensions"),
        (file([], [tensor(kind=4)], bytes(128)), "of the unknown type 4"),  # removed from ggml
        (file([], [tensor(dims=(33,), kind=8)], bytes(128)), "which Q8_0 cannot hold"),
        (file([], [tensor(dims=(0, 5))], bytes(128)), "has the shape (0, 5)"),
        (file([], [tensor(dims=(1 << 63, 1 << 63))], bytes(128)), "was it cut short?"),
        (file([], [tensor(offset=32)], bytes(128)), "was it cut short?"),
        (file([], [tensor(offset=8)], bytes(256)), "unaligned or inside another"),
        (file([], [tensor(), tensor(b"b", offset=96)], bytes(512)), "the tensor 'b' is at 96, which is unaligned or inside another"),
        (file([], [tensor(), tensor(offset=128)], bytes(512)), "the tensor 'a' stands twice"),
        (file([], [tensor()], bytes(127)), "was it cut short?"),
    ],
)
def test_hostile_header_is_refused(content: bytes, words: str, tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert words in caught.value.message
    assert caught.value.hint
    with pytest.raises(ModelError):
        llama_cpp.open(path, 1)


def changed(good: bytes, key: str, value: bytes) -> bytes:
    """The file with the bytes of a metadata value replaced; the value's type stays."""
    at = good.index(string(key.encode())) + 8 + len(key) + 4
    return good[:at] + value + good[at + len(value) :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda good: changed(good, "llama.block_count", struct.pack("<I", 0)), "llama.block_count is 0, not 1 to 512"),
        (lambda good: changed(good, "llama.block_count", struct.pack("<I", 1 << 20)), "llama.block_count is 1048576, not 1 to 512"),
        (lambda good: changed(good, "llama.attention.layer_norm_rms_epsilon", struct.pack("<f", -1.0)), "epsilon is -1.0"),
        (lambda good: changed(good, "llama.rope.freq_base", struct.pack("<f", float("nan"))), "rope.freq_base is nan"),
        (lambda good: changed(good, "llama.context_length", struct.pack("<I", (1 << 32) - 1)), "context_length is 4294967295"),
        (lambda good: good.replace(string(b"!"), string(b'"'), 1), "its vocabulary holds a token twice"),
        (lambda good: retyped(good, b"blk.0.attn_norm.weight", 26), "the tensor 'blk.0.attn_norm.weight' is of type I32"),
    ],
)
def test_files_that_would_abort_llama_cpp_are_refused(change: object, words: str, tiny: Path, tmp_path: Path) -> None:
    """Each of these ends the whole process inside llama.cpp (GGML_ASSERT or an uncaught exception) when it gets that far."""
    path = tmp_path / "killer.gguf"
    path.write_bytes(change(tiny.read_bytes()))  # type: ignore[operator]
    read_header(path)
    with pytest.raises(ModelError) as caught:
        llama_cpp.open(path, 1)
    assert words in caught.value.message


def retyped(good: bytes, name: bytes, kind: int) -> bytes:
    at = good.index(string(name)) + 8 + len(name)
    at += 4 + 8 * struct.unpack_from("<I", good, at)[0]
    return good[:at] + struct.pack("<I", kind) + good[at + 4 :]


def test_header_that_is_no_readable_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(ModelError, match="cannot read"):
            read_header(path)


def test_array_of_a_file_that_was_cut_afterwards(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes())
    tokens = read_header(path).metadata["tokenizer.ggml.tokens"]
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="became shorter"):
        list(tokens)


def test_mutated_headers_give_model_errors_and_nothing_else(tmp_path: Path, tiny: Path) -> None:
    """2,000 seeded mutations: bytes flipped, numbers blown up, pieces cut out, doubled or lost at the end."""
    draw = random.Random(7)
    good = tiny.read_bytes()
    head = read_header(tiny).tensors[0].offset
    path = tmp_path / "mutated.gguf"
    refused, slowest, before = 0, 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        path.write_bytes(mutated(draw, good, head))
        started = time.perf_counter()
        try:
            header = read_header(path)
            for value in header.metadata.values():
                if isinstance(value, gguf_header.Array):
                    assert len(list(value)) == len(value)
        except ModelError:
            refused += 1
        slowest = max(slowest, time.perf_counter() - started)
    assert refused > 800  # most mutations hit something that is checked
    assert slowest < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def mutated(draw: random.Random, good: bytes, head: int) -> bytes:
    at, data = draw.randrange(head), bytearray(good)
    kind = draw.randrange(5)
    if kind == 0:
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(head)] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1]))
    elif kind == 2:
        del data[at : at + draw.randrange(1, 64)]
    elif kind == 3:
        data[at:at] = data[at : at + draw.randrange(1, 64)]
    else:
        del data[draw.randrange(len(data)) :]
    return bytes(data)


def test_header_of_a_large_file_is_quick_and_needs_only_the_standard_library(tmp_path: Path) -> None:
    """A sparse 4 GB file with a vocabulary of 256k tokens, read in a process that may import nothing heavy."""
    path = tmp_path / "large.gguf"
    words = b"".join(string(b"token%d" % i) for i in range(256_000))
    kv = [string(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 256_000) + words]
    path.write_bytes(file(kv, [tensor(dims=(1 << 20, 1 << 10))]))
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + (4 << 30))
    program = (
        "import sys, time, pathlib; from edgelora.gguf_header import read_header; t = time.perf_counter()\n"
        "h = read_header(pathlib.Path(sys.argv[1])); print(time.perf_counter() - t, h.tensors[0].n_bytes)\n"
        "assert not {'numpy', 'gguf', 'torch'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    seconds, n_bytes = run.stdout.split()
    assert int(n_bytes) == 4 << 30
    assert float(seconds) < 1
