"""How fast and in how much memory `edgelora data prepare` takes a large file.

    python bench/data_scale.py --rows 200000

Writes a file of synthetic questions and answers (a fifth Japanese; 2 % repeated, 3 % nearly repeated; some with half-width kana,
HTML, addresses, two spellings of a word, spaces between Japanese words) and prepares it with every cleaning step in processes
of its own: without near-duplicates, with them (reported), and with them on two processes. Rows a second are rows over the CPU
seconds of all processes, user and system: what one core does, whatever else the machine is doing. Peak memory is that of the
largest process, as the kernel reports it; the pages of files that it reads are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもらりるれろわをん"
KANJI = "設定画面起動保存注文配送返品料金登録電話店舗時間確認変更利用機能製品保証書類予約受付窓口案内"
RUNS = {
    "without near-duplicates": ["--near", "none"],
    "with near-duplicates": ["--near", "report"],
    "with near-duplicates, 2 processes": ["--near", "report", "--processes", "2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--only", choices=list(RUNS), action="append")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.csv"
        characters = write(file, options.rows)
        runs = {}
        for name in options.only or RUNS:
            runs[name] = measure(file, Path(folder) / "out", RUNS[name], options.rows)
            print(name, json.dumps(runs[name]), flush=True)
        size = file.stat().st_size
    found = {"rows": options.rows, "characters": characters, "file_bytes": size, "runs": runs}
    command = f"python bench/data_scale.py --rows {options.rows}"
    results.save("data-scale", command, ("ftfy", "rensa", "symspellpy", "numpy"), headline(runs), found)


def write(file: Path, rows: int) -> int:
    """A CSV file of that many rows; how many characters they have."""
    chance = random.Random(7)
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(4000)]
    made: list[tuple[str, str]] = []
    for _ in range(rows):
        kind = chance.random()
        if made and kind < 0.02:
            made.append(chance.choice(made))
        elif made and kind < 0.05:
            question, answer = chance.choice(made)
            made.append((question, answer + (" 以上" if not answer.isascii() else " indeed")))
        else:
            made.append(japanese(chance) if kind < 0.25 else english(chance, words))
    import csv

    with file.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("question", "answer"))
        table.writerows(made)
    return sum(len(question) + len(answer) for question, answer in made)


def english(chance: random.Random, words: list[str]) -> tuple[str, str]:
    question = " ".join(chance.choices(words, k=chance.randint(6, 14))).capitalize() + "?"
    said = chance.choices(words, k=chance.randint(15, 45))
    for extra, share in (
        ("colour", 0.02),
        ("color", 0.1),
        ("<b>bold</b>", 0.02),
        ("&amp;", 0.02),
        ("help@example.org", 0.02),
        ("`a  b`", 0.02),
    ):
        if chance.random() < share:
            said.insert(chance.randrange(len(said)), extra)
    return question, (" ".join(said).capitalize() + ".").replace(" ", "  " if chance.random() < 0.05 else " ")


def japanese(chance: random.Random) -> tuple[str, str]:
    def clause() -> str:
        return "".join(chance.choices(KANJI, k=2) + chance.choices(KANA, k=chance.randint(3, 8)))

    said = [clause() for _ in range(chance.randint(5, 14))]
    for extra, share in (("サーバー", 0.3), ("サーバ", 0.05), ("問い合わせ", 0.2), ("問合せ", 0.03), ("ｶﾞｲﾄﾞ", 0.05), ("１２：３０", 0.1)):
        if chance.random() < share:
            said.insert(chance.randrange(len(said)), extra)
    return clause() + clause() + "ですか？", (" " if chance.random() < 0.2 else "、").join(said) + "です。"


def measure(file: Path, out: Path, options: list[str], rows: int) -> dict[str, Any]:
    subprocess.run(["rm", "-rf", str(out)], check=True)
    load, started = os.getloadavg()[0], time.monotonic()
    command = [sys.executable, "-m", "edgelora.cli", "data", "prepare", str(file), "-o", str(out), "--quiet", "--json", *options]
    before = os.times()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    document = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        raise SystemExit(f"{command} failed")
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(seconds, 1),
        "rows_per_cpu_s": round(rows / seconds),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "load_average": round(load, 1),
        "rows": document["rows"],
        "dropped": document["dropped"],
        "changes": {step: entry["changes"] for step, entry in document["changes"].items()},
        "near_duplicates": document["near_duplicates"]["rows"],
    }


def headline(runs: dict[str, Any]) -> list[list[str]]:
    return [[name, f"{run['rows_per_cpu_s']:,} rows a CPU second, {run['peak_rss_bytes'] / 1e6:.0f} MB"] for name, run in runs.items()]


if __name__ == "__main__":
    main()
