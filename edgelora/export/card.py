"""The model card of a file that ships: what it is, how good, how to run it, and whose base and data may be used how.

The card names the base, its licence and the data's as far as they are known, and says so where they are not: who
publishes answers for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora import artifact

# Licence identifiers of the hub -> what whoever passes a derived model on has to do. Longest prefix first.
_OBLIGATIONS = {
    "apache-2.0": "Keep the base's licence text and its NOTICE, if it has one, and say that you changed the model.",
    "mit": "Keep the base's copyright notice and licence text.",
    "bsd": "Keep the base's copyright notice and licence text.",
    "cc0": "Nothing is asked for.",
    "cc-by-nc": "Name the author and the changes. Commercial use is not allowed.",
    "cc-by-nd": "Changed versions may not be passed on: ask the owner before you publish.",
    "cc-by-sa": "Name the author and the changes, and pass it on under the same licence.",
    "cc-by": "Name the author and the licence, and say what was changed.",
    "gemma": (
        "Pass on Google's Gemma Terms of Use with their use restrictions, include the notice \"Gemma is provided under and subject to the "
        'Gemma Terms of Use found at ai.google.dev/gemma/terms", and say that you changed the model.'
    ),
    "llama": (
        'Pass on Meta\'s community licence, show "Built with Llama", begin the model\'s name with "Llama", and heed its acceptable use policy.'
    ),
    "qwen-research": "Commercial use is not allowed without a licence from the owner.",
    "openrail": "Pass on the licence with its use restrictions.",
    "bigscience-openrail": "Pass on the licence with its use restrictions.",
    "creativeml-openrail": "Pass on the licence with its use restrictions.",
    "gpl": "Pass it on under the same licence.",
    "agpl": "Pass it on under the same licence, also to who uses it over a network.",
}
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_LICENCE = re.compile(r"^license(?:_name)?:[ ]*[\"']?([\w.+-]+)", re.MULTILINE)
_LONGEST = 1 << 20  # bytes read of a base's README


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: the base's name and licence, the data's licence and whom it wants named."""

    base: str
    base_licence: str | None = None
    data_licence: str | None = None
    data_attribution: str | None = None


def licence_of(folder: Path) -> str | None:
    """The licence identifier that a Hugging Face folder states: in the facts of a base that was converted, or in its README."""
    if (folder / artifact.MANIFEST).is_file():
        stated = artifact.load(folder).facts.get("licence")
        return str(stated) if stated else None
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    with readme.open(encoding="utf-8", errors="replace") as stream:
        front = _FRONT_MATTER.match(stream.read(_LONGEST))
    found = dict.fromkeys(_LICENCE.findall(front[1])) if front else {}
    return next((name for name in found if name != "other"), None)


def obligations(licence: str | None) -> str:
    """What passing on asks for under a licence; says so when that is not known here."""
    if not licence:
        return "Unknown: find out before you publish."
    near = [name for name in _OBLIGATIONS if licence.lower().startswith(name)]
    return _OBLIGATIONS[max(near, key=len)] if near else "Not known here: read it before you publish."


def write(folder: Path, facts: Mapping[str, Any], origin: Origin, name: str, run: Sequence[tuple[str, str]]) -> Path:
    """Write ``README.md`` into `folder`. `run`: (where, command) of every way to run the file; no path of this machine is in it."""
    target = folder / "README.md"
    target.write_text("\n".join(_card(facts, origin, name, run)) + "\n", encoding="utf-8")
    return target


def _card(facts: Mapping[str, Any], origin: Origin, name: str, run: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield "---"
    yield f"license: {origin.base_licence or 'unknown'}"
    yield f"base_model: {json.dumps(origin.base, ensure_ascii=False)}"
    yield "base_model_relation: " + ("adapter" if facts["format"] == "gguf-lora" else "quantized")
    yield f"tags: [edgelora, {facts['format']}]"
    yield "---"
    yield f"\n# {name}\n"
    yield f"{origin.base}, fine-tuned and exported with edgelora as {facts['format']} {facts['type']}."
    yield "\n| file | size | KL to the trained model | same top token |\n| --- | --- | --- | --- |"
    kl = f"{facts['kl']:.3g} [{facts['kl_low']:.3g}, {facts['kl_high']:.3g}] nats a token" if "kl_low" in facts else f"{facts['kl']:.3g}"
    yield f"| `{facts['file']}` | {facts['size_bytes'] / 1e6:.1f} MB | {kl} | {facts['top1']:.0%} |"
    if "base_file" in facts:
        yield f"| `{facts['base_file']}`, the base it goes with | {facts['base_bytes'] / 1e6:.1f} MB | | |"
    yield f"\nMeasured on {facts['rows']} rows, {facts['tokens']} tokens, in {facts['runtime']}. Token ids and chat template equal the trained model's."
    yield "\n## Run it\n"
    for where, command in run:
        yield f"{where}:\n\n```\n{command}\n```\n"
    yield "## Licences\n"
    yield f"- Base: {origin.base}, {origin.base_licence or 'licence unknown'}. {obligations(origin.base_licence)}"
    data = origin.data_licence or "licence not stated (`data.licence` in the recipe)"
    who = f" by {origin.data_attribution}" if origin.data_attribution else ""
    yield f"- Training data{who}: {data}. {obligations(origin.data_licence)}"
    yield "\nA small model invents things with confidence. Check what it says before anyone relies on it."
