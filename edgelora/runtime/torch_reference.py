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
