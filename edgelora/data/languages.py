"""Which languages the texts are in, by py3langid: a small model of letter sequences that comes with its package."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_LETTERS = 20  # below this a guess means little; a Japanese or Chinese character says as much as four letters
_WIDE = re.compile("[\u3041-\u30ff\u4e00-\u9fff\uac00-\ud7af]")


def shares(texts: Iterable[str]) -> tuple[dict[str, float], int] | None:
    """Language code (ISO 639) -> share of the texts that are long enough, most frequent first, and the number of these.

    None without the package.
    """
    try:
        import py3langid
    except ImportError:
        return None
    found: Counter[str] = Counter()
    for text in texts:
        if len(text) + 3 * len(_WIDE.findall(text[:_LETTERS])) >= _LETTERS:
            found[str(py3langid.classify(text[:2000])[0])] += 1
    return {language: count / found.total() for language, count in found.most_common()}, found.total()
