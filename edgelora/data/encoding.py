"""Find out how a text file is encoded. Excel saves Shift_JIS (cp932) in Japan and cp1252 in the West, and says so nowhere.

The order: a byte order mark; UTF-16 by its zero bytes; UTF-8, which other text almost never satisfies by accident; then
the encodings in which the whole text decodes, judged by whether the result reads like a language.
"""

from __future__ import annotations

import re

from edgelora.errors import DataError

_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_JAPANESE = ("cp932", "euc_jp")
_WESTERN = "cp1252"
_SAMPLE = 1 << 20  # bytes that the library judges
# Kana and Japanese punctuation; what half-width kana are in a text is most often EUC-JP read as Shift_JIS.
_KANA = re.compile("[\u3001\u3002\u3041-\u3096\u30a1-\u30fc]")
_HALF_WIDTH = re.compile("[\uff61-\uff9f]")
_STRAY = re.compile("[\x80-\x9f\uf8f0-\uf8f3]")
_BEYOND_ASCII = re.compile("[^\x00-\x7f]")
_ACCENTED = re.compile("[\u00c0-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e]")
_FOREIGN = re.compile("[\u00c0-\u00ff]{4}")
_MARKS_OF_PRINT = frozenset(
    "\u2018\u2019\u201a\u201c\u201d\u201e\u2013\u2014\u2026\u2022\u2122\u20ac"
    "\u00a0\u00a1\u00a3\u00a7\u00a9\u00aa\u00ab\u00ae\u00b0\u00b2\u00b3\u00b7\u00ba\u00bb\u00bc\u00bd\u00be\u00bf"
)
_ZEROS = 8  # a header line alone leaves more than that; a stray NUL or two do not make UTF-16
# What the library may decide. Not the single-byte encodings in which any bytes at all are text.
_OTHERS = (
    "gb18030",
    "gbk",
    "gb2312",
    "big5",
    "big5hkscs",
    "cp950",
    "euc_kr",
    "cp949",
    "johab",
    "cp1250",
    "cp1251",
    "koi8_r",
    "koi8_u",
    "cp1253",
    "cp1255",
    "iso8859_2",
    "iso8859_5",
    "iso8859_7",
)
_PLAUSIBLE = 0.15  # share of kana among all beyond ASCII; running Japanese has about a half, lists of names a fifth


def marked(raw: bytes) -> str | None:
    """The encoding that a byte order mark declares."""
    return next((name for mark, name in _MARKS if raw.startswith(mark)), None)


def detect(raw: bytes, name: str) -> str:
    """The encoding of a whole file's bytes; `name` is the file's. DataError when nothing fits well enough to go on."""
    if declared := marked(raw):
        return declared
    if wide := _wide(raw):
        return wide
    if _decodes(raw, "utf-8"):
        return "utf-8"
    scores = {encoding: _kana_share(raw.decode(encoding)) for encoding in _JAPANESE if _decodes(raw, encoding)}
    best = max(scores, key=lambda encoding: scores[encoding], default=None)
    if best and scores[best] >= _PLAUSIBLE:
        return best
    if _decodes(raw, _WESTERN) and _western(raw.decode(_WESTERN)):
        return _WESTERN
    guess = _library(raw)
    if guess in _OTHERS and _decodes(raw, guess):
        return guess
    if best and (scores[best] >= 0 or len(scores) == 1):  # names may have no kana at all, postal tables many half-width ones
        return best
    where = _first_error(raw)
    raise DataError(
        f"{name} line {raw.count(10, 0, where) + 1}: byte 0x{raw[where]:02x} is not utf-8, and no other encoding fits the file",
        "set data.encoding, for instance cp932 (Excel in Japan) or cp1252, or mend that line",
    )


def _wide(raw: bytes) -> str | None:
    """UTF-16 without a mark: ASCII in it, and every text has some, leaves zeros on one side."""
    sample = raw[: _SAMPLE // 16 * 2]
    if len(sample) < 4 or len(raw) % 2:
        return None
    for name, zeros, others in (
        ("utf-16-le", sample[1::2].count(0), sample[::2].count(0)),
        ("utf-16-be", sample[::2].count(0), sample[1::2].count(0)),
    ):
        if zeros >= _ZEROS and not others and _decodes(raw, name):
            return name
    return None


def _decodes(raw: bytes, encoding: str) -> bool:
    """Whether all bytes are characters in `encoding`; Python's cp932 gives stray bytes private ones."""
    try:
        text = raw.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return False
    return not _STRAY.search(text)


def _kana_share(text: str) -> float:
    beyond = len(_BEYOND_ASCII.findall(text))
    return (len(_KANA.findall(text)) - len(_HALF_WIDTH.findall(text))) / beyond if beyond else 0.0


def _western(text: str) -> bool:
    """Accented letters stand among plain ones and print's own marks beside words; four in a row are another alphabet."""
    beyond = _BEYOND_ASCII.findall(text)
    usual = sum(c in _MARKS_OF_PRINT or bool(_ACCENTED.match(c)) for c in beyond)
    return usual >= 0.95 * len(beyond) and len(beyond) < 0.3 * len(text) and not _FOREIGN.search(text)


def _library(raw: bytes) -> str | None:
    """charset-normalizer's best guess as Python names it, None when it has none."""
    from charset_normalizer import from_bytes

    found = from_bytes(raw[:_SAMPLE]).best()
    return str(found.encoding) if found is not None else None


def _first_error(raw: bytes) -> int:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0
