"""Coverage-guided fuzzing of what reads files from outside: GGUF headers, safetensors, chat templates.

    pip install --target /tmp/atheris --no-deps atheris==3.0.0
    PYTHONPATH=/tmp/atheris:. python bench/fuzz.py gguf --seconds 200      # then safetensors, then template

Atheris (libFuzzer) changes a good file's bytes towards code that no file has reached yet. A finding is any exception but
the ModelError that users are meant to see, more than 64 MiB of memory over the start, or an input that takes over 5 seconds.
The last line is one JSON document: inputs tried, code reached. What was found, and mended, stands in NOTES.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgelora"]):
    from edgelora import gguf_header, weights
    from edgelora.data import template
    from edgelora.errors import ModelError

from tests import hostile_files

_TEMPLATES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}{% if add_generation_prompt %}x{% endif %}",
    "{%- set ns = namespace(a=1) %}{% macro f(x) %}{{ x | trim | tojson }}{% endmacro %}{{ f(messages[0].content) }}{{ raise_exception('no') }}",
    "{% for i in range(9) %}{% if loop.first %}{% continue %}{% endif %}{{ '%05d' % i }}{{ bos_token ~ 'a' * i }}{% endfor %}",
)


def targets(folder: Path) -> dict[str, tuple[list[bytes], Callable[[bytes], None]]]:
    file, tensors = folder / "x.gguf", folder / "model.safetensors"

    def read_gguf(data: bytes) -> None:
        file.write_bytes(data)
        hostile_files.read_gguf(file)

    def read_safetensors(data: bytes) -> None:
        tensors.write_bytes(data)
        hostile_files.read_safetensors(folder)

    def render(data: bytes) -> None:
        with contextlib.suppress(ModelError):
            template.render(data.decode("utf-8", "replace"), [("user", "hello")], {"bos_token": "<s>"})

    return {
        "gguf": ([hostile_files.small_gguf()], read_gguf),
        "safetensors": ([hostile_files.small_safetensors()], read_safetensors),
        "template": ([text.encode() for text in _TEMPLATES], render),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["gguf", "safetensors", "template"])
    parser.add_argument("--seconds", type=int, default=200)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    assert (hostile_files.gguf_header, hostile_files.weights) == (gguf_header, weights)  # the instrumented ones
    with tempfile.TemporaryDirectory() as work:
        seeds, read = targets(Path(work))[options.target]
        corpus = Path(work) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(seeds):
            (corpus / f"good-{number}").write_bytes(seed)
            for chance in range(40):
                (corpus / f"damaged-{number}-{chance}").write_bytes(hostile_files.damaged(seed, random.Random(chance)))
        tried, started = 0, time.monotonic()

        def one(data: bytes) -> None:
            nonlocal tried
            tried += 1
            read(data)
            if time.monotonic() - started > options.seconds:
                print(json.dumps({"target": options.target, "inputs": tried, "seconds": round(time.monotonic() - started)}), flush=True)
                os._exit(0)  # libFuzzer offers no way back

        flags = [
            "-max_len=4096",
            "-timeout=5",
            "-rss_limit_mb=700",
            f"-artifact_prefix={options.findings}/{options.target}-",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
