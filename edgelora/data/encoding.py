"""Find out how a text file is encoded. Excel saves Shift_JIS (cp932) in Japan and cp1252 in the West, and says so nowhere.

The order: a byte order mark; UTF-16 by its zero bytes; UTF-8, which other text almost never satisfies by accident; then
the encodings in which the whole text decodes, judged by whether the result reads like a language. The whole file is
looked at, a piece at a time.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgelora.data.lines import not_found
from edgelora.errors import DataError

_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_JAPANESE = ("cp932", "euc_jp")
_WESTERN = "cp1252"
_SAMPLE = 1 << 20  # bytes that the library judges
_CHUNK = 1 << 20  # bytes decoded at a time
# Kana and Japanese punctuation; what half-width kana are in a text is most often EUC-JP read as Shift_JIS.
_KANA = re.compile("[\u3001\u3002\u3041-\u3096\u30a1-\u30fc]")
_HALF_WIDTH = re.compile("[\uff61-\uff9f]")
_STRAY = re.compile("[\x80-\x9f\uf8f0-\uf8f3]")
_BEYOND_ASCII = re.compile("[^\x00-\x7f]")
_ACCENTED = re.compile("[\u00c0-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e]")
_FOREIGN = re.compile("[\u00c0-\u00ff]{4}")
_UNLIKELY = re.compile("[a-z][\u00c0-\u00de]|\u00ff")  # half of a UTF-8 character reads like this
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
_DAMAGED = 20  # UTF-8 characters for each byte that is none: this is a damaged UTF-8 file, no other encoding
_LONG = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


@dataclass
class _Survey:
    """What a file's characters are in one encoding."""

    characters: int = 0
    beyond: int = 0  # ASCII
    kana: int = 0
    western: int = 0  # accented letters and print's own marks
    foreign: bool = False  # four accented letters in a row

    @property
    def kana_share(self) -> float:
        return self.kana / self.beyond if self.beyond else 0.0

    @property
    def is_thin(self) -> bool:
        """Whether a byte or two in a long text are all there is to go by: as likely damage as another encoding."""
        return self.beyond <= 2 and self.characters > 50_000

    @property
    def is_western(self) -> bool:
        """Accented letters stand among plain ones and print's own marks beside words; four in a row are another alphabet."""
        return self.western >= 0.95 * self.beyond and self.beyond < 0.3 * self.characters and not self.foreign


def marked(head: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning declares."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)


def detect(file: BinaryIO, name: str) -> str:
    """The encoding of a whole file, in memory that does not grow with it. DataError when nothing fits well enough to go on."""
    file.seek(0)
    sample = file.read(_SAMPLE)
    if declared := marked(sample):
        return declared
    if wide := _wide(file, sample):
        return wide
    if sample.count(0) > len(sample) / 4 or (where := _first_error(file)) is None:  # no text at all: who reads it says where
        return "utf-8"
    others = () if _damaged(file) else (*_JAPANESE, _WESTERN)
    surveys = {name: found for name in others if (found := _survey(file, name)) and not found.is_thin}
    scores = {name: surveys[name].kana_share for name in _JAPANESE if name in surveys}
    best = max(scores, key=lambda encoding: scores[encoding], default=None)
    if best and scores[best] >= _PLAUSIBLE:
        return best
    if _WESTERN in surveys and surveys[_WESTERN].is_western:
        return _WESTERN
    guess = _library(sample) if others else None
    if guess in _OTHERS and (found := _survey(file, guess)) and not found.is_thin:
        return guess
    if best and (scores[best] >= 0 or len(scores) == 1):  # names may have no kana at all, postal tables many half-width ones
        return best
    line, byte = where
    raise DataError(
        f"{name} line {line}: byte 0x{byte:02x} is not utf-8, and no other encoding fits the file",
        "set data.encoding, for instance cp932 (Excel in Japan) or cp1252, or mend that line",
    )


def _wide(file: BinaryIO, sample: bytes) -> str | None:
    """UTF-16 without a mark: ASCII in it, and every text has some, leaves zeros on one side."""
    part = sample[: _SAMPLE // 16 * 2]
    if len(part) < 4 or file.seek(0, 2) % 2:
        return None
    for name, zeros, others in (
        ("utf-16-le", part[1::2].count(0), part[::2].count(0)),
        ("utf-16-be", part[::2].count(0), part[1::2].count(0)),
    ):
        if zeros >= _ZEROS and not others and _survey(file, name):
            return name
    return None


def _pieces(file: BinaryIO, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    file.seek(0)
    while chunk := file.read(_CHUNK):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _survey(file: BinaryIO, encoding: str) -> _Survey | None:
    """None when not all bytes are characters in `encoding`; Python's cp932 gives stray bytes private ones."""
    found = _Survey()
    try:
        for text in _pieces(file, encoding):
            if _STRAY.search(text):
                return None
            beyond = _BEYOND_ASCII.findall(text)
            found.characters += len(text)
            found.beyond += len(beyond)
            found.kana += len(_KANA.findall(text)) - len(_HALF_WIDTH.findall(text))
            found.western += sum(c in _MARKS_OF_PRINT or bool(_ACCENTED.match(c)) for c in beyond) - len(_UNLIKELY.findall(text))
            found.foreign |= bool(_FOREIGN.search(text))
    except (UnicodeDecodeError, LookupError):
        return None
    return found


def _damaged(file: BinaryIO) -> bool:
    """Whether the file is UTF-8 but for a few bytes: in no other encoding do so many bytes form its characters by accident."""
    whole = high = 0
    file.seek(0)
    while chunk := file.read(_CHUNK):
        found = _LONG.findall(chunk)
        whole += len(found)
        high += len(chunk) - len(chunk.translate(None, bytes(range(128, 256)))) - sum(map(len, found))
    return whole >= _DAMAGED * max(high, 1)


def _library(sample: bytes) -> str | None:
    """charset-normalizer's best guess as Python names it, None when it has none."""
    from charset_normalizer import from_bytes

    found = from_bytes(sample).best()
    return str(found.encoding) if found is not None else None


def _first_error(file: BinaryIO) -> tuple[int, int] | None:
    """Line and value of the first byte that is not UTF-8."""
    line = 1
    try:
        for text in _pieces(file, "utf-8"):
            line += text.count("\n")
    except UnicodeDecodeError as error:
        return line + error.object.count(b"\n", 0, error.start), error.object[error.start]
    return None


def encoding_of(path: Path, wanted: str | None) -> str:
    """What to read a text file in: its byte order mark's encoding, else `wanted`, else what is found out."""
    try:
        with path.open("rb") as file:
            return marked(file.read(4)) or wanted or detect(file, path.name)
    except FileNotFoundError:
        raise not_found(path) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
