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
    return [*([weights(facts), *fallbacks(mixture)] if mixture else []), *survival(facts)]
