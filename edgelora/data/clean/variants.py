"""One spelling of a word throughout a data set: the one that its own rows use most.

Three kinds: Japanese spellings of a table, katakana words with and without their last long mark, and British against American
English (one choice for all words of a family). A first pass counts, a second one replaces. Few or divided occurrences decide
nothing: they are reported and stay. Code, addresses and what stands in quotes or brackets is neither counted nor changed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from edgelora.data.clean import english, japanese
from edgelora.data.clean.edits import Edit, outside_quotes

# (kind, word, spelling) -> occurrences. `kind` is "katakana", "japanese" or an English family.
Counts = Counter[tuple[str, str, str]]

_KATAKANA = re.compile("(?<![ァ-ヴヵヶー・])[ァ-ヴー]{3,40}(?![ァ-ヴヵヶー])(?!株式会社|社|氏|さん|様|市|町|村|県)")
_ENGLISH = re.compile(r"(?<![\w'-])[A-Za-z][a-z]{3,24}(?![\w'])")
_AFTER_SENTENCE = re.compile(r"(?:\A|[.!?:]\s{1,3}|\n\s{0,8}(?:[-*]\s)?)\Z")


@dataclass(frozen=True)
class Choice:
    """A word of the data set with more than one spelling: how often each stands there, and which was chosen (None: no clear majority)."""

    kind: str
    spellings: Mapping[str, int]
    chosen: str | None


@dataclass(frozen=True)
class Spellings:
    """What to replace by what. `japanese`, `katakana` and `english` map a spelling to the chosen one."""

    japanese: Mapping[str, str]
    katakana: Mapping[str, str]
    english: Mapping[str, str]
    user: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.japanese or self.katakana or self.english or self.user)


def count(part: str, found: Counts, *, japanese_words: bool = True, english_words: bool = True) -> None:
    """Add the spellings in a text (what is left of it outside code and quotations) to `found`."""
    if japanese_words and not part.isascii():
        pattern, words = _table()
        for spelling, n in Counter(pattern.findall(part)).items():
            found["japanese", words[spelling][0], spelling] += n
        for word in _KATAKANA.findall(part):
            stem = word.removesuffix("ー")
            if len(stem) >= japanese.LEAST_KATAKANA and not stem.endswith("ー"):
                found["katakana", stem, word] += 1
    if english_words:
        table = _english()
        for word, n in Counter(_ENGLISH.findall(part)).items():
            if (entry := table.get(word)) is not None:
                found[entry[0], entry[1], word] += n


def choose(
    counts: Counts, *, least: int, share: float, dictionary: Mapping[str, str], keep: Iterable[str]
) -> tuple[Spellings, list[Choice]]:
    """The spelling that every word keeps: one with at least `share` of `least` or more occurrences. Words of `keep` stay as they are."""
    kept = set(keep)
    words: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for (kind, word, spelling), n in counts.items():
        words[kind, word][spelling] = n
    choices: list[Choice] = []
    replace: dict[str, dict[str, str]] = {"japanese": {}, "katakana": {}}
    for (kind, word), spellings in sorted(words.items()):
        if (
            kind not in replace
            or len(spellings) < 2
            or kept & {word, *spellings}
            or (kind == "katakana" and word in japanese.DIFFERENT_WORDS)
        ):
            continue
        chosen = _majority(spellings, least, share)
        choices.append(Choice(kind, dict(sorted(spellings.items(), key=lambda item: -item[1])), chosen))
        if chosen is not None:
            replace[kind] |= {s: chosen for s in spellings if s != chosen and not (kind == "japanese" and _table()[1][s][1] == "=")}
    american, english_choices = _choose_english(words, least, share, kept)
    user = {old: new for old, new in dictionary.items() if old != new}
    return Spellings(replace["japanese"], replace["katakana"], american, user), choices + english_choices


def unify(text: str, spellings: Spellings, edits: list[Edit]) -> str:
    """`text` with every spelling replaced by the chosen one. What the user's dictionary says goes first."""

    if text.isascii() and not spellings.user and not spellings.english:
        return text

    def one(part: str, edits: list[Edit]) -> str:
        if spellings.user:
            part = _replace(_user_pattern(tuple(spellings.user)), spellings.user, part, edits)
        if not part.isascii():
            if spellings.japanese:
                part = _replace(_table()[0], spellings.japanese, part, edits)
            if spellings.katakana:
                part = _replace(_KATAKANA, spellings.katakana, part, edits)
        return _unify_english(part, spellings.english, edits) if spellings.english else part

    return outside_quotes(one, text, edits)


