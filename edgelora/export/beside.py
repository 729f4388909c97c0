"""What lies beside a file that ships: model card, checksums and, for GGUF, an Ollama Modelfile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelora import artifact
from edgelora.export import card
from edgelora.export.card import Origin
from edgelora.gguf_header import base_of
from edgelora.tuned import Tuned

__all__ = ["Origin", "checksums", "origin", "write"]


def origin(model: Tuned, data_licence: str | None = None, data_attribution: str | None = None) -> Origin:
    """Where a model comes from, as far as its folder and the recipe say."""
    return Origin(model.name or model.base.name, card.licence_of(model.base), data_licence, data_attribution)


def write(folder: Path, facts: Mapping[str, Any], origin: Origin, name: str, system: str | None) -> None:
    """Write README.md, SHA256SUMS and for GGUF a Modelfile into `folder`, which holds the file of `facts`.

    An adapter's base has a template of its own, so there the system message of training stands in the Modelfile.
    """
    commands = []
    if facts["format"] in ("gguf", "gguf-lora"):
        from edgelora.export import modelfile

        file = folder / str(facts["file"])
        base = base_of(file)
        modelfile.write(base or file, adapter=file if base else None, licence=origin.base_licence, system=system if base else None)
        commands = _commands(file.name, base.name if base else None, name)
    card.write(folder, facts, origin, name, commands)
    checksums(folder)


def _commands(file: str, base: str | None, name: str) -> list[tuple[str, str]]:
    """Ways to run a GGUF file. The first is what our tests run."""
    model = f"--model {base} --lora_path {file}" if base else f"--model {file}"
    whole = f"-m {base} --lora {file}" if base else f"-m {file}"
    return [
        (
            'An endpoint as OpenAI\'s (`pip install "llama-cpp-python[server]"`)',
            f"python -m llama_cpp.server {model} --model_alias {name} --host 127.0.0.1 --port 8080",
        ),
        ("Ollama", f"ollama create {name.lower()} -f Modelfile && ollama run {name.lower()}"),
        ("llama.cpp", f"llama-cli {whole} --temp 0"),
    ]


def checksums(folder: Path) -> Path:
    """Write ``SHA256SUMS`` over every file of `folder`, for ``sha256sum -c SHA256SUMS``."""
    target = folder / "SHA256SUMS"
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != target and p.name != artifact.MANIFEST)
    lines = [f"{artifact.sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    target.write_text("".join(lines), encoding="utf-8")
    return target
