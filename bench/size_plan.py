"""Size plans against every stock recipe of llama.cpp and against uniform types, on rows that nobody saw.

    python bench/size_plan.py CARRY WORK OUT [--model smollm2] [--task medquad ...] [--seconds 300]

CARRY and WORK are the folders of bench/reference_models.py, CARRY with the base's tokenizer in it. Everything is first run by torch
in float32 on the bytes that ggml packed, so that all roundings are judged on one implementation; then the plan, the best
stock recipe and the best control of every budget are written as GGUF files and run in llama.cpp.

stock      every file type of llama.cpp x {as it is, one type for all} x {its own, any embedding and output type} x
           {with, without importance matrix}; one counts at a budget up to 3 % above it
control    every type for the whole body x every type for embedding and output, with the importance that the plan has (stock
           holds them with llama.cpp's)
uniform    the same, compensated as the plan is: what is left is what choosing types gains
plan       rounded to nearest, with compensation, or planned again after the better of the two was measured: whichever has the lowest KL
           on `valid` rows. What it would be without planning again stands beside it (`first`)

Importance and curvature come from training rows; figures are of `sealed` rows. Gain kept: (loss of the untuned model in the same types
- loss of the file) / (loss of the untuned - loss of the tuned, both in 16 bits). Intervals: paired bootstrap over rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.reference_models import HELD_OUT, task_rows
from bench.size_lab import Files, How, Job, Lab, Pool, curve, imatrix, in_llama_cpp, keep, keep_curvature, round_one
from edgelora import artifact, evaluate, machine
from edgelora.data.chat import Encoded
from edgelora.quant import gguf_types, sensitivity
from edgelora.quant.curvature import EMBEDDING
from edgelora.quant.ggml import Type, block_size
from edgelora.quant.size_plan import Menu, Option, Plan

MB = 10**6
STEP = 5  # MB between budgets
ROOM = 1.03  # a rival may be this much larger
ROWS = {"medquad": 120, "banking77": 400}  # sealed rows, half as many `valid` ones
IN_LLAMA_CPP = 0.34  # share of the sealed rows that llama.cpp is asked for too
RIVALS = ("stock", "control", "uniform")
PLAIN, IMATRIX = How("plain", "none"), How("imatrix", "imatrix")
NEAREST = How("nearest", "moments", "64")
PLANS = (NEAREST, How("compensated", "moments", "64", 0.2))
# Only to know: more training rows, and other shares of shrinkage.
VARIANTS = (How("compensated 256 rows", "moments", "256", 0.2), How("compensated shrunk more", "moments", "64", 0.4))
CURVATURES = {"64": 64, "256": 256}  # training rows
SLOW = {
    Type.IQ1_S,
    Type.IQ1_M,
    Type.IQ2_XXS,
    Type.IQ2_XS,
    Type.IQ2_S,
}  # quantizers that need minutes a matrix; where rows fit them they are left out


@dataclass
class File:
    """A file that could be made, and what was measured of it on the sealed rows."""

    name: str
    kind: str  # stock, control, uniform, plan or variant
    types: Mapping[str, Type]
    how: How
    size: int
    predicted: float = 0.0
    found: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def kl(self) -> float:
        return float(self.found["nats"].sum() / self.found["tokens"].sum())

    @property
    def loss(self) -> float:
        return float(self.found["losses"].sum() / self.found["tokens"].sum())

    def row(self) -> dict[str, Any]:
        tokens = self.found["tokens"]
        low, high = evaluate.interval(self.found["nats"], tokens)
        return {
            "name": self.name, "kind": self.kind, "size_bytes": self.size, "kl": self.kl, "kl_low": low, "kl_high": high,
            "predicted_kl": self.predicted, "loss": self.loss, "first_choice": float(self.found["hits"].sum() / tokens.sum()),
            "rows_right": float((self.found["hits"] == tokens).mean()),
        }  # fmt: skip


class Study:
    """One model and task: what is compared, and how it came out."""

    def __init__(self, given: argparse.Namespace, task: str, pool: Pool, place: Path, until: float) -> None:
        self.pool, self.place, self.until, self.task = pool, place, until, task
        self.lab = _lab(given.carry, given.work, given.model, task, given.device)
        self.files = Files(self.lab, place)
        rows = [
            Encoded(tuple(map(int, ids)), tuple(map(bool, trained)))
            for ids, trained in task_rows(np.load(given.carry / "tokens.npz"), task)
        ]
        self.training = [row for i, row in enumerate(rows) if i % HELD_OUT > 1]
        self.valid = _spread(rows[::HELD_OUT], ROWS[task] // 2 // given.fewer)
        self.sealed = _spread(rows[1::HELD_OUT], ROWS[task] // given.fewer)
        self.counts = {name: max(2, count // given.fewer) for name, count in CURVATURES.items()}
        self.costs: dict[Job, float] = {}  # predicted
        self.menus: dict[How, Menu] = {}
        self.notes: dict[str, Any] = {}

    def left(self) -> float:
        return self.until - time.monotonic()

    def say(self, what: str) -> None:
        print(f"{self.left():5.0f} s left  {self.task}: {what}", flush=True)

    def prepare(self) -> None:
        """Curvature and importance of training rows, the references, and the matrices as files."""
        began = time.monotonic()
        found = {}
        for name, count in self.counts.items():
            found[name] = curve(self.lab, _spread(self.training, count))
            keep_curvature(found[name], self.place / name)
        head = self.lab.head
        keep(
            imatrix(self.lab, _spread(self.training, self.counts["64"])) | {head: np.diag(found["64"].moments(head))},
            self.place / "imatrix",
        )
        for model in self.lab.checkpoints:
            keep({name: self.lab.values(model, name) for name in self.lab.matrices}, self.place / model / "values")
        self.references = {rows: [p for _, p, _ in self.lab.predictions(getattr(self, rows))] for rows in ("valid", "sealed")}
        self.tuned = self.lab.measure(self.sealed, self.references["sealed"])
        self.base = self.tuned
        if "base" in self.lab.checkpoints:
            self.lab.show("base")
            self.base = self.lab.measure(self.sealed, self.references["sealed"])
        self.say(f"curvature of {found['64'].answers} answer tokens, {len(self.sealed)} sealed rows; {time.monotonic() - began:.0f} s")

    def rivals(self) -> list[File]:
        """Stock recipes and controls, each file once, none much larger than Q8_0."""
        lab = self.lab
        shape = gguf_types.Shape(
            lab.config.num_hidden_layers, lab.config.num_attention_heads, lab.config.num_key_value_heads, lab.config.model_type
        )
        ends = tuple(name for name in (lab.head, EMBEDDING) if name in lab.matrices)
        others = [kind for kind in sensitivity.CANDIDATES if all(lab.shapes[n][1] % block_size(kind) == 0 for n in ends)]
        made: dict[tuple[Any, ...], File] = {}

        def add(name: str, kind: str, types: dict[str, Type], how: How) -> None:
            if not SLOW & set(types.values()) and all(lab.shapes[n][1] % block_size(t) == 0 for n, t in types.items()):
                made.setdefault((how, *types.values()), File(name, kind, types, how, self.files.bytes(types)))

        for name, listed in gguf_types.FILE_TYPES.items():
            for how in (IMATRIX, PLAIN):
                try:
                    choices = gguf_types.plan(lab.shapes, name, shape, how is IMATRIX)
                except Exception:
                    continue  # no fallback for rows of this length
                types = {n: choices[n].type for n in lab.matrices}
                label = f"{name}{' with imatrix' if how is IMATRIX else ''}"
                add(label, "stock", types, how)
                pure = dict.fromkeys(lab.matrices, listed.base)
                add(f"{label}, pure", "stock", pure, how)
                for other in others:
                    add(f"{label}, embedding {other.name}", "stock", types | dict.fromkeys(ends, other), how)
                    add(f"{label}, pure, embedding {other.name}", "stock", pure | dict.fromkeys(ends, other), how)
        for body in sensitivity.CANDIDATES:
            for other in others:
                types = dict.fromkeys(lab.matrices, body) | dict.fromkeys(ends, other)
                for kind, how in (("control", NEAREST), ("uniform", PLANS[1])):
                    add(f"all {body.name}, embedding {other.name}, {how.name}", kind, types, how)
        largest = ROOM * self.files.bytes(dict.fromkeys(lab.matrices, Type.Q8_0))
        return [file for file in made.values() if file.size <= largest]

    def round(self, model: str, files: Sequence[File], menus: Sequence[How] = ()) -> None:
        """Every matrix that the files, or plans in these ways, want."""
        jobs = {Job(model, n, kind, file.how) for file in files for n, kind in file.types.items()}
        jobs |= {
            Job(model, n, kind, how) for how in menus for n in self.lab.matrices for kind in sensitivity.candidates(self.lab.shapes[n][1])
        }
        wanted = [job for job in jobs if not job.file(self.place).exists()]
        wanted.sort(key=lambda job: (-np.prod(self.lab.shapes[job.matrix]), not job.how.curve, str(job)))
        began = time.monotonic()
        self.costs |= dict(
            self.pool(round_one, [(job, self.place, self.lab.head, len(self.lab.matrices)) for job in wanted], max(10.0, 0.7 * self.left()))
        )
        self.say(f"{len(wanted)} matrices rounded in {time.monotonic() - began:.0f} s")

    def plans(self, how: How, budgets: Sequence[int], kind: str) -> list[File]:
        options = {}
        for n in self.lab.matrices:
            kinds = [t for t in sensitivity.candidates(self.lab.shapes[n][1]) if Job("tuned", n, t, how) in self.costs]
            options[n] = tuple(Option(t.name, self.files.matrices[n].bytes(t), self.costs[Job("tuned", n, t, how)]) for t in kinds)
        if not all(options.values()):
            self.say(f"no plans by {how.name}: not all matrices were rounded in time")
            return []
        menu, made = Menu(options, self.files.fixed, frozenset({self.lab.head})), []
        self.menus[how] = menu
        for budget in budgets:
            if budget * MB >= menu.smallest().size_bytes:
                made.append(_file(f"{budget} MB, {how.name}", kind, how, menu.plan(int(budget * MB))))
        return made

    def judge(self, files: Sequence[File]) -> list[File]:
        """Those that could be measured, on the sealed rows."""
        done = []
        for file in files:
            if self.left() > 0 and self.files.load("tuned", file.types, file.how):
                file.found = self.lab.measure(self.sealed, self.references["sealed"])
                done.append(file)
        self.say(f"{len(done)} of {len(files)} files judged")
        return done

    def chosen(self, plans: Sequence[File], budget: int) -> tuple[File, File]:
        """By KL on `valid`, as the sealed rows' figures choose nothing: the best of `plans` and of one that it corrects; the best of `plans`."""

        def on_valid(file: File) -> float:
            self.files.load("tuned", file.types, file.how)
            found = self.lab.measure(self.valid, self.references["valid"])
            return float(found["nats"].sum() / found["tokens"].sum())

        kl, first = min(((on_valid(file), file) for file in plans), key=lambda both: both[0])
        plan = Plan({n: kind.name for n, kind in first.types.items()}, first.size, first.predicted)
        again = self.menus[first.how].corrected(plan, kl).plan(budget * MB)
        if again.types == plan.types:
            return first, first
        file = _file(f"{budget} MB, {first.how.name}, again", "plan", first.how, again)
        judged = self.judge([file]) if on_valid(file) < kl else []
        return (judged or [first])[0], first

    def kept(self, file: File) -> dict[str, float] | None:
        """The share of the fine-tune's gain that the file keeps, with a paired interval; of the loss, and of tokens that are the first choice."""
        if not self.files.load("base", file.types, file.how):
            return None
        base = self.lab.measure(self.sealed, self.references["sealed"])
        found: dict[str, float] = {}
        for name, sign, key in (("loss", 1, "losses"), ("first_choice", -1, "hits")):
            gain, whole = sign * (base[key] - file.found[key]), sign * (self.base[key] - self.tuned[key])
            low, high = evaluate.interval(gain, whole)
            found |= {name: float(gain.sum() / whole.sum()), f"{name}_low": low, f"{name}_high": high}
        return found