def _replace(pattern: re.Pattern[str], mapping: Mapping[str, str], text: str, edits: list[Edit]) -> str:
    def new(match: re.Match[str]) -> str:
        after = mapping.get(match[0], match[0])
        if after != match[0]:
            edits.append(Edit(match[0], after))
        return after

    return pattern.sub(new, text)


def _majority(spellings: Mapping[str, int], least: int, share: float) -> str | None:
    total = sum(spellings.values())
    best = max(spellings, key=lambda s: (spellings[s], s))
    return best if total >= least and spellings[best] >= share * total else None


@cache
def _table() -> tuple[re.Pattern[str], dict[str, tuple[str, str]]]:
    """One pattern for all spellings, longest first, and of each its word (the first spelling of the line) and its mark."""
    words, patterns = {}, {}
    for group in (*japanese.groups(japanese.OKURIGANA), *japanese.groups(japanese.KANJI_OR_KANA)):
        for mark, text, pattern in group:
            words[text] = (group[0][1], mark)
            patterns[text] = pattern
    return re.compile("|".join(patterns[text] for text in sorted(patterns, key=len, reverse=True))), words


@cache
def _english() -> dict[str, tuple[str, str]]:
    """Both spellings of every word -> (family, side)."""
    table: dict[str, tuple[str, str]] = {}
    for british, (american, family) in english.british_to_american().items():
        table[british], table[american] = (family, "British"), (family, "American")
    return table


@cache
def _user_pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """The user's words, longest first; a katakana or Latin one is not looked for inside a longer run of its kind."""

    def bounded(word: str) -> str:
        left = "(?<![ァ-ヴー])" if re.match("[ァ-ヴー]", word) else r"(?<![A-Za-z0-9_])" if re.match("[A-Za-z0-9_]", word) else ""
        right = "(?![ァ-ヴー])" if re.search(r"[ァ-ヴー]\Z", word) else r"(?![A-Za-z0-9_])" if re.search(r"[A-Za-z0-9_]\Z", word) else ""
        return left + re.escape(word) + right

    return re.compile("|".join(bounded(word) for word in sorted(words, key=len, reverse=True)))


def _choose_english(
    words: Mapping[tuple[str, str], Mapping[str, int]], least: int, share: float, kept: set[str]
) -> tuple[dict[str, str], list[Choice]]:
    replace: dict[str, str] = {}
    choices = []
    pairs = english.british_to_american()
    for family in ("spelling", "-ise/-ize"):
        sides = {side: sum(words.get((family, side), {}).values()) for side in ("British", "American")}
        if not all(sides.values()):
            continue
        chosen = _majority(sides, least, share)
        choices.append(Choice(f"English {family}", sides, chosen))
        for british, (american, of) in pairs.items():
            if chosen and of == family and not kept & {british, american}:
                old, new = (british, american) if chosen == "American" else (american, british)
                replace[old] = new
    return replace, choices


def _unify_english(text: str, mapping: Mapping[str, str], edits: list[Edit]) -> str:
    if mapping.keys().isdisjoint(map(str.lower, _ENGLISH.findall(text))):
        return text

    def new(match: re.Match[str]) -> str:
        word = match[0]
        after = mapping.get(word.lower())
        # A capital inside a sentence is a name: Labour Party, Centre for Disease Control.
        if after is None or (word[0].isupper() and not _AFTER_SENTENCE.search(text[max(0, match.start() - 12) : match.start()])):
            return word
        after = after.capitalize() if word[0].isupper() else after
        edits.append(Edit(word, after))
        return after

    return _ENGLISH.sub(new, text)
