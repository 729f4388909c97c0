"""`edgelora bench` as a user runs it: quality beside speed, estimates, and the page that is shared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgelora import report
from edgelora.cli import cli
from edgelora.errors import EdgeloraError, UsageError
from edgelora.export import gguf
from edgelora.report import charts, fronts
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three exports of one tiny model, and rows."""
    root = tmp_path_factory.mktemp("secret-place")
    model = tiny_model("llama", root / "hf")
    for kind in ("f16", "q8_0", "q4_0"):
        gguf.write(model, kind, root, "tiny", lambda share, text: None)
    rows = [{"question": f"What is part {n}?", "answer": f"Part {n} is a wheel."} for n in range(6)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)


def test_quality_stands_beside_speed_on_a_page(folder: Path, tmp_path: Path) -> None:
    files = [folder / "tiny-q8_0.gguf", folder / "tiny-q4_0.gguf"]
    options = ("--rows", folder / "rows.jsonl", "--reference", folder / "tiny-f16.gguf", "--most", 4)
    short = ("--threads", 1, "--prompt-tokens", "4,8", "--repeats", 3)
    done = invoke(*files, *options, *short, "-o", tmp_path / "page", "--json")
    found = json.loads(done.stdout)
    assert [(row["file"], row["prompt_tokens"]) for row in found["bench"]] == [(path.name, n) for path in files for n in (4, 8)]
    near, far = (next(row for row in found["divergence"] if row["file"] == path.name) for path in files)
    assert 0 <= near["kl"] < far["kl"]  # eight bits are nearer to sixteen than four
    assert near["rows"] == 4
    assert [row["rows"] for row in found["losses"]] == [4, 4]
    assert len(found["answers"]) == 4

    document = report.read(tmp_path / "page")
    assert [row["kl"] for row in document["files"]] == [near["kl"], far["kl"]]
    assert [row["size_bytes"] for row in document["files"]] == [path.stat().st_size for path in files]
    assert all(sum(n for types in row["parts"].values() for n in types.values()) == row["size_bytes"] for row in document["files"])
    assert document["commands"] == [
        "edgelora bench tiny-q8_0.gguf tiny-q4_0.gguf --threads 1 --prompt-tokens 4,8 --repeats 3 --rows rows.jsonl "
        "--reference tiny-f16.gguf --most 4"
    ]
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    for words in ("Quality against size", "Quality against speed", "Where the MB go", "Answers side by side", "Perplexity"):
        assert words in page
    assert "secret-place" not in page + json.dumps(document)  # where files lie is nobody's business


def test_a_real_file_that_answers_nonsense_fast_is_on_no_front(folder: Path, tmp_path: Path) -> None:
    """Two files of a model that learned the rows, and one that learned nothing and has a third of their layers."""
    learned = taught(folder / "hf", folder / "rows.jsonl", tmp_path / "learned")
    files = [gguf.write(learned, kind, tmp_path, "learned", lambda share, text: None) for kind in ("f16", "q4_0")]
    empty = tiny_model("llama", tmp_path / "empty", num_hidden_layers=1, intermediate_size=32)
    files.append(gguf.write(empty, "q8_0", tmp_path, "nonsense", lambda share, text: None))
    short = ("--threads", 1, "--prompt-tokens", "8", "--repeats", 3)
    invoke(*files, "--rows", folder / "rows.jsonl", *short, "-o", tmp_path / "page", "--quiet")

    document = report.read(tmp_path / "page")
    size = {row["file"]: row["size_bytes"] for row in document["files"]}
    bad = "nonsense-q8_0.gguf"
    assert size[bad] == min(size.values())
    assert list(fronts.nonsense(document)) == [bad]
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert page.count("answers nonsense: never on the front") == 2
    assert page.count('class="cross') == 2
    series = charts.colours(document)
    for drawn, least in ((fronts.size_quality(document, series, {}), 2), (fronts.speed_quality(document, series, {}), 0)):
        ((x, y),) = re.findall(r'<path d="M([-\d.]+),([-\d.]+)l9', drawn)
        front = re.findall(r"([-\d.]+),([-\d.]+)", "".join(re.findall(r'<polyline points="([^"]+)" class="frontier"', drawn)))
        assert len(front) >= least
        assert (f"{float(x) + 4.5:.1f}", f"{float(y) + 4.5:.1f}") not in {(f"{float(x):.1f}", f"{float(y):.1f}") for x, y in front}


def taught(model: Path, rows: Path, folder: Path) -> Path:
    """The model after a second of learning the rows by heart."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer, net = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    batch = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        batch.append(tokenizer.apply_chat_template(messages, return_dict=False))
    longest = max(map(len, batch))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
    steps, threads = torch.optim.Adam(net.parameters(), lr=3e-3), torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other in a model as small as this
    for _ in range(60):
        net(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        steps.step()
        steps.zero_grad()
    torch.set_num_threads(threads)
    net.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_two_benches_are_compared(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        invoke(folder / "tiny-q8_0.gguf", "--threads", 1, "--prompt-tokens", "4", "--repeats", 3, "-o", tmp_path / name, "--quiet")
    done = CliRunner().invoke(
        cli, ["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "both")], catch_exceptions=False
    )
    assert "peak memory" in done.output
    rows = {row["what"]: row for row in report.read(tmp_path / "both" / "comparison.json")["rows"]}
    assert rows["size"]["verdicts"][1] is None  # the same file
    assert rows["decode (llama.cpp, 1 thread, 4-token prompt)"]["verdicts"][1]["word"] in ("noise", "cannot tell", "real")


def test_estimates_measure_nothing(folder: Path, tmp_path: Path) -> None:
    done = invoke(folder / "tiny-q8_0.gguf", "--estimate", "raspberry-pi-5,oneplus-12", "-o", tmp_path / "page")
    assert done.stdout.count("ESTIMATE  ") == 2
    assert "tok/s" in done.stdout
    document = report.read(tmp_path / "page")
    assert [row["device"] for row in document["estimates"]] == ["Raspberry Pi 5", "OnePlus 12 (Snapdragon 8 Gen 3)"]
    assert "bench" not in document
    assert "machine" not in document  # nothing ran on it
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "Nothing here was measured." in page
    assert "Estimate, tok/s: tiny-q8_0.gguf in llama.cpp" in page
    assert "not validated" in page  # far smaller than what was published


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--reference", "x.gguf"), "--reference needs rows"),
        (("--devices", "x.yaml"), "--devices is a table for --estimate"),
        (("--estimate", "all", "--rows", "rows.csv"), "--estimate runs no file"),
        (("--estimate", "nokia-3310"), "no device 'nokia-3310'"),
        (("--runtime", "onnxruntime"), "tiny-q8_0.gguf is not opened by 'onnxruntime'"),
        (("--prompt-tokens", "32,x"), "are not counts above 0"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(EdgeloraError) as caught:
        invoke(folder / "tiny-q8_0.gguf", *arguments)
    assert isinstance(caught.value, UsageError)
    assert words in caught.value.message
    assert caught.value.hint


def test_a_reference_that_reads_other_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    other = gguf.write(tiny_model("qwen2", tmp_path / "hf"), "f16", tmp_path, "other", lambda share, text: None)
    with pytest.raises(UsageError, match="read the rows as different tokens"):
        invoke(folder / "tiny-q8_0.gguf", "--rows", folder / "rows.jsonl", "--reference", other, "--threads", 1, "--repeats", 3)
