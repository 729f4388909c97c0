"""The recipe: one YAML file, and the only home of defaults.

`load` reports every problem of a file at once, each with its key and what to write instead.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgelora import settings
from edgelora.errors import RecipeError
from edgelora.export import PLANNERS

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(B|kB|KB|MB|GB|KiB|MiB|GiB)\s*$")
_UNITS = {"B": 1, "kB": 1000, "KB": 1000, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


Where = Literal["all", "answers", "none"]


@dataclass(frozen=True)
class Clean:
    """What is mended in the rows, in this order: in `all` messages, in `answers` only, or in `none`. Everything is counted and listed."""

    mojibake: Where = "all"  # text decoded with a wrong encoding ("Ã©"), by ftfy
    controls: Where = "all"  # control and invisible characters, odd spaces, line ends
    tokens: Where = "all"  # stray tokens of chat templates (<|im_end|>, ###eos_token###) and Alpaca's wrapper
    html: Where = "all"  # tags and entities
    ruby: Where = "all"  # readings and notes of Aozora Bunko: 《》 and ［＃］
    markup: Where = "all"  # links, headings and roles of wikis and AsciiDoc
    width: Where = "all"  # half-width kana, full-width letters and digits
    joins: Where = "all"  # spaces between Japanese words that joined lines left
    whitespace: Where = "all"  # runs of spaces, trailing spaces, blank lines
    variants: Where = "answers"  # Japanese notation variants, by majority; users type them all, so questions keep them
    spelling: Where = "answers"  # British and American English, by majority
    least: int = 5  # occurrences below which a majority decides nothing
    majority: float = 0.7  # share of the occurrences that makes one
    dictionary: Mapping[str, str] = field(default_factory=dict)  # your own: spelling -> the one to use
    keep: tuple[str, ...] = ()  # spellings that stay as they are
    typos: Literal["report", "fix", "none"] = "report"  # English words one slip away from a common one
    personal: Literal["report", "remove", "none"] = "report"  # e-mail, phone and card numbers, postal codes, My Numbers
    duplicates: Literal["drop", "none"] = "drop"  # rows whose question and answer were seen, whatever case and punctuation
    near: Literal["report", "drop", "none"] = "report"  # rows that are nearly the same, by MinHash
    similarity: float = 0.8  # Jaccard similarity of five-character pieces above which rows are nearly the same


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a data file is read. What is None is found out, and shown."""

    format: Literal["csv", "tsv", "xlsx", "json", "jsonl", "parquet", "text"] | None = None  # of the file
    layout: (
        Literal["messages", "sharegpt", "tree", "thread", "squad", "instances", "choices", "alpaca", "qna-maker", "pairs", "text"] | None
    ) = None  # what its columns mean
    encoding: str | None = None  # for instance cp932. A byte order mark is honoured in any case
    delimiter: str | None = None  # one character
    header: int | None = None  # line of the column names, counted from 1; 0: there is none
    sheet: str | None = None  # of a workbook
    question: str | None = None  # column names; found by themselves where they are usual ones
    answer: str | None = None
    context: str | None = None  # column that is put below the question
    group: str | None = None  # column whose equal values never straddle two sets
    system: str | None = None  # system message put before every conversation


@dataclass(frozen=True, kw_only=True)
class Data(Reading):
    """Where the rows are. Paths are relative to the recipe. Held-out sets report; only `valid` selects."""

    train: str
    valid: str | None = None  # a file; without it `valid_share` of the training rows, by hash
    sealed: str | None = None  # a file; without it `sealed_share` of the training rows, by hash
    held_out: Mapping[str, str] = field(default_factory=dict)  # further sets to report on: name -> file
    task: Literal["chat", "classify"] = "chat"
    valid_share: float = 0.1
    sealed_share: float = 0.1
    clean: Clean = field(default_factory=Clean)
    licence: str | None = None  # of the rows, e.g. cc-by-4.0, and whom it wants named: for the model card
    attribution: str | None = None


