"""White space, and the spaces that joined lines leave between Japanese words."""

from __future__ import annotations

import re

from edgelora.data.clean.edits import Edit, outside_code, substitute

_TRAILING = re.compile(r"(?<![ \t\u3000])[ \t\u3000]+(?=\n)")
_BLANK_LINES = re.compile(r"(?<!\n)\n{3,}")
_RUNS = re.compile(r"(?<=[^\s])(?:[ \t]{2,}|\t)(?=[^\s])")
_CODE_LINE = re.compile(r"(?: {4}|\t| *[$#%>|] |[^\n\t]{0,500}\t[^\n\t]{0,500}\t)")

_KANA_OR_MARK = "\u3041-\u309f、。，．・：；？！「」『』（）［］【】〜～…"
_JAPANESE = _KANA_OR_MARK + "\u30a1-\u30ff\u3400-\u4dbf\u4e00-\u9fff々〇"
_JOIN = re.compile(f"(?<=[{_KANA_OR_MARK}]) (?=[{_JAPANESE}])|(?<=[{_JAPANESE}]) (?=[{_KANA_OR_MARK}])")


def whitespace(text: str, edits: list[Edit]) -> str:
    """Runs of spaces become one, lines lose their trailing spaces, more than one blank line becomes one.

    Lines that are indented by four, begin like a prompt or hold several tabs are taken for code or tables and keep their inner spaces.
    """
    stripped = text.strip()
    if stripped != text:
        edits.append(Edit(" ", ""))
        text = stripped
    return _inner(text, edits)


@outside_code(re.compile(r"  |\t|\n\n\n|[ \u3000]\n"))
def _inner(text: str, edits: list[Edit]) -> str:
    text = substitute(_TRAILING, "", text, edits)
    text = "\n".join(line if _CODE_LINE.match(line) else substitute(_RUNS, " ", line, edits) for line in text.split("\n"))
    return substitute(_BLANK_LINES, "\n\n", text, edits)


@outside_code(_JOIN)
def joins(text: str, edits: list[Edit]) -> str:
    """Half-width spaces between Japanese characters, left where lines were joined.

    One of the neighbours has to be hiragana or punctuation: spaces between two kanji or katakana words may part names.
    """
    return substitute(_JOIN, "", text, edits)
