"""Japanese notation variants (表記ゆれ): which spellings are the same word.

One line a word, its spellings separated by spaces. `=` before a spelling: it may replace others and is never replaced
itself, because in kana other words look like it. `{...}`: the characters of which one must follow. A spelling that begins or ends with a
kanji is not looked for inside a longer run of kanji (申込書 is no 申込), and one that ends with a kanji only before a
particle, punctuation or the end.
"""

from __future__ import annotations

import re

OKURIGANA = """
問い合わせ 問合わせ 問合せ 問いあわせ
申し込み 申込み 申しこみ 申込
取り扱い 取扱い 取扱
手続き 手続
打ち合わせ 打合わせ 打合せ
見積もり 見積り 見積
支払い 支払
組み合わせ 組合わせ 組合せ
切り替え 切替え 切り換え 切替
読み込み 読込み 読込
書き込み 書込み 書込
取り消し 取消し 取消
振り込み 振込み 振込
払い戻し 払戻し 払戻
貸し出し 貸出し 貸出
繰り返し 繰返し
呼び出し 呼出し 呼出
引き落とし 引落とし 引落し
取り付け 取付け 取付
受け付け 受付け
受け取り 受取り
引き渡し 引渡し
埋め込み 埋込み
絞り込み 絞込み
締め切り 締切り 締切
乗り換え 乗換え
入れ替え 入替え
置き換え 置換え
並べ替え 並替え
立ち上げ 立上げ
割り当て 割当て 割当
売り上げ 売上げ 売上
買い物 買物
行{いうえわ} 行な{いうえわ}
終わ{りるっれ} 終{りるっれ}
変わ{りるっれ} 変{りるっれ}
当た{りるっれ} 当{りるっれ}
分か{りるら} 分{りるら}
断{りるっら} 断わ{りるっら}
表{しせ} 表わ{しせ}
現れ 現われ
生まれ 生れ
"""

KANJI_OR_KANA = """
下さ{い} くださ{い}
致し{まて} いたし{まて}
頂{いきくけこ} いただ{いきくけこ}
御座い{ま} ござい{ま}
出来{るなまたてればず} =でき{るなまたてれず}
及び および
又は または
或いは 或は あるいは
従って =したがって
但し ただし
例えば たとえば
全て =すべて
既に すでに
更に =さらに
予め あらかじめ
殆ど ほとんど
沢山 たくさん
何故 =なぜ
様々 さまざま
一旦 いったん
宜しく よろしく
有難う 有り難う ありがとう
即ち すなわち
暫く しばらく
"""

LEAST_KATAKANA = 3  # characters before the long mark: スキ and スキー, ビル and ビルー are different words
DIFFERENT_WORDS = frozenset(("バッタ", "キャリア", "ダイア", "ロータリ", "シャワ", "フェリ", "カロリ", "ストーリ", "アレルギ", "エネルギ"))

_KANJI = "\u3400-\u4dbf\u4e00-\u9fff々"
_AFTER_NOUN = "(?=[をはがにのでとへや、。，．,.!！?？:：;；）)」』】・…\\s]|$)"
_ENTRY = re.compile(r"(=?)([^{}]+)(?:\{([^{}]+)\})?")


def groups(table: str) -> list[list[tuple[str, str, str]]]:
    """Of every word its spellings as (mark, text, pattern); each pattern matches exactly its text."""
    return [[_spelling(entry) for entry in line.split()] for line in table.split("\n") if line.strip()]


def _spelling(entry: str) -> tuple[str, str, str]:
    match = _ENTRY.fullmatch(entry)
    assert match is not None, entry
    mark, text, following = match.groups()
    pattern = re.escape(text[0])
    if _is_kanji(text[0]):
        pattern += f"(?<![{_KANJI}]{text[0]})"
    pattern += re.escape(text[1:])
    if following:
        pattern += f"(?=[{following}])"
    elif _is_kanji(text[-1]):
        pattern += _AFTER_NOUN
    return mark, text, pattern


def _is_kanji(character: str) -> bool:
    return re.match(f"[{_KANJI}]", character) is not None
