"""The importance matrix: which columns of each matrix matter, measured on the user's own training rows.

A column whose inputs are large hurts most when its weights are rounded. ggml's quantizers therefore take the mean
square of every column's input and put the rounding where it costs least. llama.cpp measures it on any text
(tools/imatrix); here it is measured on training rows in the model's own chat template, where answers count more.

The file is llama.cpp's: a GGUF with, for every matrix, `NAME.in_sum2` (the sum over tokens of the squared inputs) and
`NAME.counts` (over how many tokens), both float32. `llama-quantize --imatrix` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora import artifact, models
from edgelora import recipe as recipes
from edgelora.artifact import Artifact
from edgelora.data import chat
from edgelora.data.chat import Encoded
from edgelora.errors import ModelError
from edgelora.export import architectures
from edgelora.gguf_header import read_header
from edgelora.progress import Progress

if TYPE_CHECKING:
    import torch

    from edgelora.data.split import Dataset

Importance = Mapping[str, np.ndarray]  # GGUF tensor name -> float32, shape (columns,), mean square of each column's input

FILE = "imatrix.gguf"
_TOKENS_AT_ONCE = 2048  # inputs of one pass: 64 MiB in float32 for a matrix of 8192 columns
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Sums:
    """`squares`: GGUF tensor name -> float64, shape (columns,), sum of weight x input^2; `weight`: the sum of all weights."""

    squares: Mapping[str, np.ndarray]
    weight: int


def measure(
    model: Path,
    key: str,
    section: recipes.Importance,
    dataset: Dataset,
    max_tokens: int,
    out: Path,
    progress: Progress,
    *,
    adapter: Path | None = None,
    prefix: str = "",
) -> Artifact:
    """The importance matrix of a model on rows of `train`; computed once.

    `model` is a Hugging Face folder, `adapter` PEFT's folder if one belongs to it, `key` the content of both.
    """
    return artifact.build(
        out,
        f"{prefix}importance",
        "importance",
        lambda folder: _measure(model, adapter, section, dataset, max_tokens, folder, progress),
        made_from={"model": key, "train": dataset.fingerprint("train")},
        recipe={**recipes.as_dict(section), "max_tokens": max_tokens},
        versions=artifact.versions_of("torch", "transformers", "gguf"),
        rows={"train": "train"},
    )


def _measure(
    model: Path,
    adapter: Path | None,
    section: recipes.Importance,
    dataset: Dataset,
    max_tokens: int,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    tokenizer = models.open_tokenizer(model)
    rows = [ids for _, ids in chat.encode_all(tokenizer, spread(dataset.train, section.rows), max_tokens)]
    opened = open_model(model, adapter)
    sums = collect(opened, rows, section.answer_weight, progress)
    write(folder / FILE, sums, architectures.of(opened.config.model_type).name)
    return {
        "file": FILE,
        "rows": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "answer_tokens": sum(row.n_trained for row in rows),
        "matrices": len(sums.squares),
    }


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` rows, evenly over all of them: files are often sorted by topic."""
    step = max(1.0, len(rows) / count)
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]


def open_model(folder: Path, adapter: Path | None = None) -> Any:
    """The model, with an adapter added to its weights, in bfloat16 on this machine's device: half of what float32 would hold."""
    import torch

    from edgelora.train import load

    model = load.load_base(folder, "lora", torch.bfloat16)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, local_files_only=True).merge_and_unload()
    return model.eval()


