"""Runs a .litertlm file in the environment "litert": LiteRT computes, as LiteRT-LM has it do, and LiteRT-LM's engine reads text.

LiteRT-LM takes text and gives text, and no predictions. So the file's graph is run through LiteRT itself, the library beneath
LiteRT-LM: the same kernels, called in the same order, the prompt in blocks and the answer token by token. The engine is
opened beside it only when its tokenizer, its template engine or its own answer is asked for.
"""

import io
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import litert_lm
import litert_lm_builder.litertlm_header_schema_py_generated as schema
import numpy as np
import serve
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import CpuOptions, Options
from litert_lm_builder.litertlm_peek import read_litertlm_header
from litert_lm_builder.runtime.proto import llm_metadata_pb2

MASKED = -1e9  # far below every score, and finite
KIND = schema.AnySectionDataType


class Model:
    """A .litertlm: its sections, and its graph in LiteRT."""

    def __init__(self, path: str, threads: int) -> None:
        self._path, self._threads = path, threads
        self._engine: Any = None
        sections = read_sections(path)
        metadata = llm_metadata_pb2.LlmMetadata.FromString(sections[KIND.LlmMetadataProto])
        self._tokenizer = sections[KIND.HF_Tokenizer_Zlib]
        self._template = metadata.jinja_prompt_template
        options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=threads))
        self._graph = CompiledModel.from_buffer(sections[KIND.TFLiteModel], options=options)
        self._steps = {length: Step(self._graph, name) for name, length in lengths(self._graph).items()}
        self._block = max(self._steps)
        # Two sets of caches: a step reads one and writes the other.
        self._caches = [self._steps[1].cache_buffers() for _ in range(2)]
        self.facts = {
            "context": self._steps[1].context,
            "vocabulary": self._steps[1].vocabulary,
            "stop_ids": [token.token_ids.ids[0] for token in metadata.stop_tokens if token.token_ids.ids],
        }
        for length in self._steps:  # only now are the weights laid out for this processor: that is part of loading
            self._step(length, [0], 0)

    def feed(self, ids: Sequence[int], at: int, keep: int) -> Any:
        unseen = len(ids) - keep
        begin = self._read(ids[:unseen], at)
        return np.stack([self._step(1, ids[i : i + 1], at + i) for i in range(begin, len(ids))])[-keep:]

    def generate(self, ids: Sequence[int], most: int) -> Iterator[int]:
        at = self._read(ids[:-1], 0)
        for i in range(at, len(ids)):
            logits = self._step(1, ids[i : i + 1], i)
        for made in range(most):
            token = int(logits.argmax())
            yield token
            if made + 1 < most:
                logits = self._step(1, [token], len(ids) + made)

    def text(self) -> dict[str, str]:
        """What the file says of text: the chat template, and tokenizer.json."""
        return {"chat_template": self._template, "tokenizer": zlib.decompress(self._tokenizer[8:]).decode()}

    def tokenize(self, text: str) -> list[int]:
        return list(self._opened().tokenize(text))

    def render(self, messages: Sequence[tuple[str, str]]) -> dict[str, str]:
        """The conversation by LiteRT-LM's template engine, up to where the assistant begins."""
        turns = [{"role": role, "content": content} for role, content in messages]
        with self._opened().create_conversation(messages=turns[:-1]) as conversation:
            return {"text": conversation.render_message_to_string(turns[-1])}

    def answer(self, prompt: str, most: int) -> dict[str, str]:
        """LiteRT-LM's own greedy answer to a rendered prompt, up to a stop token."""
        greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
        with self._opened().create_session(apply_prompt_template=False, sampler_config=greedy, max_output_tokens=most) as session:
            session.run_prefill([prompt])
            return {"text": "".join(piece.texts[0] for piece in session.run_decode_async())}

    def _read(self, ids: Sequence[int], at: int) -> int:
        """Take in as many of `ids` as whole blocks may hold without a prediction; how many that were.

        A block always writes all of its rows, so it must end within the cache. What it writes beyond `ids` is overwritten later and masked until then.
        """
        done = 0
        while done < len(ids) and at + done + self._block <= self._steps[1].context:
            self._step(self._block, ids[done : done + self._block], at + done)
            done = min(len(ids), done + self._block)
        return done

    def _step(self, length: int, ids: Sequence[int], at: int) -> Any:
        step = self._steps[length]
        self._caches.reverse()
        return step.run(ids, at, *self._caches)

    def _opened(self) -> Any:
        if self._engine is None:
            litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
            backend = litert_lm.Backend.CPU(thread_count=self._threads)
            self._engine = litert_lm.Engine(self._path, backend=backend, cache_dir=":nocache")  # else it writes files beside the model
        return self._engine


