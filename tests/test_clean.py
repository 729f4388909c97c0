"""Cleaning text: every step by itself, what it must leave alone, and that it takes linear time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora.data import clean
from edgelora.data.clean import characters, english, japanese, personal, remnants, spaces, typos, variants
from edgelora.data.clean.edits import Edit, Step
from edgelora.recipe import Clean


def edited(step: Step, text: str) -> tuple[str, list[Edit]]:
    edits: list[Edit] = []
    return step(text, edits), edits


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        (characters.mojibake, "cafÃ© â€œokâ€\x9d", "café “ok”"),
        (characters.mojibake, "ã‚³ãƒ¼ãƒ’ãƒ¼", "コーヒー"),
        (characters.controls, "a\r\nb\x07\u200b\ufeffc\u00a0d", "a\nbc d"),
        (characters.width, "ｶﾞｲﾄﾞは１２：３０に Ａ４で", "ガイドは12:30に A4で"),
        (characters.width, "か\u3099 e\u0301 ﬁle ５０％ ０３ｰ１２３４", "が é file 50% 03-1234"),
        (remnants.html, "<p>a<br>b &amp; c</p>&nbsp;d", "\na\nb & c\n d"),
        (remnants.html, '<a href="https://a.b/c">x</a>', "x"),
        (remnants.html, "<ruby>漢字<rp>(</rp><rt>かんじ</rt><rp>)</rp></ruby>", "漢字"),
        (remnants.tokens, "fine.###eos_token###", "fine."),
        (remnants.tokens, "<|im_start|>ok<|im_end|></s>", "ok"),
        (
            remnants.tokens,
            "Below is an instruction that describes a task. Write.\n\n### Instruction:\nAdd.\n\n### Input:\n1 `2`\n\n### Response:",
            "Add.\n\n1 `2`",
        ),
        (remnants.ruby, "一番｜獰悪《どうあく》な吾輩《わがはい》［＃「吾輩」に傍点］だ", "一番獰悪な吾輩だ"),
        (remnants.ruby, "※［＃「火＋（麈－鹿）」、第3水準1-87-40］《ちゅう》と※［＃「何か」］", "炷と〓"),
        (remnants.markup, "[[Target|the word]] and [.filename]##/etc/hosts##, == x", "the word and /etc/hosts, == x"),
        (remnants.markup, "== Title ==\n* [[pao]] link:http://a.b[the page]", "Title\n* the page (http://a.b)"),
        (spaces.joins, "大学から リリースされた ものです。 次に", "大学からリリースされたものです。次に"),
        (spaces.whitespace, "  a  b \n\n\n\nc\t d ", "a b\n\nc d"),
    ],
)
def test_steps(step: Step, before: str, after: str) -> None:
    text, edits = edited(step, before)
    assert text == after
    assert edits
    assert step(after, []) == after, "a second pass changes nothing"


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (characters.width, "①② m² ㎏ ½ （株）「」！？〜～ヶ々…　神Ⅳ"),
        (characters.width, "see `Ａ１` and https://example.org/Ａ１"),
        (characters.mojibake, "naïve café – “ok” 日本語 Ελλάδα Привет"),
        (characters.controls, "👨\u200d👩 می\u200cخواهم\ttab\n"),
        (remnants.html, "Use the <b> tag. if a < b && c > d; AT&T; <stdio.h>"),
        (remnants.html, "<html><body><p>x</p></body></html>"),
        (remnants.html, "`<p>x</p>`"),
        (remnants.tokens, "see `<|im_end|>`, [x] and a < b #1"),
        (remnants.ruby, "《きらきら》 と 『吾輩』 《論語》"),
        (remnants.markup, "[ -f x ] && [[ -n y ]]; a == b; [link](http://x.y) **bold** # Title"),
        (spaces.joins, "山田 太郎 と インターネット エクスプローラ、 FreeBSD の root"),
        (spaces.whitespace, "ls:\n    if x:   # two\n$ cat  a   b\na\tb\tc"),
    ],
)
def test_what_has_a_meaning_stays(step: Step, text: str) -> None:
    kept = text if step is not spaces.joins else "山田 太郎とインターネット エクスプローラ、 FreeBSD の root"
    assert step(text, []) == kept


STEPS = {**clean.STEPS, "personal": personal.remove}


UNITS = ("a", "<", "<p>", "[[", "《", "［＃", "`", "@", "a@", "/", "/a", "&", "&a", " ", "\n ", "1 ", "1-", "|", "{", "「", "'''", "== ")


@pytest.mark.parametrize("name", [*STEPS, "variants"])
def test_long_runs_of_anything_take_linear_time(name: str) -> None:
    spellings = variants.Spellings({"問合せ": "問い合わせ"}, {"サーバ": "サーバー"}, {"colour": "color"}, {"x": "y"})
    step = STEPS.get(name) or (lambda text, edits: variants.unify(text, spellings, edits))
    for unit in (*UNITS, "ア", "é", "ｱ", "<rt>", "['", ". ", ")", ".a", "a.", "{a"):
        text = unit * (60_000 // len(unit)) + "é"
        started = time.process_time()
        step(text, [])
        assert time.process_time() - started < 2, unit


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_no_step_fails_and_what_changed_is_listed(text: str) -> None:
    for name, step in STEPS.items():
        after, edits = edited(step, text)
        assert (after != text) <= bool(edits), name


# --- spellings ---


def unify(answers: list[str], **settings: object) -> tuple[list[str], clean.Decided]:
    chosen = Clean(**settings)  # type: ignore[arg-type]
    seen = clean.Seen()
    rows = [(("user", "q"), ("assistant", answer)) for answer in answers]
    for row in rows:
        clean.observe(row, chosen, seen)
    decided = clean.decide(seen, chosen)
    return [clean.unify(row, chosen, decided)[0][1][1] for row in rows], decided


def test_the_majority_decides_and_few_decide_nothing() -> None:
    texts = ["サーバーです。問い合わせはユーザーまで。"] * 6 + ["サーバが止まる。問合せの際はカテゴリを。", "カテゴリーは3つ。"]
    after, decided = unify(texts)
    assert after[-2] == "サーバーが止まる。問い合わせの際はカテゴリを。"
    assert after[-1] == texts[-1]
    assert {(tuple(c.spellings), c.chosen) for c in decided.choices} == {
        (("サーバー", "サーバ"), "サーバー"),
        (("カテゴリ", "カテゴリー"), None),
        (("問い合わせ", "問合せ"), "問い合わせ"),
    }


@pytest.mark.parametrize(
    ("usual", "text"),
    [
        ("サーバー", "「サーバ」を押す。`サーバ` と https://example.jp/サーバ と ファイルサーバとサーバ株式会社"),
        ("申し込み", "申込書を書き、受付申込者に渡す"),
        ("支払い", "支払う"),
        ("ください", "『下さい』という題"),
        ("できる", "出来事"),
        ("既に", "ここですでにある"),
        ("分かる", "5分って自分る"),
    ],
)
def test_labels_code_names_and_other_words_keep_their_spelling(usual: str, text: str) -> None:
    after, _ = unify([f"{usual}。"] * 9 + [text, "既に" if usual == "既に" else usual])
    assert after[9] == (text if usual != "既に" else "ここで既にある")


def test_questions_keep_their_variants_and_the_user_has_the_last_word() -> None:
    settings = Clean(dictionary={"サーバー": "サーバ", "Web": "ウェブ"}, keep=("問合せ",))
    row = (("user", "サーバーの問合せは?"), ("assistant", "サーバーとWebとWebサイト、サーバールーム。問合せ"))
    seen = clean.Seen()
    for _ in range(9):
        clean.observe((("user", ""), ("assistant", "サーバー。問い合わせ。")), settings, seen)
    clean.observe(row, settings, seen)
    after, changes = clean.unify(row, settings, clean.decide(seen, settings))
    assert after == (("user", "サーバーの問合せは?"), ("assistant", "サーバとウェブとウェブサイト、サーバールーム。問合せ"))
    assert [(c.step, c.turn, c.before, c.after) for c in changes] == [
        ("variants", 1, "サーバー", "サーバ"),
        ("variants", 1, "Web", "ウェブ"),
        ("variants", 1, "Web", "ウェブ"),
    ]


def test_english_follows_the_majority_word_by_word() -> None:
    texts = ["The color of the center is gray. We organize it."] * 3 + [
        "Colour the centre grey; see the Labour Party and `colour`. We realise it."
    ]
    after, _ = unify(texts)
    assert after[-1] == "Color the center gray; see the Labour Party and `colour`. We realise it."
    assert unify(texts, spelling="none")[0] == texts


def test_tables_hold_every_spelling_once() -> None:
    forms = [text for table in (japanese.OKURIGANA, japanese.KANJI_OR_KANA) for group in japanese.groups(table) for _, text, _ in group]
    assert len(forms) == len(set(forms))
    pairs = english.british_to_american()
    assert not set(pairs) & {american for american, _ in pairs.values()}


# --- typos, personal data, gaps ---


def test_typos_are_reported_and_changed_on_request() -> None:
    texts = ["We recieve the package.", *["Receive the frobnicator package and organize colour."] * 3]
    after, decided = unify(texts)
    assert [(t.word, t.suggestion) for t in decided.typos] == [("recieve", "receive")]
    assert after[0] == texts[0]
    assert unify(texts, typos="fix")[0][0] == "We receive the package."
    assert not unify(texts, keep=("recieve",))[1].typos


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write to a.b+c@example.co.jp.", [("e-mail", "a.b+c@example.co.jp")]),
        ("電話 03-1234-5678 か ０９０−１２３４−５６７８", [("phone", "03-1234-5678"), ("phone", "０９０−１２３４−５６７８")]),
        (
            "call 1-800-555-0199 or (212) 555-0147 or +44 20 7946 0958",
            [("phone", "1-800-555-0199"), ("phone", "(212) 555-0147"), ("phone", "+44 20 7946 0958")],
        ),
        ("card 4111 1111 1111 1111, not 4111 1111 1111 1112", [("card", "4111 1111 1111 1111")]),
        ("〒100-0001 東京都", [("postal code", "〒100-0001")]),
        ("マイナンバーは 1234 5678 9018、誤りは 1234 5678 9012", [("My Number", "1234 5678 9018")]),
        ("order 123456789018, 2021-12-20, v1.2.3, 10,000 円, 3.14159265358979, 192.168.100.200", []),
    ],
)
def test_personal_data(text: str, found: list[tuple[str, str]]) -> None:
    assert [(one.kind, one.text) for one in personal.find(text)] == found
    removed = personal.remove(text, [])
    assert all(one not in removed for _, one in found)
    assert not list(personal.find(removed))


def test_check_digits() -> None:
    assert personal.luhn("79927398713")
    assert not personal.luhn("79927398710")
    assert personal.my_number("123456789018")
    assert [d for d in range(10) if personal.my_number(f"12345678901{d}")] == [8]


def test_labels_are_only_for_steps_that_look_at_them() -> None:
    after, changes = clean.mend((("user", "ｶﾞ"), ("assistant", "ｶﾞ")), Clean(width="answers"))
    assert after == (("user", "ｶﾞ"), ("assistant", "ガ"))
    assert changes == [clean.Change("width", 1, "ｶﾞ", "ガ")]
    assert clean.mend((("text", "ｶﾞ"),), Clean(width="answers"))[0] == (("text", "ガ"),)


def test_typo_words_are_words_alone() -> None:
    assert typos.WORD.findall("recieve it's file.recieve $recieve recieve_x Recieve recieve.") == ["recieve", "recieve"]
