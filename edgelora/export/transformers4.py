"""A checkpoint of transformers 5 as transformers 4 reads it, for exporters that want that.

Settings that version 5 moved are put back, or version 4 would export wrong rotations without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def described(model: Path, scratch: Path) -> Path:
    """``scratch/described``: a folder of links to the model's files, with the settings where transformers 4 looks for them.

    Python files of the model, and settings that name them, stay behind: an exporter that trusts any code finds none.
    """
    folder = scratch / "described"
    folder.mkdir()
    for path in model.iterdir():
        if path.is_file() and path.suffix != ".py":
            (folder / path.name).symlink_to(path.resolve())
    for name, change in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if (folder / name).exists():
            (folder / name).unlink()
            values = json.loads((model / name).read_text(encoding="utf-8"))
            (folder / name).write_text(json.dumps(change(values)), encoding="utf-8")
    return folder


def config(values: dict[str, Any]) -> dict[str, Any]:
    """transformers 5's `rope_parameters` and `dtype` as transformers 4 calls them: rope_theta, rope_scaling, torch_dtype."""
    found = {key: value for key, value in values.items() if key not in ("rope_parameters", "dtype", "auto_map")}
    rope = dict(values.get("rope_parameters") or {})
    if "full_attention" in rope:
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    if "rope_theta" in rope:
        found["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = rope | {"type": rope["rope_type"]}
        if values.get("model_type") == "phi3":  # which knows three keys and no others
            found["rope_scaling"] = {"type": rope["rope_type"], **{key: rope[key] for key in ("short_factor", "long_factor")}}
    if "dtype" in values:
        found["torch_dtype"] = "float32"
    return found


def tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    """transformers 5's TokenizersBackend is unknown to 4, which then leaves the tokenizer out and ends with 0."""
    return {key: value for key, value in values.items() if key != "auto_map"} | {"tokenizer_class": "PreTrainedTokenizerFast"}
