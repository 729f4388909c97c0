"""Budgets: what is red, what is green, and what is only a warning."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelora import baseline as baselines
from edgelora import check, speeds
from edgelora.errors import ModelError, UsageError

NAN, INF = float("nan"), float("inf")
CALM = [10.0, 10.1, 9.9, 10.05, 9.95]


def document(**changed: Any) -> dict[str, Any]:
    """A report of one file; ``bench__threads=4`` changes one figure, None removes it, ``machine__class`` names another machine."""
    doc: dict[str, Any] = {
        "schema": 1,
        "name": "bot",
        "commit": "abc1234",
        "created": "2026-11-24",
        "machine": {"class": "x86-2core"},
        "files": [{"file": "bot.gguf", "format": "gguf", "type": "q4_k_m", "size_bytes": 100_000_000, "kl": 0.1, "top1": 0.9, "rows": 16, "tokens": 600}],
        "losses": [{"set": "sealed", "file": "bot.gguf", "rows": 50, "tokens": 900, "after": {"loss": 2.0}, "change_high": -0.3}],
        "accuracy": [{"set": "sealed", "file": "bot.gguf", "rows": 50, "after": 0.8}],
        "bench": [
            {
                "file": "bot.gguf", "runtime": "llama.cpp", "threads": 2, "prompt_tokens": 128, "decode_tokens": 4, "workload": 1,
                "ttft_ms": 10.0, "decode_tok_per_s": 100.0, "peak_rss_bytes": 200_000_000, "noisy": False,
                "samples_ms": {"ttft": CALM, "decode": [v for v in CALM for _ in range(4)]},
            }
        ],
    }  # fmt: skip
    for path, value in changed.items():
        section, key = path.split("__")
        place = doc[section] if section == "machine" else doc[section][0]
        if value is None:
            del place[key]
        else:
            place[key] = value
    return doc


def slower(factor: float, **changed: Any) -> dict[str, Any]:
    """The same bench with every sample `factor` times as long."""
    samples = {k: [v * factor for v in values] for k, values in document()["bench"][0]["samples_ms"].items()}
    return document(bench__ttft_ms=10.0 * factor, bench__decode_tok_per_s=100.0 / factor, bench__samples_ms=samples, **changed)


SAME = document()
TURNS = document(bench__turns="a")
NO = object()  # no baseline at all
CASES: list[tuple[str, Any, Any, dict[str, Any], Any]] = [  # budget, its value, the baseline, the report, verdict
    # limits
    ("size", "100MB", NO, SAME, True),
    ("size", "99.99MB", NO, SAME, False),
    ("size", "95.4MiB", NO, SAME, True),  # 100,034,150 bytes
    ("size", "95MiB", NO, SAME, False),  # 99,614,720 bytes: read as MB it would be broken by far, read as MiB by little
    ("size", "100 MB", NO, SAME, True),
    ("size", "<= 100MB", NO, SAME, True),
    ("size", 100_000_000, NO, SAME, True),
    ("size", 99_999_999, NO, SAME, False),
    ("size", "0.1GB", NO, SAME, True),
    ("size", "100MB", NO, document(files__size_bytes=None), False),
    ("size", "100MB", NO, document(files__size_bytes=NAN), False),
    ("size", "100MB", NO, {"files": []}, False),
    ("kl", 0.1, NO, SAME, True),
    ("kl", 0.0999, NO, SAME, False),
    ("kl", 0.2, NO, document(files__kl=NAN), False),
    ("kl", 0.2, NO, document(files__kl=None), False),
    ("kl", 0.2, NO, document(files__kl=INF), False),
    ("kl", 0.2, NO, document(files__kl="0.1"), False),
    ("kl", 0.2, NO, document(files__kl=True), False),
    ("kl", 0, NO, document(files__kl=0.0), True),
    ("top1", ">=0.9", NO, SAME, True),
    ("top1", 0.91, NO, SAME, False),
    ("loss", 2, NO, SAME, True),
    ("loss", 1.9, NO, SAME, False),
    ("change", -0.2, NO, SAME, True),
    ("change", "-0.31", NO, SAME, False),
    ("accuracy", ">=0.8", NO, SAME, True),
    ("accuracy", ">=0.85", NO, SAME, False),
    ("accuracy", 0.5, NO, {"accuracy": None}, False),
    ("peak_rss", "200MB", NO, SAME, True),
    ("peak_rss", "190MiB", NO, SAME, False),
    ("ttft_ms", 10, NO, SAME, True),
    ("ttft", 9, NO, SAME, False),
    ("decode_tok_per_s", 100, NO, SAME, True),
    ("decode", ">=101", NO, SAME, False),
    ("decode", 15, NO, document(bench__decode_tok_per_s=NAN), False),
    # changes: exact sizes
    ("size", "+1%", NO, SAME, None),
    ("size", "+1%", SAME, SAME, True),
    ("size", "+0%", SAME, SAME, True),
    ("size", "+0%", SAME, document(files__size_bytes=100_000_001), False),
    ("size", "+1%", SAME, document(files__size_bytes=101_000_000), True),
    ("size", "+1%", SAME, document(files__size_bytes=101_000_001), False),
    ("size", "+1%", SAME, document(files__size_bytes=50_000_000), True),
    ("size", "+1MB", SAME, document(files__size_bytes=101_000_000), True),
    ("size", "+1MB", SAME, document(files__size_bytes=101_040_000), False),
    ("size", "+1MiB", SAME, document(files__size_bytes=101_040_000), True),
    ("size", "+1%", SAME, document(files__size_bytes=None), False),
    ("size", "+1%", SAME, document(files__size_bytes=NAN), False),
    ("size", "+1%", document(files__size_bytes=0), SAME, None),
    ("size", "+1%", document(files__size_bytes=None), SAME, None),
    ("size", "+1%", SAME, document(files__file="other.gguf"), None),
    ("size", "+1%", document(machine__class="arm64-4core"), document(files__size_bytes=102_000_000), False),  # bytes are bytes everywhere
    # changes: quality on the same rows
    ("kl", "+10%", SAME, document(files__kl=0.11), True),
    ("kl", "+10%", SAME, document(files__kl=0.12), False),
    ("kl", "+10%", SAME, document(files__kl=0.05), True),
    ("kl", "+10%", SAME, document(files__kl=0.5, files__rows=8), None),  # other rows
    ("kl", "+10%", SAME, document(files__kl=NAN), False),
    ("kl", "+10%", document(files__kl=NAN), SAME, None),
    ("kl", "+10%", document(files__kl=0), document(files__kl=0.5), None),
    ("top1", "-1%", SAME, document(files__top1=0.88), False),
    ("loss", "+5%", SAME, document(losses__after={"loss": 2.05}), True),
    ("loss", "+5%", SAME, document(losses__after={"loss": 2.2}), False),
    ("accuracy", "-5%", SAME, document(accuracy__after=0.7), False),
    # changes: speed, on the same machine doing the same work; a record of other minutes proves little
    ("decode", "-5%", SAME, SAME, True),
    ("decode", "-5%", SAME, slower(1.04), True),
    ("decode", "-5%", SAME, slower(1.10), None),
    ("decode", "-5%", SAME, slower(1.45), None),
    ("decode", "-5%", SAME, slower(1.55), False),
    ("decode", "-70%", SAME, slower(1.55), True),
    ("decode", "-5%", SAME, slower(1.55, bench__crowded=True), None),
    ("decode", "-5%", document(bench__crowded=True), slower(1.55), None),
    ("decode", "-5%", SAME, slower(1.55, bench__processor="AMD EPYC, avx2"), None),
    ("decode", "-30%", SAME, slower(1.26), True),
    ("decode", "-5%", SAME, slower(0.5), True),
    ("ttft", "+5%", SAME, slower(1.10), None),
    ("ttft", "+15%", SAME, slower(1.10), True),
    # measured in turns a tenth is enough, also beside other programs
    ("decode", "-5%", TURNS, slower(1.10, bench__turns="a"), False),
    ("decode", "-5%", TURNS, slower(1.10, bench__turns="b"), None),
    ("decode", "-5%", TURNS, slower(1.04, bench__turns="a"), True),
    ("decode", "-5%", TURNS, slower(0.5, bench__turns="a"), True),
    ("decode", "-5%", TURNS, slower(1.10, bench__turns="a", bench__crowded=True), False),
    ("decode", "-5%", TURNS, slower(1.10, bench__turns="a", bench__threads=1), None),
    ("ttft", "+5%", TURNS, slower(1.10, bench__turns="a"), False),
    ("ttft", "+5%", TURNS, document(bench__turns="a", bench__samples_ms={"ttft": [11.0, 11.0, 11.0, 9.0, 9.0]}), None),  # three of five
    ("ttft", "+5%", TURNS, document(bench__turns="a", bench__samples_ms={"ttft": [11.0] * 4}), None),  # four pairs are too few
    ("decode", "-5%", NO, slower(1.10), None),
    ("decode", "-5%", SAME, slower(1.10, machine__class="arm64-4core"), None),
    ("decode", "-5%", SAME, slower(1.10, bench__threads=1), None),
    ("decode", "-5%", SAME, slower(1.10, bench__runtime="ONNX Runtime"), None),
    ("decode", "-5%", SAME, slower(1.10, bench__workload=2), None),
    ("decode", "-5%", document(bench__workload=None), slower(1.10), None),
    ("decode", "-5%", SAME, slower(1.10, bench__prompt_tokens=32), None),
    ("decode", "-5%", SAME, document(bench__decode_tok_per_s=90.0), True),  # the samples decide, not a median of them
    ("decode", "-5%", SAME, document(bench__decode_tok_per_s=90.0, bench__samples_ms={}), None),
    ("decode", "-5%", SAME, document(bench__decode_tok_per_s=NAN), False),
    ("decode", "-5%", document(bench__decode_tok_per_s=0), SAME, None),
    ("peak_rss", "+5%", SAME, document(bench__peak_rss_bytes=220_000_000), False),
    ("peak_rss", "+5%", SAME, document(bench__peak_rss_bytes=220_000_000, machine__class="arm64-4core"), None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "before", "after", "expected"), CASES)
def test_verdicts(name: str, value: Any, before: Any, after: dict[str, Any], expected: bool | None) -> None:
    baseline = None if before is NO else baselines.make(before, lambda file: None)
    (verdict,) = check.check(after, {name: value}, baseline)
    assert verdict.ok is expected, verdict
    assert verdict.ok is True or verdict.why or verdict.value == "not measured"


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize(
    ("budgets", "text"),
    [
        ({"siz": "1MB"}, "siz: not a budget"),
        ({"size": "1 MBit"}, "is not a size"),
        ({"size": "many"}, "is not a size"),
        ({"size": "-1%"}, "write +1%"),
        ({"decode": "+5%"}, "write -5%"),
        ({"size": ">=1MB"}, "write <="),
        ({"kl": "nan"}, "not a number"),
        ({"kl": "inf"}, "not a number"),
        ({"kl": True}, "not a number"),
        ({"kl": "+1MB"}, "is no size"),
        ({"change": "+1%"}, "is a change already"),
        ({"accuracy": "<=0.5"}, "write >="),
    ],
)
def test_a_budget_that_cannot_be_read_is_a_usage_error(budgets: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        check.parse(budgets)
    assert text in caught.value.message


def test_several_demands_on_one_figure() -> None:
    found = check.check(document(files__size_bytes=120_000_000), {"size": ["130MB", "+1%"]}, baselines.make(SAME, lambda file: None))
    assert [v.ok for v in found] == [True, False]
    assert found[1].value == "+20.00% since abc1234 (100.0 MB -> 120.0 MB)"


def test_the_signed_rank_test_agrees_with_scipy() -> None:
    scipy = pytest.importorskip("scipy.stats")
    chance = random.Random(0)
    for n, near in ((5, 1e-9), (9, 1e-9), (15, 1e-9), (40, 1e-9), (150, 1e-3)):
        for _ in range(10):
            values = [chance.gauss(0.3, 1) for _ in range(n)]
            expected = scipy.wilcoxon(values, alternative="greater", method="exact" if n <= 100 else "approx").pvalue
            assert speeds.p_positive(values) == pytest.approx(expected, abs=near)


def test_the_signed_rank_test_with_ties_counts_every_choice_of_signs() -> None:
    assert speeds.p_positive([1.0] * 5) == pytest.approx(1 / 32)
    # ranks 1.5, 1.5 and 3: of the 8 choices of signs +3 with one of 1.5, or with both, reaches 4.5
    assert speeds.p_positive([1.0, -1.0, 2.0]) == pytest.approx(3 / 8)
    assert speeds.p_positive([0.0, 1.0]) == pytest.approx(1 / 2)
    assert speeds.p_positive([]) == speeds.p_positive([0.0]) == 1.0


def test_turns_see_through_a_drift_that_hides_a_tenth() -> None:
    """A machine that becomes a fifth slower and faster again while two files take turns; the second is a tenth slower."""
    chance = random.Random(3)
    alarms = {1.0: 0, 1.1: 0}
    for factor in alarms:
        for _ in range(200):
            moment = [chance.choice((1.0, 1.2)) if i % 5 == 0 else 1.0 for i in range(15)]
            rows = [
                {"turns": "a", "samples_ms": {"ttft": [10 * slow * m * chance.lognormvariate(0, 0.04) for m in moment]}}
                for slow in (1.0, factor)
            ]
            found = speeds.slowdown(*rows, "ttft", 0.05)
            alarms[factor] += bool(found and found.real)
    assert alarms[1.0] <= 2
    assert alarms[1.1] >= 195


def test_equal_samples_are_seldom_called_different() -> None:
    """10,000 sets of pairs from one source: at most ALPHA of them, within what chance allows."""
    chance = random.Random(1)
    alarms = sum(speeds.p_positive([chance.gauss(0, 0.1) for _ in range(9)]) <= speeds.ALPHA for _ in range(10_000))
    assert alarms <= 10_000 * speeds.ALPHA * 1.1


def test_a_red_size_names_the_tensors(tmp_path: Path, tiny_base: Path) -> None:
    from edgelora.export import gguf

    old = gguf.write(tiny_base, "q8_0", tmp_path, "bot", lambda share, text: None)
    new = gguf.write(tiny_base, "f16", tmp_path, "bot", lambda share, text: None)
    before = baselines.make(document(files__size_bytes=old.stat().st_size), lambda name: old)
    path = baselines.write(before, tmp_path / "baselines")
    assert path.name == "x86-2core.json"
    known = baselines.read(tmp_path / "baselines", "x86-2core")
    assert known == json.loads(json.dumps(before))
    after = document(files__size_bytes=new.stat().st_size)
    (verdict,) = check.check(after, {"size": "+1%"}, known, lambda name: new)
    assert verdict.ok is False
    assert verdict.why.startswith("grew: token_embd.weight +")
    assert "Q8_0 -> F16" in verdict.why
    assert "take a smaller type" in verdict.why
    assert "since abc1234" in verdict.value


def edgelora(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgelora.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def test_a_team_gates_a_file_red_then_green(tmp_path: Path, tiny_base: Path) -> None:
    from edgelora.export import gguf

    small = gguf.write(tiny_base, "q8_0", tmp_path, "bot", lambda share, text: None)
    shipped = tmp_path / "bot.gguf"
    shipped.write_bytes(small.read_bytes())
    (tmp_path / "budgets.yaml").write_text("size: [10MB, +1%]\n", encoding="utf-8")
    first = edgelora("check", "bot.gguf", "--budgets", "budgets.yaml", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "warning: 1 of 2 budgets could not be judged\n")  # no baseline yet: said, not passed
    assert "?       size of bot.gguf against the baseline" in first.stdout
    assert edgelora("baseline", "update", "bot.gguf", cwd=tmp_path).returncode == 0
    green = edgelora("check", "bot.gguf", "--budgets", "budgets.yaml", cwd=tmp_path)
    assert (green.returncode, green.stderr) == (0, "")
    shipped.write_bytes(gguf.write(tiny_base, "f16", tmp_path, "bot", lambda share, text: None).read_bytes())
    red = edgelora("check", "bot.gguf", "--budgets", "budgets.yaml", cwd=tmp_path)
    assert red.returncode == 1
    assert "grew: token_embd.weight +" in red.stdout
    assert red.stderr == "error: 1 of 2 budgets broken\nshrink what grew, or raise the limit on purpose\n"
    shipped.write_bytes(small.read_bytes())
    assert edgelora("check", "bot.gguf", "--budgets", "budgets.yaml", cwd=tmp_path).returncode == 0
    nothing = edgelora("check", "bot.gguf", "--budget", "kl=0.1", cwd=tmp_path)  # nobody ran it: red
    assert (nothing.returncode, "not measured" in nothing.stdout) == (1, True)


def test_damaged_baselines_are_refused(tmp_path: Path) -> None:
    whole = json.dumps(baselines.make(SAME, lambda name: None))
    chance = random.Random(2)
    refused = 0
    for number in range(300):
        text = list(whole)
        for _ in range(chance.randint(1, 5)):
            at = chance.randrange(len(text))
            text[at : at + chance.randint(0, 20)] = chance.choice(["", "[", "}", '"', "null", "1e999", "-", "NaN"])
        file = tmp_path / f"{number}.json"
        file.write_text("".join(text), encoding="utf-8")
        try:
            known = baselines.read(file, None)
        except ModelError:
            refused += 1
        else:
            check.check(copy.deepcopy(SAME), {"size": "+1%", "decode": "-5%", "kl": "+1%"}, known)  # raises nothing
    assert refused > 200
    for content, text in (
        (b"\xff", "is not a baseline"),
        (b"[" * 100_000, "is not a baseline"),
        (b'{"kind": "report"}', "is not a baseline of schema"),
    ):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ModelError) as caught:
            baselines.read(tmp_path / "bad.json", None)
        assert text in caught.value.message
    with (tmp_path / "large.json").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(ModelError, match="larger than"):
        baselines.read(tmp_path / "large.json", None)
    assert baselines.read(tmp_path / "nothing", None) is None


def test_gates_need_no_torch_and_no_numpy(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(document()), encoding="utf-8")
    code = (
        "import sys\nfrom edgelora.cli import main\n"
        "sys.argv = ['edgelora', 'check', '.', '--budget', 'size=+1%', '--budget', 'decode=-5%', '--json']\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0, end.code\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'numpy', 'gguf', 'onnx', 'transformers', 'rich'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_history_is_plotted_over_commits(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    git("init", "-q")
    none = edgelora("report", "--history", "baselines/x86-2core.json", cwd=tmp_path)
    assert (none.returncode, none.stderr.startswith("error: git knows no version of ")) == (3, True)
    for size in (100_000_000, 112_000_000, 105_000_000):
        baselines.write(baselines.make(document(files__size_bytes=size), lambda name: None), tmp_path / "baselines")
        git("add", "baselines")
        git("commit", "-qm", "a baseline")
        done = edgelora("report", "--history", "baselines/x86-2core.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "history" / "history.json").read_text(encoding="utf-8"))
    sizes = next(row for row in history["rows"] if row["what"] == "size")
    assert sizes["values"] == [100_000_000, 112_000_000, 105_000_000]
    assert len({run["label"] for run in history["runs"]}) == 3
    page = (tmp_path / "history" / "history.html").read_text(encoding="utf-8")
    assert "bot over 3 commits" in page
    assert "112.000 at commit 2" in page or page.count("<polyline") >= 3
    assert edgelora("report", cwd=tmp_path).returncode == 2
