"""What looks odd in texts, by name: not wrong by itself, but worth a look before it is trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

LINE_ENDS = "line ends inside"
ODDITIES = {
    LINE_ENDS: re.compile(r"\r\n|\r|\n"),
    "white space at the ends": re.compile(r"\A\s+|\s+\Z"),
    "no-break spaces": re.compile("\u00a0"),
    "ideographic spaces": re.compile("\u3000"),
    "spaces between Japanese words": re.compile(r"(?<=[\u3041-\u30fc\u4e00-\u9fff、。]) (?=[\u3041-\u30fc\u4e00-\u9fff])"),
    "half-width kana": re.compile("[\uff61-\uff9f]"),
    "full-width letters, digits and signs": re.compile("[\uff01-\uff5e]"),
    "ruby": re.compile("《[^《》]*》"),
    "editor's notes": re.compile("［＃[^］]*］"),
    "characters written as notes (※)": re.compile("※"),
    "special tokens of models": re.compile(r"###\w+_token###|<\|[\w-]{1,30}\|>|</?s>|<(?:eos|bos|pad|unk)>|\[(?:SEP|CLS|PAD|UNK)\]"),
    "templates already applied": re.compile(r"^### (?:Instruction|Response|Input):", re.MULTILINE),
    "placeholders": re.compile(r"(?<![\w$\\{])\{[a-z][\w-]{1,40}\}(?!\})|\{\{[^{}\n]{1,60}\}\}"),
    "HTML": re.compile(
        r"</?(?:br|p|div|span|a|b|i|li|ul|ol|td|tr|table|h[1-6])\b[^<>]{0,200}>|&(?:nbsp|amp|lt|gt|quot|#\d{1,6});", re.IGNORECASE
    ),
    "control characters": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff]"),
    "broken characters (�)": re.compile("\ufffd"),
    "formulas (kept as text)": re.compile(r"\A[=@][A-Za-z]+[(|!]|\A[=+\-@][^\s\d].*[(|!]"),
}
_SHOWN = 5  # lines kept of each


@dataclass
class Odd:
    """How often one of them was met, in how many texts, and the first lines."""

    count: int = 0
    texts: int = 0
    lines: list[int] = field(default_factory=list)


def look(texts: Iterable[str], line: int, found: dict[str, Odd]) -> None:
    """Add what is odd in the texts of one row to `found`."""
    for text in texts:
        for name, pattern in ODDITIES.items():
            if times := len(pattern.findall(text)):
                odd = found.setdefault(name, Odd())
                odd.count += times
                odd.texts += 1
                if len(odd.lines) < _SHOWN and line not in odd.lines:
                    odd.lines.append(line)