def _file(name: str, kind: str, how: How, plan: Plan) -> File:
    return File(name, kind, {n: Type[t] for n, t in plan.types.items()}, how, plan.size_bytes, plan.kl)


def _lab(carry: Path, work: Path, model: str, task: str, device: str) -> Lab:
    from edgelora.weights import Checkpoint, Merged

    folder = work / model
    for file in (carry / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    base = Checkpoint(folder)
    return Lab(folder, {"tuned": Merged(folder, work / task, "16bit"), "base": base} if model == "smollm2" else {"tuned": base}, device)


def _spread(rows: Sequence[Encoded], most: int) -> list[Encoded]:
    return list(rows) if len(rows) <= most else [rows[i * len(rows) // most] for i in range(most)]


def against(file: File, rivals: Sequence[File]) -> dict[str, Any]:
    """A file beside the best rivals of its size: the least KL, and the least loss; ratios and differences with paired intervals."""
    near, sure = (min(rivals, key=lambda rival: getattr(rival, key)) for key in ("kl", "loss"))
    low, high = evaluate.interval(file.found["nats"], near.found["nats"])
    difference = file.found["losses"] - sure.found["losses"]
    loss_low, loss_high = evaluate.interval(difference, file.found["tokens"])
    return {
        "least_kl": near.row(), "kl_ratio": file.kl / near.kl, "kl_ratio_low": low, "kl_ratio_high": high,
        "least_loss": sure.row(), "loss_difference": float(difference.sum() / file.found["tokens"].sum()),
        "loss_difference_low": loss_low, "loss_difference_high": loss_high,
    }  # fmt: skip


def study(given: argparse.Namespace, task: str, pool: Pool, place: Path, until: float) -> tuple[Study, dict[str, Any], list[File]]:
    """Everything that torch measures of one task; the document, and the files that llama.cpp shall run."""
    one = Study(given, task, pool, place, until)
    one.prepare()
    rivals = one.rivals()
    one.round("tuned", [file for file in rivals if file.how is IMATRIX], PLANS)
    one.round("tuned", rivals, VARIANTS)
    smallest = min(file.size for file in rivals if file.kind == "stock")
    q8 = one.files.bytes(dict.fromkeys(one.lab.matrices, Type.Q8_0))
    budgets = range(-(-smallest // (STEP * MB)) * STEP, q8 // MB + 1, STEP)
    plans = [file for how in PLANS for file in one.plans(how, budgets, "plan")]
    variants = [file for how in VARIANTS for file in one.plans(how, budgets[:: max(1, len(budgets) // 4)], "variant")]
    plans = one.judge(plans)
    rivals = one.judge(sorted(rivals, key=lambda file: (RIVALS.index(file.kind), "embedding" in file.name, file.how is PLAIN)))
    variants = one.judge(variants)
    table, selected = [], []
    for budget in budgets:
        planned = [file for file in plans if file.name.startswith(f"{budget} MB,")]
        stock, control, uniform = ([f for f in rivals if f.kind == kind and f.size <= ROOM * budget * MB] for kind in RIVALS)
        if not planned or not stock:
            continue
        plan, first = one.chosen(planned, budget)
        row = {"budget_bytes": budget * MB, "plan": plan.row(), "first": first.row(), "stock": against(plan, stock)}
        row |= {kind: against(plan, group) for kind, group in (("control", control), ("uniform", uniform)) if group}
        best = [min(group, key=lambda file: file.kl) for group in (stock, control) if group]
        selected += [plan, *best]
        table.append((row, plan, best))
        print(_line(task, row), flush=True)
    if "base" in one.lab.checkpoints:
        one.round("base", [file for _, plan, best in table for file in (plan, *best)])
        for row, plan, best in table:
            row["kept"] = {file.kind: one.kept(file) for file in (plan, *best)}
    document = {
        "task": task, "model": given.model, "sealed_rows": len(one.sealed), "valid_rows": len(one.valid),
        "answer_tokens": int(one.tuned["tokens"].sum()), "reference_loss": float(one.tuned["losses"].sum() / one.tuned["tokens"].sum()),
        "untuned_loss": float(one.base["losses"].sum() / one.base["tokens"].sum()),
        "first_choice": float(one.tuned["hits"].sum() / one.tuned["tokens"].sum()),
        "rows_right": float((one.tuned["hits"] == one.tuned["tokens"]).mean()),
        "budgets": [row for row, _, _ in table], "files": [file.row() for file in (*plans, *variants, *rivals)],
        "plans": {file.name: {n: t.name for n, t in file.types.items()} for file in selected if file.kind == "plan"},
    }  # fmt: skip
    one.files.forget()
    return one, document, list({id(file): file for file in selected}.values())


def real(one: Study, files: Sequence[File], seconds: float) -> dict[str, File]:
    """The files in llama.cpp, on some of the sealed rows, by name; those that were done in time."""
    rows = _spread(one.sealed, max(8, int(IN_LLAMA_CPP * len(one.sealed))))
    one.lab.show("tuned")
    where = one.place / "reference"
    where.mkdir()
    for i, row in enumerate(rows):
        ((_, p, _),) = one.lab.predictions([row])
        np.save(where / f"{i}.npy", p.cpu().numpy())
    jobs = [(one.files.write("tuned", file.types, file.how, one.place / f"file{i}"), rows, where) for i, file in enumerate(files)]
    one.say(f"{len(jobs)} files written")
    found = {}
    for number, measured in one.pool(_numbered, [(i, *job) for i, job in enumerate(jobs)], seconds):
        found[files[number].name] = file = replace(files[number], found=measured)
        print(f"llama.cpp: {file.kind:8} {file.size / MB:7.2f} MB  KL {file.kl:.4f}  loss {file.loss:.4f}  {file.name}", flush=True)
    return found


def _numbered(number: int, *job: Any) -> tuple[int, dict[str, np.ndarray]]:
    return number, in_llama_cpp(*job)


def _line(task: str, row: Mapping[str, Any]) -> str:
    text = f"{task} {row['budget_bytes'] / MB:.0f} MB: KL {row['plan']['kl']:.4f} loss {row['plan']['loss']:.4f} ({row['plan']['name']})"
    text += f", {row['plan']['kl'] / row['first']['kl']:.2f} of what the first plan has"
    for kind in RIVALS:
        if kind in row:
            r = row[kind]
            text += (
                f"; {r['kl_ratio']:.2f} [{r['kl_ratio_low']:.2f}, {r['kl_ratio_high']:.2f}] x {kind} {r['least_kl']['kl']:.4f} "
                f"({r['least_kl']['name']}, {r['least_kl']['size_bytes'] / MB:.1f} MB), loss {r['loss_difference']:+.4f} "
                f"[{r['loss_difference_low']:+.4f}, {r['loss_difference_high']:+.4f}] of {r['least_loss']['name']}"
            )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("carry", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", action="append", choices=list(ROWS))
    parser.add_argument("--seconds", type=float, default=300.0, help="of all tasks together; what does not fit is left out and said")
    parser.add_argument("--place", type=Path, help="a folder in memory for packed matrices, some 10 GB; default a temporary one")
    parser.add_argument("--fewer", type=int, default=1, help="a fraction of the rows, to try the script")
    given = parser.parse_args()
    import torch

    given.device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    tasks = given.task or list(ROWS)
    given.out.mkdir(parents=True, exist_ok=True)
    pool = Pool(os.cpu_count() or 1)
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(dir=given.place) as place:
        studies = []
        for number, task in enumerate(tasks):
            until = began + given.seconds * (0.72 * (number + 1) / len(tasks))
            studies.append(study(given, task, pool, Path(place) / task, until))
            _save(given, studies[-1][1])
        for number, (one, document, files) in enumerate(studies):
            one.until = began + given.seconds
            measured = real(one, files, one.left() / (len(studies) - number))
            for row in document["budgets"]:
                plan = measured.get(row["plan"]["name"])
                rivals = {kind: measured.get(row[kind]["least_kl"]["name"]) for kind in ("stock", "control") if kind in row}
                row["llama_cpp"] = {kind: against(plan, [rival]) for kind, rival in rivals.items() if plan and rival}
            document["llama_cpp"] = [file.row() for file in measured.values()]
            _save(given, document)
    pool.close()


def headline(document: Mapping[str, Any]) -> list[list[str]]:
    """Ratios of KL at every budget, and what the true answers lose at most."""

    def ratios(of: Callable[[Mapping[str, Any]], float | None]) -> str:
        found = {row["budget_bytes"] // MB: of(row) for row in document["budgets"]}
        return ", ".join(f"{budget} MB {ratio:.2f}" for budget, ratio in found.items() if ratio is not None)

    lines = {
        f"KL of the plan over that of the best stock recipe, {document['model']}, {document['task']}": ratios(lambda r: r["stock"]["kl_ratio"]),
        "over the best uniform types with the same importance": ratios(lambda r: r["control"]["kl_ratio"] if "control" in r else None),
        "and compensated like the plan": ratios(lambda r: r["uniform"]["kl_ratio"] if "uniform" in r else None),
        "over the plan before its first file was measured": ratios(lambda r: r["plan"]["kl"] / r["first"]["kl"]),
        "in llama.cpp, over the best stock recipe": ratios(lambda r: r["llama_cpp"]["stock"]["kl_ratio"] if r.get("llama_cpp") else None),
        "loss of the true answers against the best rival": f"at most {max(r['stock']['loss_difference'] for r in document['budgets']):+.4f} nats a token",
        "against": f"{sum(file['kind'] == 'stock' for file in document['files'])} stock files",
    }  # fmt: skip
    return [[what, figure] for what, figure in lines.items() if figure]


def _save(given: argparse.Namespace, document: Mapping[str, Any]) -> None:
    """A result but for its name and commit: the GPU machine has the files alone."""
    trained = {name: given.work / f"{name}.json" for name in (given.model, document["task"])}
    head = {
        "command": f"python bench/size_plan.py CARRY WORK OUT --model {given.model} --task {document['task']} --seconds {given.seconds:.0f}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": artifact.versions_of("torch", "transformers", "gguf", "llama-cpp-python"),
        "headline": headline(document),
        "models": {name: json.loads(file.read_text(encoding="utf-8")) for name, file in trained.items() if file.is_file()},
    }
    (given.out / f"{given.model}-{document['task']}.json").write_text(json.dumps(head | dict(document)), encoding="utf-8")


if __name__ == "__main__":
    main()
