"""Encodings are found out, shown, and never guessed wrongly in silence."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from edgelora.data.encoding import detect
from edgelora.data.read import read
from edgelora.errors import DataError
from edgelora.recipe import Reading
from tests.test_cli import edgelora

JAPANESE = [
    ("営業時間を教えてください。", "平日の9時から18時までです。土日祝日はお休みをいただいております。"),
    ("パスワードを忘れました", "ログイン画面の「パスワードをお忘れの方」からお手続きください。"),
    ("ＡＢＣプランの料金は？", "月額１，０００円（税込）です。オプションもございます。"),
]
SHORT = [("住所", "東京都千代田区です")]
KANA = [("ｻｰﾊﾞｰの再起動は？", "管理画面から行えます。サーバーが停止している間はご利用いただけません。")]
POSTAL = [("ﾄｳｷﾖｳﾄ", "東京都"), ("ﾁﾖﾀﾞｸ", "千代田区"), ("ｲｲﾀﾞﾊﾞｼ", "飯田橋")]
WESTERN = [
    ("Où est le café ?", "À côté de l'hôtel, près du théâtre. C'est fermé l'été."),
    ("Wie heißt die Straße?", "Sie heißt „Müllerstraße“ – fünf Minuten zu Fuß."),
    ("What does it cost?", "It’s £20 – or €25 in the café."),
]
ENGLISH = [("What is it?", "It is a test."), ("Where?", "Here.")]


def text(rows: list[tuple[str, str]]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerows([("question", "answer"), *rows])
    return stream.getvalue()


CASES = [
    *(
        (rows, encoding)
        for rows in (JAPANESE, SHORT)
        for encoding in ("utf-8", "utf-8-sig", "cp932", "euc_jp", "utf-16", "utf-16-le", "utf-16-be")
    ),
    (KANA, "cp932"),
    (POSTAL, "cp932"),
    *((WESTERN, encoding) for encoding in ("utf-8", "utf-8-sig", "cp1252", "utf-16")),
    *(([row], "cp1252") for row in WESTERN),
    (ENGLISH, "utf-8"),
    (ENGLISH, "utf-16-le"),
]


@pytest.mark.parametrize(("rows", "encoding"), CASES)
@pytest.mark.parametrize("times", [1, 300])
def test_rows_come_back_from_every_encoding(tmp_path: Path, rows: list[tuple[str, str]], encoding: str, times: int) -> None:
    file = tmp_path / "faq.csv"
    file.write_bytes(text(rows * times).encode(encoding))
    table = read(file)
    assert [(row.question, row.answer) for row in table.rows] == rows * times
    assert table.source.encoding == encoding


def test_the_real_texts_survive_a_change_of_encoding(corpora: Path) -> None:
    """Each Japanese corpus in cp932 and EUC-JP, as far as these can hold it; the English ones in cp1252."""
    found = []
    faq = json.loads((corpora / "faq_ja" / "vaccinecert_faq.json").read_text(encoding="utf-8"))
    with (corpora / "faq_ja" / "freebsd_faq_ja.csv").open(encoding="utf-8", newline="") as stream:
        bsd = [(row["question"], row["answer"]) for row in csv.DictReader(stream)]
    pieces = [[(row["質問"], row["回答"])] for row in faq] + [[pair] for pair in bsd] + [[(row["質問"], row["回答"]) for row in faq], bsd]
    for rows in pieces:
        for encoding in ("cp932", "euc_jp"):
            raw = text(rows).encode(encoding, "ignore")
            if any(byte > 127 for byte in raw):
                found.append((detect(io.BytesIO(raw), "x"), encoding, raw.decode(encoding)[:80]))
    assert [row for row in found if row[0] != row[1]] == []
    assert len(found) > 700


def test_every_file_of_the_corpora_is_read_in_its_own_encoding(corpora: Path) -> None:
    expected = {"localgovjp-sjis.csv": "cp932", "postal_13TOKYO_sjis_halfkana.csv": "cp932", "wagahai_aozora_sjis_ruby.txt": "cp932"}
    files = [file for folder in ("messy", "faq_ja", "faq_en", "qa_ja", "lm") for file in (corpora / folder).iterdir() if file.is_file()]
    assert len(files) > 15
    for file in files:
        with file.open("rb") as stream:
            other = "utf-8-sig" if stream.read(3) == b"\xef\xbb\xbf" else "utf-8"
            assert detect(stream, file.name) == expected.get(file.name, other), file.name


def test_a_file_of_no_encoding_says_where(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_bytes(text(ENGLISH).encode() + "né".encode() + b"\xff\xfe\x81\x8d\x8f\x90\x9d,\xa0\xfd\xff\n")
    with pytest.raises(DataError) as caught:
        read(file)
    assert caught.value.message.startswith("faq.csv line 4: byte 0xff is not utf-8, and no other encoding fits")
    with pytest.raises(DataError, match=r"line 4: byte 0xff is not utf-8$"):
        read(file, Reading(encoding="utf-8"))


def test_init_takes_a_file_from_excel_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "faq.csv").write_bytes(text(JAPANESE * 10).encode("cp932"))
    done = edgelora("init", "faq.csv", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["encoding"] == "cp932"
    assert "  encoding: cp932 " in (tmp_path / "faq.yaml").read_text(encoding="utf-8")
