"""The document -> tables of text, shared by Markdown and HTML. A column or row without any figure is not there.

A cell that begins with '✓ ', '✗ ' or '! ' is a verdict; pages may colour it, the words stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.report import figures as f

Row = Mapping[str, Any]
PASS, FAIL, UNJUDGED = "✓ ", "✗ ", "! "
NO_WEIGHTS = ("metadata", "padding")  # groups of a file's parts whose types say nothing


@dataclass(frozen=True)
class Table:
    """Cells as text. `numeric` says of each column whether it is set flush right; `keys` are figures to sort cells by, or None."""

    titles: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]
    keys: tuple[tuple[float | None, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows and self.titles)


@dataclass(frozen=True)
class Column:
    title: str
    cell: Callable[[Row], str]
    numeric: bool = True
    by: str | Callable[[Row], Any] = ""  # what to sort by where the cell's text will not do: a key of the row, or a function


def tabulate(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Every row, and the columns that say something."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    return Table(
        tuple(columns[i].title for i in kept),
        tuple(columns[i].numeric for i in kept),
        tuple(tuple(row[i] for i in kept) for row in cells),
        tuple(tuple(_key(row, columns[i].by) for i in kept) for row in rows),
    )


def _key(row: Row, by: str | Callable[[Row], Any]) -> float | None:
    value = by(row) if callable(by) else row.get(by) if by else None
    return value if f.known(value) else None


def rows(doc: Row, section: str) -> list[Row]:
    return [row for row in doc.get(section) or () if row]


def section(doc: Row, name: str) -> Row:
    return doc.get(name) or {}


def text(key: str) -> Callable[[Row], str]:
    return lambda row: row.get(key) or ""


def of(key: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: show(row.get(key))


def files(doc: Row) -> Table:
    return tabulate(
        rows(doc, "files"),
        [
            Column("File", text("file"), numeric=False),
            Column("Format", lambda row: " ".join(filter(None, (row.get("format"), row.get("type")))), numeric=False),
            Column("Runtime", text("runtime"), numeric=False),
            Column(
                "Size",
                lambda row: f.aside(f.size(row.get("size_bytes")), f.labelled("predicted: ", f.size(row.get("predicted_bytes")))),
                by="size_bytes",
            ),
            Column("Bits a weight", lambda row: f.number(section(row, "weights").get("bits_a_weight"))),
            Column("KL, nats a token", lambda row: f.within(row.get("kl"), row.get("kl_low"), row.get("kl_high"), f.number), by="kl"),
            Column("Same top token", of("top1", f.percent), by="top1"),
            Column("n", lambda row: f.sample(row.get("rows"), row.get("tokens")), by="tokens"),
            Column("Tokenizer, template", parity, numeric=False),
            Column("SHA-256", lambda row: (row.get("sha256") or "")[:12], numeric=False),
        ],
    )


def parity(row: Row) -> str:
    """'✓ both equal', or which one differs or was compared."""
    tokens, template = row.get("tokens_equal"), row.get("template_equal")
    if tokens is False or template is False:
        return FAIL + ("both differ" if tokens is template else "tokens differ" if tokens is False else "template differs")
    if tokens and template:
        return f"{PASS}both equal"
    return f"{PASS}tokens equal" if tokens else f"{PASS}template equal" if template else ""


def losses(doc: Row) -> Table:
    def measured(key: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            values = row.get(key) or {}
            return f.within(values.get("loss"), values.get("low"), values.get("high"), f.loss)

        return cell

    return tabulate(
        rows(doc, "losses"),
        [
            Column("Set", text("set"), numeric=False),
            Column("File", text("file"), numeric=False),
            Column("Loss, untuned base", measured("before"), by=lambda row: section(row, "before").get("loss")),
            Column("Loss, this file", measured("after"), by=lambda row: section(row, "after").get("loss")),
            Column("Perplexity", perplexity, by=lambda row: section(row, "after").get("loss")),
            Column("Change", lambda row: f.within(row.get("change"), row.get("change_low"), row.get("change_high"), f.change), by="change"),
            Column("n", lambda row: f.sample(row.get("rows"), row.get("tokens"))),
        ],
    )


def perplexity(row: Row) -> str:
    """e to the loss, with its interval: how many tokens the model wavers between."""
    after = section(row, "after")
    value, low, high = (math.exp(v) if f.known(v) and v < 100 else None for v in (after.get("loss"), after.get("low"), after.get("high")))
    return f.within(value, low, high, f.number)


def accuracy(doc: Row) -> Table:
    return tabulate(
        rows(doc, "accuracy"),
        [
            Column("Set", text("set"), numeric=False),
            Column("File", text("file"), numeric=False),
            Column("Accuracy, untuned base", of("before", f.percent), by="before"),
            Column("Accuracy, this file", lambda row: f.within(row.get("after"), row.get("low"), row.get("high"), f.percent), by="after"),
            Column("Macro-F1, untuned base", of("macro_f1_before", f.percent), by="macro_f1_before"),
            Column("Macro-F1, this file", of("macro_f1_after", f.percent), by="macro_f1_after"),
            Column("n", lambda row: f.sample(row.get("rows"), None)),
        ],
    )


def bench(doc: Row) -> Table:
    return tabulate(
        rows(doc, "bench"),
        [
            Column("File", text("file"), numeric=False),
            Column("Runtime", text("runtime"), numeric=False),
            Column("Device", device_words, numeric=False),
            Column("Threads", of("threads", f.count), by="threads"),
            Column("Prompt tokens", of("prompt_tokens", f.count), by="prompt_tokens"),
            Column("Load", of("load_ms", f.ms), by="load_ms"),
            Column("First token", of("ttft_ms", f.ms), by="ttft_ms"),
            Column("Prefill, tok/s", of("prefill_tok_per_s", f.number), by="prefill_tok_per_s"),
            Column("Decode, tok/s", of("decode_tok_per_s", f.number), by="decode_tok_per_s"),
            Column("Peak memory", of("peak_rss_bytes", f.size), by="peak_rss_bytes"),
            Column("CPU for the prompt", lambda row: f.ms(_times(row.get("prefill_cpu_s"), 1000)), by="prefill_cpu_s"),
            Column("CPU a token", lambda row: f.ms(_times(row.get("cpu_s_per_token"), 1000)), by="cpu_s_per_token"),
            Column("Memory bandwidth", bandwidth, by="bandwidth_share"),
            Column("Load average", lambda row: f.number(row.get("load_average"), 2), by="load_average"),
            Column("Disturbed", lambda row: f"{UNJUDGED}yes" if disturbed(row) else "", numeric=False),
        ],
    )


def device_words(row: Row) -> str:
    """The device where it was another one than the report's machine; of an emulated one also that no speed of it is shown."""
    why = row.get("emulated_why") or "no real device"
    return f.aside(row.get("device") or "", f"emulated: {why}; it runs there, no speed is shown" if row.get("emulated") else "")


