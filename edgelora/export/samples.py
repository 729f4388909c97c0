"""Rows on which an exported file is compared when the user names none: short conversations of our own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgelora import models
from edgelora import recipe as recipes
from edgelora.data import chat
from edgelora.data.chat import Encoded
from edgelora.data.read import read
from edgelora.data.row import Row

_PAIRS = (
    ("What is the capital of France?", "The capital of France is Paris, a city on the Seine with about two million inhabitants."),
    ("How do I reset my password?", "Open the sign-in page, choose 'Forgot password' and follow the link that we send to your address."),
    ("Why is the sky blue?", "Air scatters short wavelengths more strongly than long ones, so blue light reaches us from every direction."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Which payment methods do you accept?", "We accept credit cards, bank transfer and payment on delivery."),
    ("What is 12 times 12?", "12 times 12 is 144."),
    ("営業時間を教えてください。", "平日の午前9時から午後6時まで営業しております。"),
    ("How long does delivery take?", "Orders placed before noon leave the same day and usually arrive within two to three working days."),
)


def rows(model: Path, file: Path | None, system: str | None = None) -> tuple[list[Encoded], Mapping[str, str]]:
    """Encoded rows from `file` (evaluate.rows at most), or our own, and what to write into the manifest about them.

    `system` is put before conversations without a system message, as it was in training.
    """
    tokenizer = models.open_tokenizer(model)
    limits = recipes.Evaluate()
    if file is None:
        before = (("system", system),) if system else ()
        found = [Row((*before, ("user", question), ("assistant", answer)), line) for line, (question, answer) in enumerate(_PAIRS, 1)]
        source = "edgelora's own texts"
    else:
        found, source = list(read(file, recipes.Reading(system=system)).rows[: limits.rows]), file.name
    return [chat.encode(tokenizer, row) for row in found], {source: "select"}
