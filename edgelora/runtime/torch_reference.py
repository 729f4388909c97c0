"""PyTorch and transformers: the reference that exported files are compared with. It runs what was trained, slowly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from edgelora import models
from edgelora.errors import EdgeloraError, ModelError, Unsupported
from edgelora.runtime.answers import one_by_one, tree

REQUIRES = ("torch", "transformers", "safetensors")


def version() -> str:
    return f"torch {torch.__version__} (transformers {transformers.__version__})"


def open(path: Path, threads: int, dtype: torch.dtype = torch.float32) -> TorchSession:
    """Open a Hugging Face folder on the CPU, with arithmetic in `dtype`. ModelError when it cannot be loaded.

    PyTorch has one thread count for the whole process: `threads` stays set afterwards.
    """
    torch.set_num_threads(threads)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # transformers, safetensors and torch have no common error
        cause = " ".join(str(error).split())[:400]
        raise ModelError(
            f"transformers cannot load {path}: {cause}", "the folder needs config.json and whole *.safetensors files"
        ) from error
    return TorchSession(model, models.open_tokenizer(path))


class TorchSession:
    """A causal language model in torch; see `edgelora.runtime.Session`.

    Wraps any model that is already loaded too, for instance an NF4 one with its adapter. It is evaluated (no dropout, no
    gradients) on the device it is on, in the dtype it is in, and gets its training mode back after every call. `close`
    drops our reference; the caller's stays. An NF4 model should come from `edgelora.train.load.load_base`, which keeps
    bitsandbytes from repacking it for other kernels in evaluation.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._calls = 0
        config = model.config.get_text_config()
        self._longest = getattr(config, "max_position_embeddings", None)
        self._n_vocab = int(config.vocab_size)
        self.chat_template: str | None = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        named = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        self.special_tokens = {name: text for name, text in named.items() if text}
        self.stop_ids = stop_ids(model, tokenizer)

    def tokenize(self, text: str) -> list[int]:
        self._check_open()
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def detokenize(self, ids: Sequence[int]) -> str:
        self._check_open()
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def score(self, ids: Sequence[int], first: int = 0) -> np.ndarray:
        if not 0 <= first <= len(ids):
            raise ValueError(f"first is {first}, expected 0 to {len(ids)}")
        self._begin(ids, len(ids))
        with _evaluating(self._model):
            keep = torch.arange(first, len(ids), device=self._device)
            logits = self._model(input_ids=self._tensor(ids), logits_to_keep=keep, use_cache=False).logits[0]
            scores: np.ndarray = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
        return scores

    def score_answers(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        tokens = len(prompt) + max(map(len, answers)) - 1
        self._begin(prompt, tokens)
        window = getattr(self._model.config.get_text_config(), "sliding_window", None)
        if window and tokens > window:
            return one_by_one(self, prompt, answers)
        with _evaluating(self._model):
            return answer_log_probs(self._model, [prompt], answers)[0]

    def generate(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> Iterator[int]:
        self._begin(ids, len(ids) + max(0, max_new_tokens - 1))
        return self._continue(ids, max_new_tokens, frozenset(stop), self._calls)

    def close(self) -> None:
        self._calls += 1
        self._model = self._tokenizer = None

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _continue(self, ids: Sequence[int], max_new_tokens: int, stop: frozenset[int], call: int) -> Iterator[int]:
        fresh, past = ids, None
        for _ in range(max_new_tokens):
            if call != self._calls:
                raise EdgeloraError("this session was used or closed in the middle of generate()", "finish one call before the next")
            with _evaluating(self._model):
                made = self._model(input_ids=self._tensor(fresh), past_key_values=past, use_cache=True, logits_to_keep=1)
            token, past = int(made.logits[0, -1].argmax()), made.past_key_values
            if token in stop:
                return
            yield token
            fresh = [token]

    def _begin(self, ids: Sequence[int], tokens: int) -> None:
        self._check_open()
        self._calls += 1
        if not ids:
            raise Unsupported("an empty sequence cannot be continued", "give at least one token, for instance the begin token")
        strange = next((i for i in ids if not 0 <= i < self._n_vocab), None)
        if strange is not None:
            raise Unsupported(
                f"the id {strange} is not in the vocabulary (0 to {self._n_vocab - 1})", "tokenize with this model's own tokenizer"
            )
        if self._longest and tokens > self._longest:
            raise Unsupported(f"{tokens} tokens do not fit the model's context of {self._longest}", "give a shorter text")

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self._device)

    def _check_open(self) -> None:
        if self._model is None:
            raise EdgeloraError("this torch session is closed", "open the folder again")


def answer_log_probs(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[list[np.ndarray]]:
    """Log-probabilities of the tokens of every answer after every prompt, float32, in one pass.

    Behind each prompt (padded on the left) stand the inner nodes of the answers' tree. A node attends to the prompt and to the
    nodes that lead to it, at the position that it would have alone. Shorter together than a sliding window, if there is one.
    """
    branches = tree(answers)
    inner = branches.inner
    place = {node: i for i, node in enumerate(inner)}
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    size = longest + len(inner)
    seen = torch.eye(size, dtype=torch.bool)  # [i, j]: whether token i attends to token j
    seen[:longest, :longest] = torch.ones(longest, longest, dtype=torch.bool).tril()
    seen[longest:, :longest] = True
    for node, i in place.items():
        if branches.parents[node] >= 0:
            seen[longest + i] |= seen[longest + place[branches.parents[node]]]
    depths = torch.tensor([branches.depth(node) for node in inner], dtype=torch.long)
    pads = torch.tensor([longest - len(prompt) for prompt in prompts])[:, None]
    alone = torch.eye(size, dtype=torch.bool)  # a padding token attends to itself: no attention at all is no number
    visible = (seen & (torch.arange(size) >= pads[:, :, None])) | alone
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=device).masked_fill(~visible.to(device), torch.finfo(model.dtype).min)
    ids = [[0] * int(pad) + list(prompt) + [branches.tokens[node] for node in inner] for pad, prompt in zip(pads, prompts, strict=True)]
    positions = torch.cat([(torch.arange(longest) - pads).clamp(min=0), longest - pads + depths], dim=1)
    made = model(
        input_ids=torch.tensor(ids, device=device),
        position_ids=positions.to(device),
        attention_mask=mask[:, None],
        logits_to_keep=torch.arange(longest - 1, size, device=device),
        use_cache=False,
    )
    # the prediction of each node stands at its parent; row 0 is the prompt's last token
    parents = torch.tensor([place[parent] + 1 if parent >= 0 else 0 for parent in branches.parents], device=device)
    tokens = torch.tensor(branches.tokens, device=device)
    logits = made.logits.float()
    nodes = (logits[:, parents, tokens] - logits.logsumexp(-1)[:, parents]).cpu().numpy()
    return [[row[list(path)] for path in branches.paths] for row in nodes]


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's end of sequence first, then those that generation_config.json adds (one id or a list of them)."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
