"""How a trained model's answers depend on each of its matrices: what rounding errors of a matrix will cost.

A small change D of a matrix moves the answers' distribution by half the Fisher information's quadratic form: a token adds
(g^T D x)^2, with x the matrix's input and g the gradient of the log-likelihood at its output. Kept are the two Kronecker
factors of that form (K-FAC; Martens and Grosse 2015), sum x x^T and sum g g^T, on training rows. The labels are drawn from the
model's own predictions, as the Fisher information demands, and only answers are scored. An input counts by its
gradient's square: a token that no answer depends on, as the first of every text with its huge activations, does not
rule the matrix.

    KL per answer token  ~  1/2 tr(G D A D^T)

The gradients' factor is kept as few random combinations S of gradients: S^T S has the same expectation, and a trace
needs no more. The inputs' factor that a cost is taken with is another than the one that rounding is fitted to: of other
rows, and kept as inputs drawn by their weight. On its own rows a fitted rounding looks up to ten times better than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.data.chat import Encoded
from edgelora.errors import ModelError
from edgelora.export import architectures
from edgelora.progress import Progress
from edgelora.weights import Checkpoint

EMBEDDING = "token_embd.weight"

_TOKENS_AT_ONCE = 512  # what the layers keep of one for the way back is 1.4 MB in a model of 135M
_PREDICTIONS_AT_ONCE = 256  # of tokens: with a vocabulary of 262k one takes a megabyte, its gradients several
_SKETCH = 256  # combinations of gradients: a trace is right to about 5 %
_STATES = 512  # of the head's inputs, and of every other matrix's, kept as they are
_JUDGES = 4  # of so many rows the last one judges
_SEED = 20251101


@dataclass(frozen=True)
class Curvature:
    """`inputs`: A, float32, shape (columns, columns), a weighted mean of x x^T; `source` tells which A a matrix shares.

    `judges`: inputs x drawn by weight, float32, shape (draws, columns), by source as well; their mean of x x^T is what costs are taken with.
    `outputs`: S by the matrix's GGUF name, float32, shape (sketch, rows), rows in the file's order; S^T S is the sum of g g^T an answer
    token. The head (`head` is its name; the embedding's where the two are one) is known better: `states`, float32, shape
    (tokens, columns), are some of its inputs, so what it predicts can be computed outright. `lookups`: how often an
    answer token's worth of text looks up each row of the embedding, float32, shape (vocabulary,).
    """

    inputs: Mapping[str, np.ndarray]
    judges: Mapping[str, np.ndarray]
    source: Mapping[str, str]
    outputs: Mapping[str, np.ndarray]
    states: np.ndarray
    lookups: np.ndarray
    head: str
    answers: int

    def moments(self, name: str) -> np.ndarray:
        """A of a matrix."""
        return self.inputs[self.source[name]]

    def cost(self, name: str, errors: np.ndarray, common: np.ndarray | None = None, together: int = 1) -> float:
        """Predicted KL divergence, nats an answer token, when a matrix of the layers is off by `errors`, shape (rows, columns).

        Costs of matrices add up where their errors are independent, as rounding errors are. The part of the errors along
        `common` (`seen` of a direction) is one that points the same way in `together` matrices: the loss grows with the square
        of their sum, so it counts that many times; by Cauchy's inequality no choice of types can cost more.
        """
        seen = self.seen(name, errors)
        cost = float(np.vdot(seen, seen))
        if common is not None:
            cost += (together - 1) * float(np.vdot(seen, common)) ** 2 / float(np.vdot(common, common))
        return cost

    def seen(self, name: str, errors: np.ndarray) -> np.ndarray:
        """What the answers see of a matrix's `errors`: float32, shape (sketch, draws); its sum of squares is their cost."""
        judges = self.judges[self.source[name]]
        return np.asarray((self.outputs[name] @ errors) @ judges.T * np.float32((2 * len(judges)) ** -0.5))

    def drawn(self, name: str, count: int, seed: int) -> tuple[Curvature, np.ndarray]:
        """The same for at most `count` rows of a matrix, and which they are, weighed so that costs of errors that rows do not share stay the same.

        Drawn without replacement, each as likely as its gradients' square is large (systematic sampling; Madow 1949).
        """
        outputs = self.outputs[name]
        squares = np.square(outputs, dtype=np.float64).sum(0) + 1e-30
        likely = np.minimum(1.0, count * squares / squares.sum())
        ends = np.cumsum(likely) + np.random.default_rng(seed).uniform()
        rows = np.flatnonzero(np.floor(ends) > np.floor(ends - likely))
        thinned = outputs[:, rows] * (likely[rows] ** -0.5).astype(np.float32)
        return replace(self, outputs={**self.outputs, name: thinned}), rows

    def lookup_cost(self, errors: np.ndarray) -> float:
        """The same for the embedding's rows where they are looked up."""
        projected = np.square(errors @ self.outputs[EMBEDDING].T, dtype=np.float64).sum(1)
        return 0.5 * float(projected @ self.lookups)

    def head_cost(self, values: np.ndarray, errors: np.ndarray) -> float:
        """Mean KL divergence, nats a token, of what the head predicts with `values` + `errors` from what it does with `values`."""
        total = 0.0
        for start in range(0, len(self.states), 64):
            right = self.states[start : start + 64] @ values.T
            wrong = right + self.states[start : start + 64] @ errors.T
            p, q = _log_softmax(right), _log_softmax(wrong)
            total += float((np.exp(p) * (p - q)).sum())
        return total / len(self.states)


def save(found: Curvature, path: Path) -> None:
    """Write the inputs' moments as safetensors: correlations as float16 (rounding shrinks them anyway) and deviations as float32."""
    from safetensors.numpy import save_file

    arrays = {}
    for name, moments in found.inputs.items():
        deviation = np.sqrt(np.maximum(np.diag(moments), 1e-30))
        arrays[f"{name}.correlation"] = (moments / np.outer(deviation, deviation)).astype(np.float16)
        arrays[f"{name}.deviation"] = deviation.astype(np.float32)
    save_file(arrays, path, metadata=dict(found.source))


class Moments:
    """What `save` wrote, a matrix at a time. ModelError for a file that is missing or damaged."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is missing or damaged: {error}", "remove its folder and run the same command again") from error
        self.source: Mapping[str, str] = self._file.metadata() or {}

    def __call__(self, name: str) -> np.ndarray | None:
        """Second moments of a matrix's inputs, float32, shape (columns, columns); None for one that was not measured."""
        if name not in self.source:
            return None
        deviation = self._file.get_tensor(f"{self.source[name]}.deviation")
        correlation = self._file.get_tensor(f"{self.source[name]}.correlation").astype(np.float32)
        return np.asarray(correlation * np.outer(deviation, deviation))

    def importance(self) -> dict[str, np.ndarray]:
        """Mean square of each column's input, float32, shape (columns,), for every matrix that was measured."""
        return {name: self._file.get_tensor(f"{source}.deviation") ** 2 for name, source in self.source.items()}


class _Input:
    """What one or several matrices multiply with: its weighted second moments, draws by weight, and the weights that gathered for this batch."""

    def __init__(self, columns: int, device: Any, draw: Any) -> None:
        import torch

        self.moments = torch.zeros(columns, columns, device=device)
        self.drawn = torch.zeros(_STATES, columns, device=device)
        self.total = self.judged = 0.0
        self.readers: set[str] = set()
        self._weights: dict[str, Any] = {}
        self._draw = draw

    def add(self, name: str, x: Any, weight: Any, learn: bool, judge: bool) -> None:
        self._weights[name] = weight
        if len(self._weights) == len(self.readers):
            together = sum(self._weights.values())
            if learn:
                self.moments += (x * together[:, None]).T @ x
                self.total += float(together.sum())
            if judge:
                self._judge(x, together)
            self._weights.clear()

    def _judge(self, x: Any, weights: Any) -> None:
        """Every draw changes to one of these with the share of all weight that they have: independent draws of all that went by."""
        import torch

        here = float(weights.sum())
        self.judged += here
        if here > 0:
            chosen = torch.multinomial(weights, _STATES, replacement=True, generator=self._draw)
            changes = torch.rand(_STATES, generator=self._draw, device=x.device) * self.judged < here
            self.drawn[changes] = x[chosen[changes]]


def open_model(described: Path, weights: Checkpoint, threads: int | None = None) -> Any:
    """The model with these weights in float32 on this machine's device; `threads` for the processor, torch's own choice without."""
    import torch
    from transformers import AutoModelForCausalLM

    from edgelora.export import configuration
    from edgelora.train import load

    if threads:
        torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_config(configuration.opened(described), dtype=torch.float32, attn_implementation="sdpa")
    tensors = {key: torch.from_numpy(weights.rows(key)).reshape(shape) for key, shape in weights.shapes.items()}
    missing, _ = model.load_state_dict(tensors, strict=False)
    if left := set(missing) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set()):
        raise ModelError(f"the model lacks the tensor {min(left)}", "copy or merge the model again")
    model.tie_weights()
    return model.to(load.device()).eval()