def collect(model: Any, rows: Sequence[Encoded], answer_weight: int, progress: Progress) -> Sums:
    """Run `rows` through `model` and add up the squared inputs of every matrix that GGUF stores by rows.

    An answer's token counts `answer_weight` times (a whole number, since llama.cpp stores counts as such). The head's
    input is measured too, under the embedding's name where the two are tied; logits are never computed. Each matrix is
    widened to float32 only while it is used, so memory is that of the model as it is loaded, plus one matrix.

    Raises ModelError for a model that computes NaN or infinite values.
    """
    import torch

    if not rows:
        raise ModelError("an importance matrix needs at least one training row", "raise train.max_tokens or importance.rows")
    names = _matrices(model)
    total = {name: np.zeros(module.in_features) for name, module in names.items()}
    weight = torch.empty(0)

    def add(name: str, inputs: torch.Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        total[name] += (weight @ flat.square_()).double().cpu().numpy()

    hooks = [module.register_forward_pre_hook(_adder(name, add)) for name, module in names.items() if not _is_head(name)]
    hooks += [hook for module in model.modules() if isinstance(module, torch.nn.Linear) for hook in _widened(module)]
    hooks += [m.register_forward_hook(lambda m, i, out: out.float()) for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    head = next(name for name in names if _is_head(name))
    done, tokens = 0, sum(len(row.ids) for row in rows)
    try:
        with torch.inference_mode():
            for batch in _batches(rows):
                progress(done / tokens, f"{tokens:,} tokens of training rows")
                ids, weight = _padded(batch, answer_weight, model.device)
                last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                add(head, last.float().clone())
                done += sum(len(row.ids) for row in batch)
    finally:
        for hook in hooks:
            hook.remove()
    broken = next((name for name, squares in total.items() if not np.isfinite(squares).all()), None)
    if broken:
        raise ModelError(f"the inputs of {broken} are NaN or infinite", "the training diverged: lower the learning rate and train again")
    answers = sum(row.n_trained for row in rows)
    return Sums(total, tokens + (answer_weight - 1) * answers)


def _matrices(model: Any) -> dict[str, Any]:
    """GGUF name -> the torch module that multiplies with it, the head included."""
    import torch

    sources = architectures.of(model.config.model_type).tensors(model.config)
    modules = dict(model.named_modules())
    found = {}
    for name, source in sources.items():
        module = modules.get(source.name.removesuffix(".weight"))
        if name.startswith("blk.") and isinstance(module, torch.nn.Linear) and source.name.endswith(".weight"):
            found[name] = module
    head = "output.weight" if "output.weight" in sources else "token_embd.weight"
    return found | {head: model.get_output_embeddings()}


def _is_head(name: str) -> bool:
    return not name.startswith("blk.")


def _adder(name: str, add: Callable[[str, torch.Tensor], None]) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    # A copy: what follows squares it in place.
    return lambda module, inputs: add(name, inputs[0].float().clone())


def _widened(module: Any) -> tuple[Any, Any]:
    """Hooks that hold a linear layer's weights in float32 while it runs: processors without bfloat16 multiply far faster so."""
    stored = {name: weight.data for name, weight in module.named_parameters(recurse=False)}

    def widen(module: Any, inputs: Any) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.float()

    def narrow(module: Any, inputs: Any, outputs: Any) -> None:
        for name, weight in module.named_parameters(recurse=False):
            weight.data = stored[name]

    return module.register_forward_pre_hook(widen), module.register_forward_hook(narrow, always_call=True)


def _batches(rows: Sequence[Encoded]) -> Iterator[list[Encoded]]:
    """Rows of similar length together, about _TOKENS_AT_ONCE tokens with their padding; one row is never cut."""
    batch: list[Encoded] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and (len(batch) + 1) * len(row.ids) > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _padded(batch: Sequence[Encoded], answer_weight: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, int64, shape (rows, longest), and the tokens' weights, float32, flat. Attention is causal, so padding on the right is not seen."""
    import torch

    longest = max(len(row.ids) for row in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.int64)
    weights = torch.zeros((len(batch), longest))
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        weights[i, : len(row.ids)] = torch.where(torch.tensor(row.trained), float(answer_weight), 1.0)
    return ids.to(device), weights.reshape(-1).to(device)


# ---- the file ----


def write(path: Path, sums: Sums, architecture: str) -> None:
    """Write llama.cpp's GGUF importance matrix. It names the set that was read, not the file it came from."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["training rows"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", sums.weight)
    for name in sorted(sums.squares):
        writer.add_tensor(name + _SUMS, sums.squares[name].astype(np.float32).reshape(1, -1))
        writer.add_tensor(name + _COUNTS, np.array([[sums.weight]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> Importance:
    """The means of a GGUF importance matrix, ours or llama.cpp's; ModelError for a file that is none or is damaged."""
    header = read_header(path)
    places = {tensor.name: tensor for tensor in header.tensors}
    found = {}
    for name, place in places.items():
        if not name.endswith(_SUMS):
            continue
        matrix = name.removesuffix(_SUMS)
        counted = places.get(matrix + _COUNTS)
        if counted is None or {place.type, counted.type} != {"F32"}:
            raise _no_matrix(path, f"{matrix} has no counts, or not in float32")
        if math.prod(counted.shape) != 1:
            raise _no_matrix(path, f"{matrix} is a matrix of experts")
        sums, count = _values(path, place), _values(path, counted)
        if not (np.isfinite(sums).all() and (sums >= 0).all() and np.isfinite(count[0]) and count[0] >= 0):
            raise _no_matrix(path, f"{matrix} holds NaN, infinite or negative values")
        found[matrix] = sums / count[0] if count[0] else np.ones_like(sums)  # as llama-quantize reads them
    if not found:
        raise _no_matrix(path, "it holds no tensor NAME.in_sum2")
    return found


def _values(path: Path, place: Any) -> np.ndarray:
    return np.fromfile(path, "<f4", math.prod(place.shape), offset=place.offset)


def _no_matrix(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path} is no importance matrix that can be used: {why}", "make one with `edgelora run` or llama.cpp's llama-imatrix"
    )
