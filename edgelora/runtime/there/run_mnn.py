"""Runs an MNN folder in the environment "mnn": MNN's own decoder, with its cache, tokenizer and template engine."""

import base64
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import serve

REPLIES = serve.quiet()  # MNN prints what the processor can

import MNN.llm  # noqa: E402
import numpy as np  # noqa: E402


class Model:
    """A folder of llm.mnn, its weights, its settings and its tokenizer."""

    def __init__(self, path: str, threads: int) -> None:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as stream:
            settings = json.load(stream)
        with open(os.path.join(path, "llm_config.json"), encoding="utf-8") as stream:
            self._jinja = json.load(stream).get("jinja") or {}
        self._model = MNN.llm.create(os.path.join(path, "config.json"))
        self._model.set_config({"thread_num": threads, "use_template": False, "reuse_kv": False})
        self._model.load()
        self._model.generate_init()
        self._seen = 0
        self._special, stop = ends(os.path.join(path, settings["tokenizer_file"]))
        self.facts = {
            "context": settings["max_all_tokens"],
            "vocabulary": len(self._read([0], 0)),  # also what sets the sizes of its buffers
            "stop_ids": stop,
        }

    def feed(self, ids: Sequence[int], at: int, keep: int) -> Any:
        """Predictions are made one token at a time, as answers are: MNN rounds what goes into a matrix otherwise for several rows."""
        unseen = len(ids) - keep
        if unseen:
            self._read(ids[:unseen], at)
        return np.stack([self._read([token], at + unseen + i) for i, token in enumerate(ids[unseen:])])

    def generate(self, ids: Sequence[int], most: int) -> Iterator[int]:
        logits = self._read(ids, 0)
        for made in range(most):
            token = int(logits.argmax())
            yield token
            if made + 1 < most:
                logits = self._read([token], len(ids) + made)

    def text(self) -> dict[str, Any]:
        """What the folder says of text: the chat template, the special tokens it may use, and every token's bytes in base64 (special ones: none)."""
        tokens = {f"{name}_token": self._jinja[name] for name in ("bos", "eos") if name in self._jinja}
        pieces = [b"" if i in self._special else self._bytes(i) for i in range(self.facts["vocabulary"])]
        return {
            "chat_template": self._jinja.get("chat_template"),
            "special_tokens": tokens,
            "pieces": [base64.b64encode(piece).decode() for piece in pieces],
        }

    def tokenize(self, text: str) -> list[int]:
        return list(self._model.tokenizer_encode(text))

    def render(self, messages: Sequence[tuple[str, str]]) -> dict[str, str]:
        """The conversation by MNN's template engine, up to where the assistant begins."""
        return {"text": self._model.apply_chat_template([{"role": role, "content": content} for role, content in messages])}

    def answer(self, prompt: str, most: int) -> dict[str, str]:
        """MNN's own greedy answer to a rendered prompt, up to a stop token."""
        self._model.set_config({"sampler_type": "greedy", "max_new_tokens": most})
        self._model.reset()
        text = self._model.response(prompt, False)
        self._model.reset()
        self._model.generate_init()
        self._seen = 0
        return {"text": text}

    def _read(self, ids: Sequence[int], at: int) -> Any:
        """Logits after the last of `ids`, which stand from position `at` on, float32, (vocabulary,)."""
        if at == 0:
            self._model.reset()
        elif at != self._seen:
            self._model._c_obj.erase_history(at, 0)  # to the end; the wrapper leaves it out
        self._seen = at + len(ids)
        return np.array(self._model.forward([int(i) for i in ids]).read(), np.float32).reshape(-1)

    def _bytes(self, token: int) -> bytes:
        try:
            return str(self._model.tokenizer_decode(token)).encode()
        except UnicodeDecodeError as error:  # a part of a character
            return error.object


def ends(tokenizer: str) -> tuple[set[int], list[int]]:
    """Special ids, and those that end an answer: "430 KIND", how many special, stop and prefix ids there are, then those; the rest is binary."""
    with open(tokenizer, "rb") as stream:
        stream.readline()
        special, stop, _ = map(int, stream.readline().split())
        ids = list(map(int, stream.readline().split()))
    return set(ids[:special]), ids[special : special + stop]


serve.serve(Model, REPLIES)
