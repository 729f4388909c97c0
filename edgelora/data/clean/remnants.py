"""What other programs left in a text: HTML, chat-template tokens, ruby and wiki marks."""

from __future__ import annotations

import html as entities
import re

from edgelora.data.clean.edits import Edit, outside_code, substitute

_TOKENS = re.compile(
    r"###eos_token###|<\|(?:endoftext|end_of_text|begin_of_text|im_start|im_end|eot_id|eom_id|start_header_id|end_header_id|end|pad|system|user|assistant)\|>"
    r"|<(?:eos|bos|pad|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>|\A<s>|</s>(?=\s*\Z)"
)
_SEPARATORS = re.compile(r"\s?\[(?:SEP|CLS|PAD)\]\s?")
_ALPACA = "Below is an instruction that describes a task"

_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]{0,9})(?:\s[^<>]{0,500})?/?>")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_BLOCKS = frozenset(("p", "div", "br", "hr", "li", "ul", "ol", "tr", "table", "blockquote", "pre", "h1", "h2", "h3", "h4", "h5", "h6"))
_INLINE = frozenset(
    re.findall(r"\w+", "a abbr b big cite code em font i kbd nobr q rb ruby s samp small span strike strong sub sup td th tt u var img")
)
_LONE = frozenset(("br", "hr", "img"))
_UNSHOWN = ("rt", "rp", "ref")
_PAGES = re.compile(r"<(?:script|style|html|head|body|form|input|\?php|!doctype)\b", re.IGNORECASE)

_RUBY = re.compile(r"｜(?=[^｜《》\n]{1,30}《)|(?<=[\w々〆〓※])《[ぁ-ゟァ-ヿ・\s]{1,40}》")
_GAIJI = re.compile(r"※［＃([^［］]{1,120})］")
_NOTE = re.compile(r"［＃[^［］]{1,120}］")
_PLANE = re.compile(r"([12])-([0-9]{1,2})-([0-9]{1,2})")
_CODE_POINT = re.compile(r"U\+([0-9A-Fa-f]{4,6})")


def _link(match: re.Match[str]) -> str:
    """The words of a link, and where it leads unless that is a place in the same text."""
    kind, target, words = match.groups()
    return (words or target) if kind == "xref" else f"{words} ({target})" if words else target


_WIKI = (
    (re.compile(r"^((?:\* )?)\[\[[a-z][a-z0-9_-]{0,80}\]\](?: |$)|() ?\[\[[a-z][a-z0-9_-]{0,80}\]\]$", re.MULTILINE), lambda m: m[1] or ""),
    (re.compile(r"\[\[(?!\s)(?:[^\[\]|\n]{1,200}\|)?([^\[\]|\n]{1,300})(?<!\s)\]\]"), lambda m: m[1]),
    (re.compile(r"'''([^'\n]{1,300})'''"), lambda m: m[1]),
    (re.compile(r"^={2,6} (\S[^\n]{0,200}?)(?: ={2,6})?$", re.MULTILINE), lambda m: m[1]),
    (re.compile(r"\[\.[a-z][\w-]{0,40}\](#{1,2})([^#\n]{1,300})\1"), lambda m: m[2]),
    (re.compile(r"\[\.[a-z][\w-]{0,40}\](?=[\s#]|$)#{0,2}"), lambda m: ""),
    (re.compile(r"\b(xref|link):([^\s\[\]]{1,300})\[([^\[\]\n]{0,300})\]"), _link),
    (re.compile(r"<<[\w-]{1,100},([^<>\n]{1,200})>>"), lambda m: m[1].strip()),
    (re.compile(r"^(?:\|={3,}|\[(?:cols|source|options|width|%|\.)[^\]\n]{0,200}\]|\+)$\n?", re.MULTILINE), lambda m: ""),
)