def collect(model: Any, rows: Sequence[Encoded], progress: Progress, judges: Sequence[Encoded] = ()) -> Curvature:
    """Run `rows` forwards and backwards through `model`, and `judges`, on which costs are taken; without any, on `rows` too.

    ModelError when it computes NaN or infinite values.
    """
    import torch

    if not rows:
        raise ModelError("the curvature needs at least one row", "raise train.max_tokens")
    sources = architectures.of(model.config.model_type).tensors(model.config)
    matrices = _matrices(model, sources)
    device, embedding = model.device, model.get_input_embeddings()
    draw = torch.Generator(device).manual_seed(_SEED)
    width = embedding.weight.shape[1]
    outputs = {n: torch.zeros(_SKETCH, m.out_features, device=device) for n, m in matrices.items()}
    outputs[EMBEDDING] = torch.zeros(_SKETCH, width, device=device)
    lookups = torch.zeros(embedding.weight.shape[0], device=device)
    of_head = torch.zeros(width, width, device=device)
    inputs: dict[str, _Input] = {}
    source: dict[str, str] = {}
    latest: list[tuple[Any, str]] = []  # the input that a matrix ran with last, and the matrix
    states: list[Any] = []
    real = torch.empty(0)  # which tokens of the batch are no padding
    learn = judge = True

    def sketch(name: str, gradient: Any) -> Any:
        g = gradient[real].float()
        signs = torch.randint(0, 2, (_SKETCH, len(g)), generator=draw, device=device) * 2.0 - 1
        outputs[name] += signs @ g
        return g

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, given: Any, made: Any) -> None:
            x = given[0].detach()
            if name not in source:
                source[name] = latest[0][1] if latest and latest[0][0] is given[0] else name
                inputs.setdefault(source[name], _Input(module.in_features, device, draw)).readers.add(name)
                if source[name] == name:
                    latest[:] = [(given[0], name)]
            made.register_hook(
                lambda gradient: inputs[source[name]].add(name, x[real].float(), sketch(name, gradient).square().sum(1), learn, judge)
            )

        return hook

    def watch_embedding(module: Any, given: Any, made: Any) -> Any:
        made = made.detach().requires_grad_()
        made.register_hook(lambda gradient: (sketch(EMBEDDING, gradient), None)[1])  # a hook's result would replace the gradient
        return made

    hooks = [module.register_forward_hook(watch(name)) for name, module in matrices.items()]
    hooks.append(embedding.register_forward_hook(watch_embedding))
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    done, total, answers, learned = 0, sum(len(row.ids) for row in (*rows, *judges)), 0, 0
    judged = sum(row.n_trained for row in judges or rows)
    try:
        for batch, learn, judge in [(b, True, not judges) for b in _batches(rows)] + [(b, False, True) for b in _batches(judges)]:
            progress(done / total, f"{total:,} tokens of training rows")
            ids, scored, real = _padded(batch, device)
            last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[scored]
            last.backward(_score_gradients(model, last.detach(), draw))
            seen = last.detach().float()
            if learn:
                of_head += seen.T @ seen
                learned += len(seen)
            if judge:
                states.append(seen[:: max(1, judged // _STATES)].cpu())
            lookups.index_add_(0, ids[real], torch.ones_like(ids[real], dtype=torch.float32))
            answers += len(seen)
            done += sum(len(row.ids) for row in batch)
    finally:
        for handle in hooks:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])
    head = "output.weight" if "output.weight" in sources else EMBEDDING
    moments = {name: (one.moments / (one.total or 1.0)).cpu().numpy() for name, one in inputs.items()} | {
        head: (of_head / learned).cpu().numpy()
    }
    sketches = {}
    for name, made in outputs.items():
        change = sources[name].change
        rows_first = made.T.contiguous()
        ordered = (rows_first if change is None else change.do(rows_first, model.config)).T
        # the embedding's sum of g g^T is that of a lookup, which `lookups` counts
        each = float(lookups.sum()) / _scale(embedding) ** 2 if name == EMBEDDING else answers
        sketches[name] = (ordered * (_SKETCH * each) ** -0.5).cpu().numpy()
    broken = next((n for found in (moments, sketches) for n, values in found.items() if not np.isfinite(values).all()), None)
    if broken:
        raise ModelError(f"the gradients at {broken} are NaN or infinite", "the training diverged: lower the learning rate and train again")
    drawn = {name: one.drawn.cpu().numpy() for name, one in inputs.items()}
    return Curvature(
        moments,
        drawn,
        {**source, head: head},
        sketches,
        torch.cat(states)[:_STATES].numpy(),
        (lookups / answers).cpu().numpy(),
        head,
        answers,
    )


def divided(rows: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """Rows that rounding is fitted to, and every fourth one, on which it is judged; of fewer than four all are both."""
    judges = list(rows[_JUDGES - 1 :: _JUDGES])
    return [row for i, row in enumerate(rows) if i % _JUDGES != _JUDGES - 1], judges


def _score_gradients(model: Any, states: Any, draw: Any) -> Any:
    """The gradient, at the head's inputs `states`, of the log-likelihood of labels drawn from the model's predictions; a few tokens at a time."""
    import torch

    states.requires_grad_()
    for part in states.split(_PREDICTIONS_AT_ONCE):
        predictions = torch.log_softmax(_logits(model, part).float(), dim=-1)
        if not torch.isfinite(predictions).all():
            raise ModelError(
                "the model's predictions are NaN or infinite", "the training diverged: lower the learning rate and train again"
            )
        labels = torch.multinomial(predictions.detach().exp(), 1, generator=draw)
        predictions.gather(1, labels).sum().backward()
    return states.grad


def _matrices(model: Any, sources: Mapping[str, architectures.Source]) -> dict[str, Any]:
    """GGUF name -> linear layer, for every matrix of the blocks."""
    import torch

    modules = dict(model.named_modules())
    named = {name: modules.get(source.name.removesuffix(".weight")) for name, source in sources.items() if name.endswith(".weight")}
    return {name: module for name, module in named.items() if name.startswith("blk.") and isinstance(module, torch.nn.Linear)}


def _scale(embedding: Any) -> float:
    """What an embedding layer multiplies its rows with before it hands them on (Gemma's does)."""
    return float(getattr(embedding, "embed_scale", 1.0))


def _logits(model: Any, states: Any) -> Any:
    logits = model.get_output_embeddings()(states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def _batches(rows: Sequence[Encoded]) -> list[list[Encoded]]:
    """Rows of similar length together, about _TOKENS_AT_ONCE tokens with their padding; one row is never cut."""
    batches: list[list[Encoded]] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if not batches or (len(batches[-1]) + 1) * len(row.ids) > _TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(row)
    return batches


def _padded(batch: Sequence[Encoded], device: Any) -> tuple[Any, Any, Any]:
    """Ids, int64, which positions predict an answer token, and which hold one of the row: all of shape (rows, longest)."""
    import torch

    longest = max(len(row.ids) for row in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.int64)
    scored, real = (torch.zeros((len(batch), longest), dtype=torch.bool) for _ in range(2))
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        scored[i, : len(row.ids) - 1] = torch.tensor(row.trained[1:])
        real[i, : len(row.ids) - 1] = True
    return ids.to(device), scored.to(device), real.to(device)