@dataclass(frozen=True)
class Train:
    """LoRA: W' = W + (alpha / r) B A, trained on a frozen base (`qlora`: held in 4-bit NF4)."""

    method: Literal["qlora", "lora"] = "qlora"
    variant: Literal["plain", "rslora", "dora", "pissa"] = "plain"  # see edgelora/train/adapter.py
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    lr: float = 2e-4
    lora_plus: float | None = None  # learning rate of B, in multiples of `lr` (LoRA+; 2 to 16 is usual). None: the same
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05  # share of all steps
    epochs: float = 3.0
    batch: int = 4  # rows a step
    accumulate: int = 4  # steps added up before the weights move; several GPUs share batch x accumulate rows
    max_tokens: int = 512  # longer rows are an error naming the row
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the arithmetic
    patience: int = 2  # epochs without a better `valid` loss before stopping; 0: never
    checkpointing: bool = False  # recompute activations: less memory, more time
    shard: Literal["auto", "always", "never"] = "auto"  # divide the base among several GPUs (FSDP). auto: when one cannot hold it all


@dataclass(frozen=True)
class Merge:
    base: Literal["auto", "nf4", "16bit"] = "auto"  # auto: measure both on `valid`, keep the better


@dataclass(frozen=True)
class Export:
    """One file to write. `type`: of GGUF a llama.cpp type (q4_k_m, q8_0, f16, ...); of ONNX int4, int4-mixed or int8."""

    format: str
    type: str | None = None  # None: the format's own default
    importance: bool | None = None  # weigh rounding errors by the training rows. None: for every type that gains from it
    tensor_types: tuple[str, ...] = ()  # PATTERN=TYPE: tensors that get another type (GGUF), e.g. ffn_down=q6_k
    block: int | None = None  # weights that share a scale (ONNX): 16, 32, 64 or 128. None: 32 where the model's shapes allow it
    activations: Literal["int8", "fp32"] | None = None  # what a matrix's inputs are rounded to (ONNX). None: int8, the fastest
    exporter: Literal["builder", "optimum"] | None = None  # of ONNX: onnxruntime-genai's model builder (None too), or Hugging Face's
    target: Literal["web"] | None = None  # web: beside it a folder that browsers load, with a page to chat (ONNX)
    max_size: str | None = None  # e.g. 90MB, instead of a type: the best type for every tensor within that size (GGUF, ONNX)
    max_kl: float | None = None  # or: the smallest file that is measured to stay that close to the trained model, nats a token
    min_score: float | None = None  # or: the smallest file that was measured to score that on `valid`, above 0 and at most 1

    @property
    def planned(self) -> bool:
        """Whether a plan chooses the types, to keep a size, a loss or a score."""
        return any(limit is not None for limit in (self.max_size, self.max_kl, self.min_score))


@dataclass(frozen=True)
class Importance:
    """The importance matrix: which columns of each weight matter on `train` rows, so that rounding spares them."""

    rows: int = 128  # of `train`, at most
    answer_weight: int = 4  # a token of an answer counts as many times as one of its question
    plan_rows: int = 64  # of `train`, at most, run forwards and backwards for a size plan


@dataclass(frozen=True)
class Evaluate:
    rows: int = 60  # at most, of each set
    verify_rows: int = 16  # of `valid`, on which an exported file is compared with the trained model
    max_kl: float = 0.6  # an exported file further away (nats a token) than this is refused
    answers: int = 5  # shown side by side in the report
    max_new_tokens: int = 80


@dataclass(frozen=True)
class Bench:
    prompt_tokens: tuple[int, ...] = (32, 128)
    decode_tokens: int = 32
    repeats: int = 5
    estimate: tuple[str, ...] = ()  # devices of edgelora/devices.yaml whose speed the report estimates, or all


