"""What an exported file is compared with: the model as it was trained, in float32, a layer at a time.

The base stays in 4 bits' values where training held it in 4 bits, and PEFT computes the adapter beside it, so nothing here
shares a step with the merge that is judged. The weights of one layer are in memory at once: a model of 7B takes 1 GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from edgelora import machine, models
from edgelora.data.chat import Encoded
from edgelora.errors import ModelError
from edgelora.weights import Checkpoint

_TOKENS_AT_ONCE = 4096  # the weights are read again for every so many


class Reference(Sequence[np.ndarray]):
    """Log-probabilities where `rows` are scored, float32, item i of shape (answer tokens of row i, vocabulary).

    `folder` holds config.json and the tokenizer, `weights` the base, `adapter` (PEFT's folder) what is computed beside
    it. The hidden states of all rows are computed once, here; an item is made when it is asked for, since the
    log-probabilities of all rows together may take gigabytes.

    Raises ModelError when the three do not fit one another, or transformers or PEFT cannot run them.
    """

    def __init__(self, folder: Path, weights: Checkpoint, adapter: Path | None, rows: Sequence[Encoded], threads: int) -> None:
        import torch

        from edgelora.runtime.torch_reference import stop_ids

        torch.set_num_threads(threads)
        self.rows = tuple(rows)
        self._model = _Streamed(folder, weights, adapter)
        self.stop_ids = stop_ids(self._model.inner, models.open_tokenizer(folder))
        self._hidden = self._model.hidden([row.ids[:-1] for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        scored = np.flatnonzero(self.rows[index].trained) - 1  # the token before predicts
        return self._model.log_probs(self._hidden[index][scored])


class _Streamed:
    """A causal language model whose weights are on disk; those of a layer are read when it runs and forgotten after it."""

    def __init__(self, folder: Path, weights: Checkpoint, adapter: Path | None) -> None:
        from safetensors.torch import load_file

        machine.give_back_freed_memory()
        self._weights = weights
        self._tied: dict[str, str] = {}
        try:
            self._adapter = load_file(adapter / "adapter_model.safetensors") if adapter else {}
            self._model = _empty(folder, adapter)
        except Exception as error:  # peft, safetensors, transformers and torch have no common error
            cause = " ".join(str(error).split())[:300]
            raise ModelError(f"{(adapter or folder).name} cannot be read: {cause}", "copy or train it again") from error
        self.inner = self._model.get_base_model() if adapter else self._model
        if self.inner.config.tie_word_embeddings and "lm_head.weight" not in weights.shapes:
            self._tied = {"lm_head.weight": "model.embed_tokens.weight"}
        self._hook()

    def hidden(self, sequences: Sequence[Sequence[int]]) -> list[Any]:
        """What the last layer makes of every sequence, float32 tensors of shape (tokens, hidden size).

        Sequences run side by side, filled up at the end: in a causal model what follows changes nothing before it.
        """
        import torch

        found: list[Any] = [None] * len(sequences)
        for group in _groups([len(ids) for ids in sequences]):
            longest = max(len(sequences[i]) for i in group)
            ids = torch.tensor([[*sequences[i], *([0] * (longest - len(sequences[i])))] for i in group])
            with torch.no_grad():
                states = self.inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
            for row, i in enumerate(group):
                found[i] = states[row, : len(sequences[i])].clone()
        self._keep_head()
        return found

    def log_probs(self, states: Any) -> np.ndarray:
        """Log-probabilities out of hidden states, by the model's own head with all that it does to logits."""
        import torch

        self._known.states = states[None]
        with torch.no_grad():
            logits = self.inner(input_ids=torch.zeros(1, len(states), dtype=torch.long), use_cache=False).logits[0]
        return np.asarray(torch.log_softmax(logits, dim=-1).numpy())

    def _hook(self) -> None:
        """Weights come before a layer runs and go after it; those outside the layers with the module they belong to."""
        body = self.inner.base_model
        self._blocks = [*body.layers]
        inside = {id(module) for block in self._blocks for module in block.modules()}
        self._blocks += [m for m in body.modules() if id(m) not in inside and [*m.parameters(recurse=False)]]
        names = {id(module): name for name, module in self._model.named_modules()}
        for block in self._blocks:
            places = [
                (module, key, f"{names[id(module)]}.{key}")
                for module in block.modules()
                for key, _ in module.named_parameters(recurse=False)
            ]
            block.register_forward_pre_hook(lambda block, inputs, places=places: self._fill(places))
            block.register_forward_hook(lambda block, inputs, output, places=places: _forget(places))

    def _keep_head(self) -> None:
        """After the layers only the head is needed: its weights stay, and the body hands it what it is told."""
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPast

        class Known(torch.nn.Module):
            states: Any

            def forward(self, **_: Any) -> Any:
                return BaseModelOutputWithPast(last_hidden_state=self.states)

        self._known = Known()
        setattr(self.inner, self.inner.base_model_prefix, self._known)
        self._fill((m, key, f"{name}.{key}") for name, m in self._model.named_modules() for key, _ in m.named_parameters(recurse=False))

    def _fill(self, places: Iterable[tuple[Any, str, str]]) -> None:
        import torch

        for module, key, name in places:
            weight, wanted = self._tensor(name), module._parameters[key].shape
            if weight.shape != wanted:
                raise ModelError(f"{name} of shape {tuple(weight.shape)} does not fit {tuple(wanted)}", "name the base it was trained on")
            module._parameters[key] = torch.nn.Parameter(weight, requires_grad=False)

    def _tensor(self, name: str) -> Any:
        """The weight that PEFT or transformers calls `name`."""
        import torch

        saved = name.replace(".default", "")  # PEFT leaves the adapter's name out when it saves
        for key in (saved, saved.removesuffix(".weight")):
            if key in self._adapter:
                return self._adapter[key].float()
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        plain = self._tied.get(plain, plain)
        if plain not in self._weights.shapes:
            raise ModelError(f"the model lacks the tensor {plain}", "copy or merge the model again")
        return torch.from_numpy(self._weights.rows(plain)).reshape(self._weights.shapes[plain])


def _empty(folder: Path, adapter: Path | None) -> Any:
    """The model (and the adapter beside it) without any weight."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if adapter is not None:
        from peft import PeftConfig, PeftModel

        beside = PeftConfig.from_pretrained(str(adapter))
        beside.inference_mode = True
        model = PeftModel(model, beside, low_cpu_mem_usage=True)
    return model.eval()


def _forget(places: Iterable[tuple[Any, str, str]]) -> None:
    import torch

    for module, key, _ in places:
        module._parameters[key] = torch.nn.Parameter(module._parameters[key].to("meta"), requires_grad=False)


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of sequences of similar length, each group of at most _TOKENS_AT_ONCE tokens when filled up."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[i] > _TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
