"""`edgelora estimate`: memory, time, money, disk and sizes of every step of a recipe, on a list of graphics cards and on this machine.

Everything here is an estimate and says so. Training: `train.estimate`. What comes after it (merge, export, evaluation) runs on the
processor, at the rates of an AMD EPYC's cores, and is known less well: within a factor of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from edgelora import doctor
from edgelora import recipe as recipes
from edgelora.data.lengths import Lengths
from edgelora.data.split import Dataset
from edgelora.errors import ModelError
from edgelora.export import PLANNERS, sizes, stage
from edgelora.gpus import Gpu, Table
from edgelora.outline import Outline
from edgelora.train import adapter, room
from edgelora.train import estimate as training
from edgelora.train.estimate import Device, Estimate

# Seconds for any model, and for a billion weights on one core: reading, merging, writing; running the file and the model it is compared with.
_MERGE, _WRITE, _COMPARE, _JUDGE = (15.0, 30.0), (5.0, 10.0), (10.0, 60.0), (60.0, 300.0)
# llama.cpp's quantizers, seconds for a billion weights on one core, by the type most matrices get.
_QUANTIZE = {"q4_0": 1.0, "q8_0": 3.3, "q6_k": 28.0, "q3_k": 50.0, "q4_k": 67.0, "q5_k": 67.0, "iq4": 200.0}
_OTHERS_QUANTIZE = 100.0
_PROCESS = 0.5e9  # bytes of a process with its libraries


def estimate(
    recipe: recipes.Recipe, base: Outline, lengths: Lengths, table: Table, gpus: Sequence[Gpu], here: Estimate | None = None
) -> dict[str, Any]:
    """The document that `edgelora estimate` prints. `here` is this machine's own row, predicted or probed."""
    trained = adapter.parameters(base.shapes, recipe.train)
    files = [sizes.predict(base, section, recipe.name, trained) for section in recipe.exports]
    rows = []
    for gpu in gpus:
        predicted = training.training(base, recipe.train, lengths.train, gpu.device, lengths.valid)
        after = later(recipe, base, gpu.cpus, files)
        rows.append(
            _row(predicted, after, gpu.dollars, table.yen_a_dollar)
            | {"gpu": gpu.key, "price": gpu.price}
            | _advice(recipe, base, lengths, gpu.device, predicted)
        )
    if here is not None:
        from edgelora import machine

        rows.append(
            _row(here, later(recipe, base, machine.cores(), files), None, table.yen_a_dollar)
            | {"gpu": None}
            | _advice(recipe, base, lengths, here.device, here)
        )
    return {
        "estimate": True,
        "name": recipe.name,
        "base": base.name,
        "base_known_from": base.known_from,
        "total_parameters": base.parameters,
        "trained_parameters": trained,
        "trained_share": trained / base.parameters,
        "rows": len(lengths.train),
        "rows_counted": lengths.counted,
        "left_out": lengths.left_out,
        "tokens": lengths.tokens,
        "epochs": recipe.train.epochs,
        "devices": rows,
        "files": files,
        "disk_bytes": disk_bytes(recipe, base, files),
        "full_finetune_bytes": training.full_finetune_bytes(base.parameters),
        "yen_a_dollar": table.yen_a_dollar,
    }


