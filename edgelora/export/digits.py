"""A tokenizer's rule "Digits" as a pattern: to the tokenizers library '½' is a digit, to MNN and transformers.js it is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def as_pattern(path: Path) -> None:
    """Write the rule in `path`, a tokenizer.json, as one that all of them read alike; a link is replaced, not followed."""
    values = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    values["pre_tokenizer"] = _mended(values.get("pre_tokenizer"))
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _mended(rule: Any) -> Any:
    if isinstance(rule, dict) and rule.get("type") == "Digits":
        pattern = r"\p{N}" if rule.get("individual_digits") else r"\p{N}+"
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    if isinstance(rule, dict) and rule.get("type") == "Sequence":
        return rule | {"pretokenizers": [_mended(part) for part in rule["pretokenizers"]]}
    return rule
