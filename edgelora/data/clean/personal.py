"""Personal data in a text: e-mail, phone and card numbers, Japanese postal codes and My Numbers.

Found by form and, where there is one, by check digit. A FAQ's own hotline looks the same as a customer's number, so they are
reported; only on request is a placeholder put in their place.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from edgelora.data.clean.edits import Edit


class Found(NamedTuple):
    kind: str  # e-mail, phone, card, postal code, My Number
    text: str
    start: int
    end: int


# One pattern over a text whose full-width digits were made plain, character by character, so that places agree.
_PLAIN = str.maketrans("０１２３４５６７８９－‐−（）＋＠．", "0123456789---()+@.")
_LONG_MARK = re.compile(r"(?<=\d)ー(?=\d)")
_HINT = re.compile(r"@|\d{3}")
_PATTERN = re.compile(
    r"(?P<mail>(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,5})"
    r"|(?P<number>(?<![\w.+-])(?:\d{12}|\d{4}[- ]\d{4}[- ]\d{4})(?![\w-]| ?\d))"
    r"|(?P<card>(?<![\w.+-])\d(?:[ -]?\d){12,18}(?![\w-]))"
    r"|(?P<postal>〒 ?\d{3}-?\d{4}(?!\d))"
    r"|(?P<phone>(?<![\w./:-])(?:\+\d{1,3}[ -]?\(?\d{1,4}\)?(?:[ -]\d{2,4}){2,3}|0\d{1,3}[-(]\d{2,4}[-)]\d{3,4}|0[5789]0\d{8}|0\d{9}"
    r"|\(?[2-9]\d{2}\)?[ -][2-9]\d{2}-\d{4}|1-8\d{2}-\d{3}-\d{4})(?![\w-]))"
)
_NAMES = {"mail": "e-mail", "number": "My Number", "card": "card", "postal": "postal code", "phone": "phone"}
_ABOUT_MY_NUMBER = re.compile("マイナンバー|個人番号|My ?Number", re.IGNORECASE)


def find(text: str) -> Iterator[Found]:
    """Every piece of personal data in `text`, in order. A card number has to pass Luhn's check, a My Number its check digit."""
    if not _HINT.search(text):  # \d is any Unicode digit
        return
    plain = _LONG_MARK.sub("-", text.translate(_PLAIN))
    for match in _PATTERN.finditer(plain):
        digits = "".join(c for c in unicodedata.normalize("NFKC", match[0]) if c.isdigit())
        group = match.lastgroup or ""
        if group == "card" and not (digits[0] in "3456" and luhn(digits)):
            continue
        if group == "number" and not (my_number(digits) and _ABOUT_MY_NUMBER.search(text)):
            continue
        yield Found(_NAMES[group], text[match.start() : match.end()], match.start(), match.end())


def remove(text: str, edits: list[Edit]) -> str:
    """Put [e-mail], [phone], [card], [postal code] or [My Number] in place of what `find` finds."""
    pieces, end = [], 0
    for found in find(text):
        pieces += [text[end : found.start], f"[{found.kind}]"]
        edits.append(Edit(found.text, f"[{found.kind}]"))
        end = found.end
    return "".join([*pieces, text[end:]])


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1: from the right, every second digit doubled, digits summed, divisible by ten."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def my_number(digits: str) -> bool:
    """Whether the twelfth digit is the check digit of the first eleven (Japan's ordinance 85 of 2014, article 5)."""
    body = [int(d) for d in reversed(digits[:11])]
    rest = sum(value * (place + 2 if place < 6 else place - 4) for place, value in enumerate(body)) % 11
    return int(digits[11]) == (0 if rest <= 1 else 11 - rest)
