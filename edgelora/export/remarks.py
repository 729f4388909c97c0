"""What an export's facts say in sentences: where its type did not fit the model, and what of the training it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Facts = Mapping[str, Any]

LITTLE = 0.5  # of a change kept: below, the file is hardly the model that was trained


def weights(facts: Facts) -> str:
    """Bits a weight, and whether rounding was by importance (where anything looks at it)."""
    weighed = facts.get("importance")
    how = "" if weighed is None else ", rounded by importance" if weighed else ", rounded without an importance matrix"
    return f"{facts['weights']['bits_a_weight']:.2f} bits a weight{how}"


def fallbacks(mixture: Facts) -> list[str]:
    """What became of matrices whose rows are no multiple of the block that their type has."""
    return [
        f"{f['wanted']} needs rows of a multiple of {f['block']}: {f['tensors']} of {sum(mixture['types'].values())} matrices "
        f"have {f['columns']} and are {f['type']}, as in llama.cpp"
        for f in mixture["fallbacks"]
    ]


def further(facts: Facts) -> list[str]:
    """Whether other runtimes answer alike, and what their own tokenizers and template engines do otherwise."""
    lines = []
    for name, found in (facts.get("further") or {}).items():
        lines.append(f"{name} answers alike: KL {found['kl']:.2g}" + (", the same text" if found["same_text"] else ""))
        if not found["tokens_equal"]:
            where = "unusual texts" if found["rows_equal"] else "these rows"
            lines.append(f"{name}'s own tokenizer splits {where} otherwise: give it ids by tokenizer.json")
        if not found["template_equal"]:
            lines.append(f"{name}'s own template engine renders the chat template otherwise: give it rendered text")
    return lines


def web(facts: Facts) -> list[str]:
    """The folder for browsers, and whether transformers.js answers alike."""
    found = facts.get("web")
    if not found:
        return []
    ran = found.get("transformers.js")
    how = (
        f"transformers.js {ran['version']} answers {'alike' if ran['same_text'] else 'with the same first tokens'}"
        if ran
        else "not run: no Node"
    )
    return [f"for browsers: {found['file']}, {found['size_bytes'] / 1e6:.1f} MB, {how}"]


def rounded(facts: Facts) -> list[str]:
    """Of formats without a mixture: whether training rows said how to round."""
    weighed = facts.get("importance")
    if weighed is None or "weights" in facts:
        return []
    return ["rounded by what training rows say matters" if weighed else "rounded without training rows: with --rows it comes closer"]


def survival(facts: Facts) -> list[str]:
    """How much of what training changed the file keeps; more where the base was once quantized."""
    change = facts.get("change") or {}
    kept, lies = change.get("kept", {}), change.get("grid")
    chosen = str(facts["type"])
    if chosen not in kept:
        return []
    found = [f"{chosen} keeps {kept[chosen]:.0%} of what training changed"]
    if lies:
        others = ", ".join(f"{name} {share:.0%}" for name, share in kept.items() if name != chosen)
        found.append(
            f"{'warning: ' if kept[chosen] < LITTLE else ''}{lies['share']:.0%} of the base's matrices lie on the grid of {lies['type']} "
            f"already: it was once stored so, and what training changes little is rounded away there. Other types keep: {others}"
        )
    return found


def all_of(facts: Facts) -> list[str]:
    """Everything above that a file's facts hold."""
    mixture = facts.get("weights")
    return [*([weights(facts), *fallbacks(mixture)] if mixture else []), *rounded(facts), *further(facts), *web(facts), *survival(facts)]