def probed(
    recipe: recipes.Recipe,
    outline: Outline,
    dataset: Dataset,
    lengths: Lengths,
    predicted: Estimate,
    progress: Callable[[float, str], None],
) -> Estimate:
    """This machine's estimate, corrected by twenty real steps on the recipe's own rows. The base is loaded; nothing is kept.

    ModelError for a base that is not here: nothing is fetched; EdgeloraError for a training that does not fit.
    """
    import time

    import torch

    from edgelora import machine, models
    from edgelora.data import chat
    from edgelora.train import attention, load, probe

    if not outline.here:
        raise ModelError(f"a probe trains {outline.name}, which is not on this machine", "download it first, or leave --probe out")
    room.require(outline, recipe.train, lengths.train, predicted.device, lengths.valid)
    torch.set_num_threads(recipe.threads or machine.cores())
    base = models.open_base(recipe.base, recipe.folder, recipe.out_dir)
    tokenizer = models.open_tokenizer(base.folder)
    rows, valid = (
        [ids for _, ids in chat.encode_all(tokenizer, part, recipe.train.max_tokens)] for part in (dataset.train, dataset.selecting)
    )
    begun = time.monotonic()
    progress(0.1, "loading the base")
    dtype = load.arithmetic(recipe.train.dtype)
    attention.register()
    model = adapter.attach(load.load_base(base.folder, recipe.train.method, dtype, attention.NAME), recipe.train)
    progress(0.3, f"{probe.STEPS} steps")
    found = probe.probe(recipe, model, rows, valid, dtype, begun)
    return found.correct(predicted, -(-len(valid) // predicted.cut.rows), math.ceil(recipe.train.epochs))


def later(recipe: recipes.Recipe, base: Outline, cores: int, files: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps after the training: name, seconds on so many processor cores, and memory (bytes). `files` are the rows of `sizes`."""
    billions = base.parameters / 1e9
    cores = min(cores, 8)  # more gain little: reading and writing stay

    def took(cost: tuple[float, float]) -> float:
        return cost[0] + cost[1] * billions / cores

    # The model that a file is compared with runs a layer at a time in fp32, beside its embedding and its head (export.reference).
    streamed = _PROCESS + 8 * base.linear / int(base.config["num_hidden_layers"]) + 4.0 * (base.parameters - base.linear)
    steps = []
    sections = [stage.resolve(section) for section in recipe.exports]
    if not all(stage.format_module(section.format).MERGES for section in sections):
        steps.append({"step": "merge", "seconds": took(_MERGE) + took(_COMPARE), "peak_bytes": round(streamed)})
    largest = max((row["size_bytes"] or 2 * base.parameters for row in files), default=0)
    for section in sections:
        module = stage.format_module(section.format)
        peak = streamed + largest  # the file is open beside it
        if hasattr(module, "estimate_of"):  # on one core
            kind = section.type or doctor.load(PLANNERS[section.format]).STANDS_FOR
            weighed = section.importance is not False and hasattr(module, "gains_of")
            rounded = weighed and module.gains_of(base.config, kind, section.exporter)
            own = module.estimate_of(base.config, base.shapes, kind, rounded)
            seconds, peak = own["seconds"], max(peak, own["peak_bytes"])
        else:
            seconds = next((s for name, s in _QUANTIZE.items() if str(section.type).startswith(name)), _OTHERS_QUANTIZE) * billions / cores
        name = f"export {section.format} {section.type or section.max_size or section.max_kl}"
        # twice: the untuned base is written beside it, to be compared
        steps.append({"step": name, "seconds": 2 * (seconds + took(_WRITE) + took(_COMPARE)), "peak_bytes": round(peak)})
    judge = {"step": "evaluate and bench", "seconds": len(sections) * took(_JUDGE), "peak_bytes": round(_PROCESS + largest)}
    return [*steps, judge]


def disk_bytes(recipe: recipes.Recipe, base: Outline, files: Sequence[dict[str, Any]]) -> int:
    """What a run holds on the disk at most: a base that has to be fetched or written out, the adapter, and first two checkpoints with their
    optimizer, then the merged model, where a format wants one, and every file twice (the untuned base's beside the tuned). An exporter of
    phones' formats reads weights on a grid of 4 bits in 32."""
    sixteen = 2 * base.parameters
    trained = adapter.parameters(base.shapes, recipe.train)
    bases = (base.folder is None) + (recipe.train.variant == "pissa")
    sections = [stage.resolve(section) for section in recipe.exports]
    modules = [stage.format_module(section.format) for section in sections]
    merged = sixteen * (not all(module.MERGES for module in modules))
    merged += 2 * sixteen * any(hasattr(m, "PHONE") and m.gains_of(base.config, s.type) for m, s in zip(modules, sections, strict=True))
    written = sum(2 * (row["size_bytes"] or sixteen) for row in files)
    return bases * sixteen + 4 * trained + max(2 * 12 * trained, merged + written)


def _advice(recipe: recipes.Recipe, base: Outline, lengths: Lengths, device: Device, predicted: Estimate) -> dict[str, str]:
    return {} if predicted.fits else {"advice": room.would_fit(base, recipe.train, lengths.train, device)}


def _row(predicted: Estimate, after: Sequence[dict[str, Any]], dollars: float | None, yen: float) -> dict[str, Any]:
    """Figures of one device; what does not fit has no time and no price."""
    row: dict[str, Any] = {
        "device": predicted.device.name,
        "memory_bytes": round(predicted.device.memory_bytes),
        "fits": predicted.fits,
        "needed_bytes": round(predicted.needed_bytes),
        "parts": {name: round(value) for name, value in predicted.parts.items()},
        "rows_at_once": predicted.cut.rows,
        "recomputed_layers": predicted.cut.recompute,
        "kernels": predicted.kernels,
        "measured": "measured" in predicted.parts,
        **predicted.figures(),
        "seconds": predicted.seconds,
    }
    if not predicted.fits:
        return row
    whole = predicted.seconds + sum(step["seconds"] for step in after)
    row |= {
        "tok_per_s": predicted.tok_per_s,
        "steps": [{"step": "fine-tune", "seconds": predicted.seconds, "peak_bytes": round(predicted.needed_bytes)}, *after],
        "whole_s": whole,
    }
    if dollars is not None:
        for step in row["steps"]:
            step["dollars"] = step["seconds"] / 3600 * dollars
        row["dollars"] = row["steps"][0]["dollars"]
        row["whole_dollars"] = whole / 3600 * dollars
        row |= {"yen": row["dollars"] * yen, "whole_yen": row["whole_dollars"] * yen, "dollars_an_hour": dollars}
    return row