def tokens(text: str, edits: list[Edit]) -> str:
    """Stray tokens of chat templates (<|im_end|>, ###eos_token###, [INST]), and the wrapper of Alpaca's prompt around an instruction."""
    if text.startswith(_ALPACA) and "### Instruction:" in text:
        told, _, inner = text.partition("### Instruction:")
        edits.append(Edit(told, ""))
        inner, response, _ = inner.rpartition("### Response:") if "### Response:" in inner else (inner, "", "")
        edits += [Edit(response, "")] if response else []
        text = "\n\n".join(part.strip() for part in inner.split("### Input:") if part.strip())
    return _stray(text, edits)


@outside_code(re.compile(r"<[|/<a-z\[]|###|\[[/A-Z]"), addresses=True)
def _stray(text: str, edits: list[Edit]) -> str:
    text = substitute(_TOKENS, "", text, edits)
    return substitute(_SEPARATORS, "\n", text, edits)


@outside_code(re.compile(r"<[/a-zA-Z!]|&[#a-zA-Z]"), addresses=True)
def html(text: str, edits: list[Edit]) -> str:
    """Tags that are closed again (or never need to be) and entities.

    A lone `<b>` is taken for what the text is about, and a text with scripts, forms or a document's head for code as a whole.
    """
    if _PAGES.search(text):
        return text
    if "<" in text and ">" in text:
        for name in _UNSHOWN:
            text = _without(name, text, edits)
        text = substitute(re.compile(r"<!--[^<>]{0,2000}-->"), "", text, edits)
        names = {(slash, name.lower()) for slash, name in _TAG.findall(text)}
        remnants = {name for _, name in names if name in _LONE or (("", name) in names and ("/", name) in names)}
        remnants &= _BLOCKS | _INLINE
        if remnants:
            text = substitute(_TAG, lambda m: _tag(m, remnants), text, edits)
    if "&" in text and ";" in text:
        text = substitute(_ENTITY, lambda m: entities.unescape(m[0]).replace("\xa0", " "), text, edits)
    return text


def _tag(match: re.Match[str], remnants: set[str]) -> str:
    name = match[2].lower()
    if name not in remnants:
        return match[0]
    return "\n" if name in _BLOCKS else " " if name in ("td", "th") else ""


def _without(name: str, text: str, edits: list[Edit]) -> str:
    """`text` less every whole <name>...</name>."""
    pieces, end = [], 0
    opening = re.compile(rf"<{name}(?:\s[^<>]{{0,500}})?>", re.IGNORECASE)
    for match in opening.finditer(text):
        if match.start() < end:
            continue
        close = text.find(f"</{name}>", match.end())
        if close < 0:
            break
        pieces.append(text[end : match.start()])
        end = close + len(name) + 3
        edits.append(Edit(text[match.start() : end][:60], ""))
    return "".join([*pieces, text[end:]])


@outside_code(re.compile("《|［＃"), addresses=True)
def ruby(text: str, edits: list[Edit]) -> str:
    """Readings and notes of Aozora Bunko: 吾輩《わがはい》 and ［＃...］. Characters that a note describes are put in its place."""
    if "［＃" in text:
        text = substitute(_GAIJI, _gaiji, text, edits)
        text = substitute(_NOTE, "", text, edits)
    return substitute(_RUBY, "", text, edits) if "《" in text else text


def _gaiji(match: re.Match[str]) -> str:
    """The character that a note names by its code point or its place in JIS X 0213; the mark 〓 where it does neither."""
    if code := _CODE_POINT.search(match[1]):
        return chr(int(code[1], 16)) if int(code[1], 16) <= 0x10FFFF else "〓"
    if place := _PLANE.search(match[1]):
        plane, row, cell = map(int, place.groups())
        if 1 <= row <= 94 and 1 <= cell <= 94:
            raw = bytes([row + 0xA0, cell + 0xA0])
            return (raw if plane == 1 else b"\x8f" + raw).decode("euc_jis_2004", "replace").replace("\ufffd", "〓")
    return "〓"


@outside_code(re.compile(r"\[|==|\'\'\'|<<|\|=|\n\+\n"), addresses=True)
def markup(text: str, edits: list[Edit]) -> str:
    """Links, headings, anchors and roles of wikis and AsciiDoc, down to their words. Markdown stays: chat models speak it."""
    for pattern, new in _WIKI:
        text = substitute(pattern, new, text, edits)
    return text
