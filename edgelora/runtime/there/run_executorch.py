"""ExecuTorch behind `edgelora.runtime.executorch`; runs in the environment "executorch". See `serve`."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import executorch.extension.llm.custom_ops.custom_ops  # noqa: E402  attention and cache
import executorch.kernels.quantized  # noqa: E402, F401  rounded tables
import numpy as np  # noqa: E402
import serve  # noqa: E402
import torch  # noqa: E402
from executorch.extension.pybindings import portable_lib  # noqa: E402
from pytorch_tokenizers import CppHFTokenizer  # noqa: E402


class Model:
    """A .pte whose `forward(tokens, first position)` gives the prediction after the last token."""

    def __init__(self, path: str, threads: int) -> None:
        portable_lib._unsafe_reset_threadpool(threads)
        self._module = portable_lib._load_for_executorch(path)
        self.facts = {
            "context": self._constant("get_max_context_len"),
            "vocabulary": self._constant("get_vocab_size"),
            "stop_ids": list(self._module.run_method("get_eos_ids", ())),
        }
        self._tokenizer = CppHFTokenizer()
        self._tokenizer.load(str(Path(path).with_name("tokenizer.json")))
        self._step([0], 0)  # only now are the weights laid out for this processor: that is part of loading

    def feed(self, ids: Sequence[int], at: int, keep: int) -> Any:
        """All but the last `keep` tokens at once; each of those by itself, as the file computes one prediction a call."""
        read = len(ids) - keep
        if read:
            self._step(ids[:read], at)
        rows = [self._step([token], at + read + i) for i, token in enumerate(ids[read:])]
        return np.concatenate(rows)

    def tokenize(self, text: str) -> Any:
        return self._tokenizer.encode(text, 0, 0)

    def generate(self, ids: Sequence[int], most: int) -> Iterator[int]:
        at = 0
        for _ in range(most):
            token = int(self._step(ids, at).argmax())
            yield token
            at, ids = at + len(ids), [token]

    def _step(self, ids: Sequence[int], at: int) -> Any:
        """Read `ids` from position `at` on; the prediction after the last of them, (1, vocabulary)."""
        (logits,) = self._module.forward((torch.tensor([ids]), torch.tensor([at])))
        return logits.numpy().reshape(1, -1)

    def _constant(self, name: str) -> int:
        return int(self._module.run_method(name, ())[0])


serve.serve(Model)
