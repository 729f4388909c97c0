"""HTML and SVG that cannot be injected into: text is escaped unless `tag` made it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_VOID = {"meta", "br", "col", "wbr"}
# C0 and C1 controls but tab and newline, and the bidirectional overrides and isolates, which reorder what follows them.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufdd0-\ufdef\ufeff\ufffe\uffff\ud800-\udfff]")
_JAPANESE = re.compile("[\u3041-\u3096\u30a1-\u30fa\uff66-\uff9d]")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


NOTHING = Markup("")


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """``tag("a", "x < y", class_="n")`` -> ``<a class="n">x &lt; y</a>``.

    Children that are not Markup are escaped; None and empty ones are left out. In attribute names a trailing
    underscore falls away and others become hyphens; an attribute that is None is left out.
    """
    start = [name]
    for key, value in attributes.items():
        if value is not None:
            start.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(visible(str(value)))}"')
    inner = join(children)
    return Markup(f"<{' '.join(start)}>" + ("" if name in _VOID else f"{inner}</{name}>"))


def join(children: Iterable[object]) -> Markup:
    return Markup(
        "".join(child if isinstance(child, Markup) else html.escape(visible(str(child))) for child in children if child is not None)
    )


def breakable(text: str) -> list[str]:
    """`text` in pieces after whose underscores a line may break, as the names of files and labels want."""
    pieces = [word for part in re.split(r"(?<=[^\W_]_)(?=[^\W_]{2})", text) for word in (part, tag("wbr"))]
    return pieces[:-1]


def visible(text: str) -> str:
    """`text` with control and bidirectional override characters written out, as ⟨U+202E⟩."""
    return _UNSEEN.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text.replace("\r\n", "\n"))


def language(text: str) -> str | None:
    """'ja' for text with kana, so that a browser takes Japanese glyphs and line breaks; else None, the page's own."""
    return "ja" if _JAPANESE.search(text) else None