def devices(doc: Row) -> Table:
    """Devices that rows of the bench name, and how they were before and after."""

    def both(key: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            ends = [show(section(row, end).get(key)) for end in ("before", "after")]
            return " → ".join(end for end in dict.fromkeys(ends) if end)

        return cell

    return tabulate(
        rows(doc, "devices"),
        [
            Column("Device", lambda row: f.aside(row.get("name") or "", "emulated" if row.get("emulated") else ""), numeric=False),
            Column("Class", text("class"), numeric=False),
            Column("Processor", text("cpu"), numeric=False),
            Column("Cores", of("cores", f.count), by="cores"),
            Column("Memory", of("memory_bytes", f.size), by="memory_bytes"),
            Column("System", text("os"), numeric=False),
            Column("Runs", text("abi"), numeric=False),
            Column("Governor", both("governor", lambda value: value or ""), numeric=False),
            Column("Processor, °C", both("temperature_c", f.number)),
            Column("Heat", both("thermal_status", lambda value: value or ""), numeric=False),
            Column("Clock, of its maximum", both("clock_share", lambda value: f.percent(value, 0))),
            Column("Load", both("load_average", f.number)),
        ],
    )


def bandwidth(row: Row) -> str:
    """'47 % (of 14.7 GB/s)': the share of what the memory can give that decoding reached."""
    share, ceiling = f.percent(row.get("bandwidth_share"), 0), f.suffixed(f.number(row.get("bandwidth_gb_per_s")), "GB/s")
    return f.aside(share, f.labelled("of ", ceiling)) if share else ""


def disturbed(row: Row) -> str:
    """What made this row's speeds doubtful; empty when nothing did."""
    return (row.get("noisy_why") or "other work on the machine") if row.get("noisy") else ""


def disturbances(doc: Row) -> list[str]:
    """What disturbed which rows of the bench, a sentence a cause; what disturbed all of them first."""
    found, said = rows(doc, "bench"), dict[str, list[str]]()
    for row in found:
        who = f"{row.get('file') or ''} in {row.get('runtime') or ''}".removeprefix(" in ").removesuffix(" in ")
        who += f" on {row['device']}" if row.get("device") else ""
        name = f.aside(who, f.suffixed(f.count(row.get("prompt_tokens")), "prompt tokens")) or "a row"
        for why in filter(None, disturbed(row).split("; ")):
            said.setdefault(why, []).append(name)
    common = [f"All of it: {why}." for why, who in said.items() if len(who) == len(found) > 1]
    return common + [f"{', '.join(dict.fromkeys(who))}: {why}." for why, who in said.items() if not len(who) == len(found) > 1]


def merges(doc: Row) -> list[Row]:
    """What chose a merge: each file of a format that merges on the way, and the 16-bit model of the others."""
    found = [{**section(row, "merge"), "file": row.get("file")} for row in rows(doc, "files") if row.get("merge")]
    own = section(doc, "merge")
    return [*found, *([{**own, "file": "16-bit model"}] if own else [])]


def anatomy(doc: Row) -> Table:
    """Bytes of each group of tensors, a file a row; the types of a group below its size. Groups below 0.5 % in every file are left out."""
    found = [row for row in rows(doc, "files") if section(row, "parts")]
    totals: dict[str, int] = {}
    for row in found:
        sizes = {group: group_bytes(types or {}) for group, types in section(row, "parts").items()}
        for group, n_bytes in sizes.items():
            if group in totals or n_bytes >= 0.005 * sum(sizes.values()):
                totals[group] = totals.get(group, 0) + n_bytes

    def cell(group: str) -> Callable[[Row], str]:
        def show(row: Row) -> str:
            types = section(section(row, "parts"), group)
            kinds = ", ".join(sorted(types, key=lambda kind: -(types[kind] or 0))[:3])
            return f.aside(f.size(group_bytes(types)), "" if group in NO_WEIGHTS else kinds) if types else ""

        return show

    def by(group: str) -> Callable[[Row], Any]:
        return lambda row: group_bytes(section(section(row, "parts"), group))

    groups = [Column(group, cell(group), by=by(group)) for group in sorted(totals, key=lambda g: -totals[g])]
    return tabulate(found, [Column("File", text("file"), numeric=False), *groups])


def group_bytes(types: Mapping[str, Any]) -> int:
    """Bytes of one group of a file's `parts`."""
    return sum(int(n) for n in types.values() if f.known(n))


def plans(doc: Row) -> Table:
    """What was really measured of every file that was planned: its candidates, and smaller and larger ones."""
    tried = [{**row, "file": file.get("file")} for file in rows(doc, "files") for row in rows(section(file, "plan"), "candidates")]
    return tabulate(
        tried,
        [
            Column("File", text("file"), numeric=False),
            Column("Size", of("size_bytes", f.size), by="size_bytes"),
            Column("Rounding", text("rounding"), numeric=False),
            Column("KL, predicted", of("predicted_kl", f.number), by="predicted_kl"),
            Column("KL on valid", lambda row: f.within(row.get("kl"), row.get("kl_low"), row.get("kl_high"), f.number), by="kl"),
            Column("Loss on valid", of("loss", f.loss), by="loss"),
            Column(
                "Score on valid", lambda row: f.within(row.get("score"), row.get("score_low"), row.get("score_high"), f.percent), by="score"
            ),
            Column("n", lambda row: f.sample(row.get("rows"), row.get("tokens"))),
            Column("Kept", lambda row: f"{PASS}kept" if row.get("kept") else "", numeric=False),
        ],
    )


def merge(doc: Row) -> Table:
    tried = [{**row, "file": m["file"], "kept": m.get("kept") == row.get("base")} for m in merges(doc) for row in rows(m, "candidates")]
    return tabulate(
        tried,
        [
            Column("File", text("file"), numeric=False),
            Column("Merged into", lambda row: merge_name(row.get("base")), numeric=False),
            Column("Loss on valid", of("loss", f.loss)),
            Column("KL to the trained model", lambda row: f.within(row.get("kl"), row.get("kl_low"), row.get("kl_high"), f.number)),
            Column("Same top token", of("top1", f.percent)),
            Column("n", lambda row: f.sample(row.get("rows"), row.get("tokens"))),
            Column("Kept", lambda row: f"{PASS}kept" if row["kept"] else "", numeric=False),
        ],
    )


def merge_words(doc: Row) -> list[str]:
    """A sentence a choice: which merge, and why."""
    return [
        f"{m['file'] or 'the file'}: {merge_name(m.get('kept'))} was kept" + (f": {m['why']}" if m.get("why") else "")
        for m in merges(doc)
        if m.get("kept")
    ]


def merge_name(base: Any) -> str:
    """The two merges of a QLoRA adapter in words; other names as they are."""
    return {"nf4": "the dequantized 4-bit base (nf4)", "16bit": "the 16-bit base (16bit)"}.get(base, base or "")


def checks(doc: Row) -> Table:
    return tabulate(
        rows(doc, "checks"),
        [
            Column("Result", lambda row: _verdict(row.get("ok")), numeric=False),
            Column("Check", text("what"), numeric=False),
            Column("Limit", text("limit")),
            Column("Measured", text("value")),
            Column("Why", text("why"), numeric=False),
        ],
    )


def _verdict(ok: bool | None) -> str:
    return f"{UNJUDGED}not judged" if ok is None else f"{PASS}passed" if ok else f"{FAIL}failed"


def training(doc: Row) -> list[tuple[str, str]]:
    """Pairs of a name and a figure."""
    train = section(doc, "training")
    predicted, measured = section(train, "predicted"), section(train, "measured")

    def against(key: str, show: Callable[[Any], str]) -> str:
        return f.aside(show(measured.get(key)), f.labelled("predicted: ", show(predicted.get(key))))

    share = f.percent(train.get("trained_share"), 2)
    parameters = f.count(train.get("trained_parameters"))
    total = f.count(train.get("total_parameters"))
    pairs = [
        ("Method", train.get("method") or ""),
        ("Base model", train.get("base") or ""),
        ("Trained parameters", parameters + (f" of {total}" if parameters and total else "")),
        ("Trained share", share),
        ("Data", f.sample(train.get("rows"), train.get("tokens"))),
        ("Epochs", f.plainest(train.get("epochs"))),
        ("Peak memory", against("peak_rss_bytes", f.size)),
        ("Peak GPU memory", against("peak_gpu_bytes", f.size)),
        ("Full fine-tuning, activations apart", f.labelled("predicted: ", f.size(train.get("full_finetune_bytes")))),
        ("Time", against("seconds", f.seconds)),
        ("Speed", f.suffixed(f.number(measured.get("tokens_per_s")), "tokens/s")),
        ("Size of the merged 16-bit model", f.size(train.get("model_16bit_bytes"))),
    ]
    return [(name, value) for name, value in pairs if value]


def machine(doc: Row) -> list[tuple[str, str]]:
    """Where and with what the figures were taken: pairs of a name and a value."""
    values = section(doc, "machine")
    pairs = [
        ("Machine class", values.get("class") or ""),
        ("Processor", values.get("cpu") or ""),
        ("Cores", f.count(values.get("cores"))),
        ("Memory", f.size(values.get("memory_bytes"))),
        ("GPU", values.get("gpu") or ""),
        ("Operating system", values.get("os") or ""),
        ("Python", values.get("python") or ""),
        ("Load average at the start", f.number(values.get("load_average"), 2)),
        ("edgelora", doc.get("edgelora") or ""),
        ("Commit", doc.get("commit") or ""),
        ("Date", doc.get("created") or ""),
    ]
    return [(name, value) for name, value in pairs if value]


def _times(value: Any, factor: float) -> Any:
    return value * factor if f.known(value) else None
