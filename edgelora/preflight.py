"""Before the first second of training: can every later stage work here? Everything that is missing, said at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edgelora import check, doctor, machine, models, outline
from edgelora import estimate as estimates
from edgelora import recipe as recipes
from edgelora.data import chat
from edgelora.data.split import Dataset
from edgelora.errors import EdgeloraError
from edgelora.export import PLANNING, sizes
from edgelora.export import stage as exports
from edgelora.export.verify import PROBES
from edgelora.outline import Outline
from edgelora.report import figures
from edgelora.runtime import runtime
from edgelora.train import adapter

TRAINING = ("torch", "transformers", "peft", "accelerate", "safetensors", "gguf", "bitsandbytes")
_PARITY_CHARACTERS = 20_000  # of the training rows, compared token by token with llama.cpp


def packages(recipe: recipes.Recipe) -> None:
    """Formats, types, budgets and every package that a later stage imports."""
    needed = dict.fromkeys(TRAINING)
    problems: list[EdgeloraError] = []
    for section in recipe.exports:
        needed |= dict.fromkeys(_attempt(problems, partial(_needs, section)) or ())
    _attempt(problems, lambda: check.parse(recipe.budgets))
    _attempt(problems, lambda: doctor.require(tuple(needed)))
    _raise(problems)


def resources(recipe: recipes.Recipe, base: models.Base, dataset: Dataset, gpus: int = 1) -> None:
    """Architecture, memory (of each of `gpus`), disk, chat template and token parity, once the base is on this disk."""
    problems: list[EdgeloraError] = []
    for section in recipe.exports:
        _attempt(problems, partial(_exportable, section, base, recipe.name))
    _raise(problems)
    shape = outline.of(str(base.folder), Path())
    trained = adapter.parameters(shape.shapes, recipe.train)
    tokenizer = models.open_tokenizer(base.folder)
    rows = _attempt(problems, lambda: [ids for _, ids in chat.encode_all(tokenizer, dataset.train, recipe.train.max_tokens)])
    if rows:
        _attempt(problems, lambda: _memory(recipe, shape, [len(row.ids) for row in rows], gpus))
    _attempt(problems, lambda: _disk(recipe, shape, trained))
    if base.gguf is not None:
        text = "\n".join(row.question + "\n" + row.answer for row in dataset.train)[:_PARITY_CHARACTERS]
        _attempt(problems, lambda: token_parity(tokenizer, base.gguf, [*PROBES, text]))
    _raise(problems)


def token_parity(tokenizer: Any, gguf: Path | None, texts: list[str]) -> None:
    """EdgeloraError when llama.cpp, reading the GGUF base itself, splits a text differently from what training would see."""
    if gguf is None or not doctor.importable("llama_cpp"):
        return
    from edgelora.runtime import llama_cpp

    with llama_cpp.open_vocabulary(gguf) as vocabulary:
        for text in texts:
            if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != vocabulary.tokenize(text):
                raise EdgeloraError(
                    f"{gguf.name}: its tokenizer as training would see it differs from llama.cpp's on {text[:40]!r}",
                    "the phone would see other tokens; use the model's safetensors as base",
                )


def _needs(section: recipes.Export) -> tuple[str, ...]:
    """Modules that writing and running this format import; UsageError for a format or type that does not exist."""
    module = exports.format_module(exports.resolve(section).format)
    exports.require_environments(section)
    return (*module.REQUIRES, *runtime(module.RUNTIME).REQUIRES, *(PLANNING if section.planned else ()))


def _exportable(section: recipes.Export, base: models.Base, name: str) -> None:
    """Unsupported or ModelError when the base's architecture or its shapes cannot be written in this format and type, or not on this machine."""
    exports.predict(base.folder, section, name)
    needed, free = exports.estimate(base.folder, section).get("peak_bytes", 0), machine.available_memory_bytes()
    if needed > free:
        raise EdgeloraError(
            f"writing {section.format} needs about {figures.size(needed)} of memory (an estimate), {figures.size(free)} are free",
            "close other programs, or export to gguf, which reads a tensor at a time",
        )


def _memory(recipe: recipes.Recipe, base: Outline, lengths: list[int], gpus: int) -> None:
    from edgelora.train import estimate, room

    device = replace(estimate.here(recipe.train.dtype, recipe.threads), processes=gpus)
    room.require(base, recipe.train, lengths, room.chosen(base, recipe.train, lengths, device))


def _disk(recipe: recipes.Recipe, base: Outline, trained: int) -> None:
    needed = estimates.disk_bytes(recipe, base, [sizes.predict(base, section, recipe.name, trained) for section in recipe.exports])
    place = recipe.out_dir
    while not place.exists():
        place = place.absolute().parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise EdgeloraError(
            f"the run writes about {figures.size(needed)} (an estimate), {figures.size(free)} are free",
            "free some space, or choose another --out",
        )


def _attempt(problems: list[EdgeloraError], step: Callable[[], Any]) -> Any:
    try:
        return step()
    except EdgeloraError as error:
        problems.append(error)
        return None


def _raise(problems: list[EdgeloraError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        kind = problems[0] if all(p.exit_code == problems[0].exit_code for p in problems) else EdgeloraError("")
        lines = "\n".join(f"  {p.message}\n    {p.hint}" if p.hint else f"  {p.message}" for p in problems)
        raise type(kind)(f"{len(problems)} things stand in the way of this run:\n{lines}", "mend each, then run the same command again")