@dataclass(frozen=True)
class Recipe:
    name: str
    base: str
    data: Data
    train: Train = field(default_factory=Train)
    merge: Merge = field(default_factory=Merge)
    exports: tuple[Export, ...] = (Export("gguf"),)
    importance: Importance = field(default_factory=Importance)
    evaluate: Evaluate = field(default_factory=Evaluate)
    bench: Bench = field(default_factory=Bench)
    budgets: Mapping[str, Any] = field(default_factory=dict)  # limits that `check` enforces
    out: str | None = None  # folder of the results, relative to where the command runs; default runs/<name>
    seed: int = 0
    threads: int | None = None  # None: as many as there are cores
    folder: Path = field(default=Path(), metadata={"internal": True})  # where the recipe lies

    @property
    def out_dir(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    def file(self, name: str) -> Path:
        """A path of the recipe, resolved against the recipe's own folder."""
        return self.folder / name


def locate(path: Path) -> Path:
    """`path` itself, or the recipe of that bare name which comes with the package."""
    if path.exists() or path.parent != Path():
        return path
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parent / "recipes"):  # in an installed wheel, in a checkout
        own = folder / f"{path.name.removesuffix('.yaml')}.yaml"
        if own.exists():
            return own
    return path


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``key.sub=value`` overrides; RecipeError lists every problem found."""
    values = settings.read(path)
    for item in overrides:
        settings.override(values, item)
    values.setdefault("name", path.stem)
    return parse(values, folder=path.parent, source=str(path))


def load_budgets(path: Path) -> dict[str, Any]:
    """The budgets of a YAML file that holds them alone, or under `budgets:` as a recipe does. RecipeError when it is neither."""
    values = settings.read(path)
    budgets = values.get("budgets", values if "base" not in values else {})
    if not isinstance(budgets, dict) or not budgets:
        raise RecipeError(f"{path} names no budgets", "for instance `size: 130MB` on a line of its own")
    return {str(name): value for name, value in budgets.items()}


def load_mapping(path: Path) -> dict[str, str]:
    """A YAML file of words and what to write instead. RecipeError when it is something else."""
    values = settings.read(path)
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in values.items()):
        raise RecipeError(f"{path}: every line should be one word and the one to use", "for instance サーバ: サーバー")
    return values


def parse(values: Mapping[str, Any], *, folder: Path = Path(), source: str = "the recipe") -> Recipe:
    """Build a Recipe from plain values; RecipeError lists every problem found."""
    problems: list[str] = []
    recipe = settings.build(Recipe, values, "", problems)
    if recipe is not None:
        recipe = dataclasses.replace(recipe, folder=folder)
        problems += _limits(recipe)
    if problems or recipe is None:
        noun = "problem" if len(problems) == 1 else "problems"
        raise RecipeError(
            f"{source} has {len(problems)} {noun}:\n" + "\n".join(f"  {p}" for p in problems), "mend each line above and run again"
        )
    return recipe


def as_dict(section: Any) -> dict[str, Any]:
    """A section as plain JSON values, without the recipe's folder: two machines must agree on it."""
    values = dataclasses.asdict(section)
    values.pop("folder", None)
    return typing.cast("dict[str, Any]", settings.plain(values))


