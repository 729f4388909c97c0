"""Characters: broken encodings, invisible ones, and widths. Full NFKC would turn ① into 1, m² into m2 and （） into (): this does not."""

from __future__ import annotations

import re
import unicodedata

from edgelora.data.clean.edits import Edit, difference, outside_code, substitute

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb]"
)  # not U+200C and U+200D: Persian, Indic scripts and emoji need them
_BYTES_AS_LETTERS = re.compile("[\x80-\u052f\u2500-\u259f]")  # among what UTF-8's bytes look like in any one-byte encoding
_LINE_ENDS = re.compile("\r\n?|\u2028|\u2029|\x85")
_ODD_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
# Runs that begin with a full-width letter or digit; marks inside them only where letters or digits stand on both sides.
_FULL = re.compile(
    "[Ａ-Ｚａ-ｚ０-９]+(?:(?:[．：／－＿＠＋＝＆＃]|(?<=[０-９])，(?=[０-９]))[Ａ-Ｚａ-ｚ０-９A-Za-z0-9]+)*(?:(?<=[０-９])％)?"
)
_HALF_KANA = re.compile("[\uff61-\uff9f]+")
_LONG_MARK_AS_DASH = re.compile(r"(?<=[0-9０-９])ｰ(?=[0-9０-９])")
_LIGATURE = re.compile("[\ufb00-\ufb06]")
_DECOMPOSED = re.compile("[^\\W\\d_][\u0300-\u036f\u3099\u309a]{1,4}")


def mojibake(text: str, edits: list[Edit]) -> str:
    """Text that was decoded with the wrong encoding somewhere on its way ("Ã©" for "é"), mended by ftfy."""
    if text.isascii() or not _BYTES_AS_LETTERS.search(text):
        return text
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    if not is_bad(text):
        return text
    mended = fix_encoding(text)
    if mended != text:
        edits.append(difference(text, mended))
    return mended


def controls(text: str, edits: list[Edit]) -> str:
    """Control characters, byte order marks and invisible direction marks go; line ends become \\n, odd spaces plain ones."""
    if text.isascii() and text.isprintable():
        return text
    text = substitute(_LINE_ENDS, "\n", text, edits)
    text = substitute(_INVISIBLE, "", text, edits)
    return substitute(_ODD_SPACES, " ", text, edits)


@outside_code(re.compile("[０-９Ａ-Ｚａ-ｚ\uff61-\uff9f\ufb00-\ufb06\u0300-\u036f\u3099\u309a]"))
def width(text: str, edits: list[Edit]) -> str:
    """Half-width kana become full-width, full-width letters and digits plain ones, loose accents and ligatures whole letters.

    Punctuation, brackets, circled digits, powers, units and fractions stay: they carry meaning or are good Japanese style.
    """
    text = substitute(_LONG_MARK_AS_DASH, "-", text, edits)
    text = substitute(_HALF_KANA, lambda m: unicodedata.normalize("NFKC", m[0]), text, edits)
    text = substitute(_FULL, lambda m: unicodedata.normalize("NFKC", m[0]), text, edits)
    text = substitute(_LIGATURE, lambda m: unicodedata.normalize("NFKC", m[0]), text, edits)
    return substitute(_DECOMPOSED, lambda m: unicodedata.normalize("NFC", m[0]), text, edits)
