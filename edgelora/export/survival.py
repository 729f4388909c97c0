"""How much of what training changed is still there after rounding, in each candidate type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgelora.export import gguf
from edgelora.quant import grid
from edgelora.weights import Checkpoint

# Those that users choose among; what needs an importance matrix or is only for models trained to few values is left out.
CANDIDATES = ("q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k_m", "q2_k")


def survey(model: Path, base: Checkpoint, merged: Checkpoint, chosen: str) -> dict[str, Any]:
    """`grid`: the block grid that the base's weights lie on, or None. `kept`: file type -> share of the change that it keeps.

    `model` is a Hugging Face folder: its config.json and tokenizer are read; `chosen` is the type of the export.
    """
    names, _ = gguf.layer_matrices(model, "f16", base)
    found = grid.recognize(base, names)
    kept = {}
    for candidate in dict.fromkeys((chosen, *CANDIDATES)):
        _, types = gguf.layer_matrices(model, candidate, base)
        share = grid.kept(base, merged, names, types)
        if share is not None:
            kept[candidate] = share
    lies = {"type": found.type.name.lower(), "share": found.share, "error": found.error} if found else None
    return {"grid": lies, "kept": kept}