def size_bytes(text: str | int) -> int:
    """'300MB' -> 300000000, '1MiB' -> 1048576; ValueError names what was wrong."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.match(str(text))
    if not match:
        raise ValueError(f"{text!r} is not a size such as 300MB or 286MiB")
    return round(float(match[1]) * _UNITS[match[2]])


def _limits(recipe: Recipe) -> list[str]:
    """What types alone cannot say."""
    train, data = recipe.train, recipe.data
    rules = [
        (re.fullmatch(r"[\w.-]+", recipe.name) is not None, f"name: {recipe.name!r} should be letters, digits, '.', '_' or '-'"),
        (train.r >= 1, f"train.r: {train.r} should be 1 or more (8 to 64 is usual)"),
        (bool(train.targets), "train.targets: should name at least one layer, or be all-linear"),
        (train.lora_plus is None or train.lora_plus >= 1, f"train.lora_plus: {train.lora_plus} should be 1 or more (2 to 16 is usual)"),
        (
            train.method == "qlora" or recipe.merge.base != "nf4",
            "merge.base: nf4 is what method qlora trains on; with method lora write auto or 16bit",
        ),
        (train.alpha > 0, f"train.alpha: {train.alpha} should be above 0 (r or 2 r is usual)"),
        (0 <= train.dropout < 1, f"train.dropout: {train.dropout} should be at least 0 and below 1"),
        (train.lr > 0, f"train.lr: {train.lr} should be above 0 (1e-4 to 5e-4 is usual)"),
        (train.epochs > 0, f"train.epochs: {train.epochs} should be above 0"),
        (train.batch >= 1, f"train.batch: {train.batch} should be 1 or more"),
        (train.accumulate >= 1, f"train.accumulate: {train.accumulate} should be 1 or more"),
        (train.max_tokens >= 8, f"train.max_tokens: {train.max_tokens} should be 8 or more"),
        (0 <= train.warmup < 1, f"train.warmup: {train.warmup} should be at least 0 and below 1"),
        (train.patience >= 0, f"train.patience: {train.patience} should be 0 or more"),
        (0 < data.valid_share < 0.5, f"data.valid_share: {data.valid_share} should be above 0 and below 0.5"),
        (0 <= data.sealed_share < 0.5, f"data.sealed_share: {data.sealed_share} should be at least 0 and below 0.5"),
        (data.delimiter is None or len(data.delimiter) == 1, f"data.delimiter: {data.delimiter!r} should be one character"),
        (data.header is None or data.header >= 0, f"data.header: {data.header} should be 0 or more"),
        (data.clean.least >= 1, f"data.clean.least: {data.clean.least} should be 1 or more"),
        (0.5 < data.clean.majority <= 1, f"data.clean.majority: {data.clean.majority} should be above 0.5 and at most 1"),
        (0.5 <= data.clean.similarity < 1, f"data.clean.similarity: {data.clean.similarity} should be at least 0.5 and below 1"),
        (not {"train", "valid", "sealed"} & set(data.held_out), "data.held_out: train, valid and sealed are taken; choose other names"),
        (all(re.fullmatch(r"\w+", name) for name in data.held_out), "data.held_out: a name should be letters, digits or '_'"),
        (len(recipe.exports) == len(set(recipe.exports)), "exports: the same format and type twice"),
        (recipe.importance.rows >= 1, "importance.rows: should be 1 or more"),
        (recipe.importance.plan_rows >= 1, "importance.plan_rows: should be 1 or more"),
        (recipe.importance.answer_weight >= 1, "importance.answer_weight: should be 1 or more"),
        *((budget_problem(section) is None, f"exports: {budget_problem(section)}") for section in recipe.exports),
        (recipe.evaluate.rows >= 1, "evaluate.rows: should be 1 or more"),
        (recipe.evaluate.verify_rows >= 1, "evaluate.verify_rows: should be 1 or more"),
        (recipe.evaluate.max_kl > 0, "evaluate.max_kl: should be above 0"),
        (recipe.bench.repeats >= 3, "bench.repeats: should be 3 or more, or a median means nothing"),
        (
            all(n >= 1 for n in recipe.bench.prompt_tokens) and bool(recipe.bench.prompt_tokens),
            "bench.prompt_tokens: should be one or more counts above 0",
        ),
        (recipe.bench.decode_tokens >= 1, "bench.decode_tokens: should be 1 or more"),
        (recipe.threads is None or recipe.threads >= 1, f"threads: {recipe.threads} should be 1 or more"),
    ]
    return [message for holds, message in rules if not holds]


def budget_problem(section: Export) -> str | None:
    """What is wrong with an export's max_size, max_kl or min_score; None when it asks for none, or in a way that can be served."""
    if not section.planned:
        return None
    if section.format not in PLANNERS:
        return f"{section.format} cannot be planned to a size or loss: name a type, or export to {' or '.join(PLANNERS)}"
    if section.type is not None or section.tensor_types or section.block is not None:
        return "a type and a budget exclude one another: the plan chooses a type for every tensor"
    if section.importance is False:
        return "a plan rounds by what training rows say: leave importance out"
    if section.exporter == "optimum":
        return "optimum's graph cannot be planned to a size or loss: leave the exporter out"
    if sum(limit is not None for limit in (section.max_size, section.max_kl, section.min_score)) > 1:
        return "max_size, max_kl and min_score exclude one another: name one, the others are measured and reported"
    if section.max_kl is not None and section.max_kl <= 0:
        return f"max_kl: {section.max_kl} should be above 0"
    if section.min_score is not None and not 0 < section.min_score <= 1:
        return f"min_score: {section.min_score} should be above 0 and at most 1"
    if section.max_size is not None:
        try:
            size_bytes(section.max_size)
        except ValueError as error:
            return f"max_size: {error}"
    return None