class Step:
    """One signature of the graph: `length` tokens in, perhaps the predictions after the last one out."""

    def __init__(self, graph: Any, name: str) -> None:
        self._graph, self._index = graph, graph.get_signature_index(name)
        self._name = name
        inputs, outputs = graph.get_input_tensor_details(name), graph.get_output_tensor_details(name)
        self._length, self.context = inputs["mask"]["shape"][-2:]
        about = graph.get_signature_list()[name]
        self._inputs, self._outputs = about["inputs"], about["outputs"]
        self._own = {key: graph.create_input_buffer_by_name(name, key) for key in inputs if not key.startswith("kv_cache")}
        self._mask = np.full((self._length, self.context), MASKED, np.float32)
        self.vocabulary = outputs["logits"]["shape"][-1] if "logits" in outputs else None
        self._logits = graph.create_output_buffer_by_name(name, "logits") if self.vocabulary else None

    def cache_buffers(self) -> dict[str, Any]:
        return {key: self._graph.create_input_buffer_by_name(self._name, key) for key in self._inputs if key.startswith("kv_cache")}

    def run(self, ids: Sequence[int], at: int, before: dict[str, Any], after: dict[str, Any]) -> Any:
        """Logits after the one token of a decoding step, float32, (vocabulary,); None for a block of a prompt."""
        mask = self._mask
        mask.fill(MASKED)
        for i in range(self._length):
            mask[i, : at + min(i + 1, len(ids))] = 0
        padded = [*ids, *[0] * (self._length - len(ids))]
        self._own["tokens"].write(np.array(padded, np.int32))
        self._own["input_pos"].write(np.arange(at, at + self._length, dtype=np.int32))
        self._own["mask"].write(mask.ravel())
        inputs = [self._own[key] if key in self._own else before[key] for key in self._inputs]
        outputs = [self._logits if key == "logits" else after[key] for key in self._outputs]
        self._graph.run_by_index(self._index, inputs, outputs)
        return self._logits.read(self.vocabulary, np.float32) if self._logits else None


def lengths(graph: Any) -> dict[str, int]:
    """Name of each signature -> how many tokens it takes at once. The caches of all are the same."""
    return {name: graph.get_input_tensor_details(name)["tokens"]["shape"][-1] for name in graph.get_signature_list()}


def read_sections(path: str) -> dict[int, bytes]:
    """Kind of section -> its bytes, the kinds that a text model has."""
    header = read_litertlm_header(path, io.StringIO())
    found: dict[int, bytes] = {}
    with open(path, "rb") as stream:
        for i in range(header.SectionMetadata().ObjectsLength()):
            section = header.SectionMetadata().Objects(i)
            stream.seek(section.BeginOffset())
            found[section.DataType()] = stream.read(section.EndOffset() - section.BeginOffset())
    for kind in (KIND.LlmMetadataProto, KIND.HF_Tokenizer_Zlib, KIND.TFLiteModel):
        if kind not in found:
            raise ValueError(f"the file has no section of kind {kind}: it is no text model, or a damaged one")
    return found


serve.serve(Model)
