"""What a report may hold. Units are in the names; losses and KL are nats a token; shares are fractions of one.

Every key except ``schema`` and ``name`` is optional and may be null. Keys that are not listed are kept and not shown,
so a report of a later version can still be read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from edgelora.errors import ModelError

SCHEMA = 1
_DEEPEST = 24
_LARGEST = 1e18  # no byte count, token count or time comes near; beyond it, plots would overflow

# A type is: str, bool, int, float (takes whole numbers too), object (any JSON), [element], {"key": type} or {str: type}.
_MEASURE = {"loss": float, "low": float, "high": float}
MACHINE = {
    "class": str,
    "cpu": str,
    "cores": int,
    "memory_bytes": int,
    "os": str,
    "python": str,
    "gpu": str,
    "load_average": float,
}
_STATE = {"governor": str, "temperature_c": float, "thermal_status": str, "load_average": float, "running": float, "clock_share": float}
_MERGE = {  # measured on valid rows; kl: to the model as training left it
    "kept": str,
    "why": str,
    "candidates": [{"base": str, "loss": float, "kl": float, "kl_low": float, "kl_high": float, "top1": float, "rows": int, "tokens": int}],
}
REPORT: dict[str, Any] = {
    "schema": int,
    "name": str,
    "created": str,
    "edgelora": str,
    "commit": str,
    "machine": MACHINE,
    "versions": {str: str},
    "recipe": {str: object},
    "training": {
        "method": str,
        "base": str,
        "trained_parameters": int,
        "total_parameters": int,
        "trained_share": float,
        "rows": int,
        "tokens": int,
        "epochs": float,
        "curve": [{"step": float, "loss": float}],
        "valid_curve": [{"step": float, "loss": float}],
        "predicted": {"peak_rss_bytes": int, "peak_gpu_bytes": int, "seconds": float},
        "measured": {"peak_rss_bytes": int, "peak_gpu_bytes": int, "seconds": float, "tokens_per_s": float},
        "full_finetune_bytes": int,  # predicted memory of training every parameter
        "model_16bit_bytes": int,  # size of the merged 16-bit model that the files are made from
        "notes": [str],
    },
    "merge": _MERGE,  # of the 16-bit model that formats which cannot merge on the way are made from
    "files": [  # the first one is the one that ships
        {
            "file": str,
            "format": str,
            "type": str,
            "runtime": str,
            "size_bytes": int,
            "predicted_bytes": int,
            "kl": float,
            "kl_low": float,
            "kl_high": float,
            "top1": float,
            "rows": int,
            "tokens": int,
            "tokens_equal": bool,
            "template_equal": bool,
            "further": {  # other runtimes that open the file, beside `runtime`; tokens and template by the library's own means
                str: {"kl": float, "same_text": bool, "tokens_equal": bool, "rows_equal": bool, "template_equal": bool}
            },
            "web": {  # the folder for browsers, beside the file
                "file": str,
                "size_bytes": int,
                "transformers.js": {"version": str, "same_text": bool, "prompts": int},
            },
            "merge": _MERGE,
            "weights": {  # of formats that mix types; fallbacks: matrices whose rows do not fit the wanted type's block
                "bits_a_weight": float,
                "types": {str: int},
                "fallbacks": [{"wanted": str, "block": int, "type": str, "columns": int, "tensors": int}],
            },
            "importance": bool,  # whether rounding was weighed by training rows; null: nothing looks at it
            "change": {  # what training changed; kept: file type -> share that is left after rounding
                "grid": {"type": str, "share": float, "error": float},  # of the base's matrices, that lie on one already
                "kept": {str: float},
            },
            "plan": {  # of a file planned to a size, a loss or a score: what was measured on the rows that choose, and what other sizes would cost
                "kept": str,
                "candidates": [
                    {
                        "rounding": str,
                        "size_bytes": int,
                        "predicted_kl": float,
                        "kl": float,
                        "kl_low": float,
                        "kl_high": float,
                        "loss": float,
                        "score": float,
                        "score_low": float,
                        "score_high": float,
                        "rows": int,
                        "tokens": int,
                        "kept": bool,
                    }
                ],
                "frontier": [{"size_bytes": int, "predicted_kl": float}],
            },
            "base_file": str,  # of an adapter, beside it
            "base_bytes": int,
            "sha256": str,
            "parts": {str: {str: int}},  # bytes of each group of tensors, by type: {"attention": {"Q4_K": 12345}}
        }
    ],
    "losses": [  # before: the untuned base exported to the same type; after: the exported file; change: relative to before
        {
            "set": str,
            "file": str,
            "rows": int,
            "tokens": int,
            "before": _MEASURE,
            "after": _MEASURE,
            "change": float,
            "change_low": float,
            "change_high": float,
        }
    ],
    "accuracy": [  # shares; low and high are the interval of `after`
        {
            "set": str,
            "file": str,
            "rows": int,
            "before": float,
            "after": float,
            "low": float,
            "high": float,
            "macro_f1_before": float,
            "macro_f1_after": float,
        }
    ],
    "confusion": [{"set": str, "file": str, "labels": [str], "counts": [[int]]}],  # row: the true label, column: the chosen one
    "answers": [{"question": str, "before": str, "after": {str: str}}],
    "agreement": [  # of a file in a browser with its native runtime (`against`): loss and top1 on the same answers, then greedy answers
        {
            "set": str,
            "file": str,
            "runtime": str,
            "against": str,
            "rows": int,
            "tokens": int,
            "loss": _MEASURE,
            "against_loss": float,
            "top1": float,
            "answers": int,
            "answers_equal": int,
            "differing": [{"prompt": str, "native": str, "browser": str}],
        }
    ],
    "bench": [
        {
            "file": str,
            "runtime": str,
            "device": str,  # another one than `machine`, and its class, as machines have them
            "device_class": str,
            "emulated": bool,  # it ran through an emulator: the row holds no time, speed or memory
            "emulated_why": str,
            "threads": int,
            "prompt_tokens": int,
            "load_ms": float,
            "ttft_ms": float,
            "prefill_tok_per_s": float,
            "decode_tok_per_s": float,
            "peak_rss_bytes": int,
            "decode_tokens": int,
            "workload": int,
            "processor": str,
            "turns": str,
            "runtime_version": str,
            "size_bytes": int,
            "prefill_cpu_s": float,
            "cpu_s_per_token": float,
            "bytes_per_token": int,  # of weights that decoding one token reads
            "load_average": float,
            "bandwidth_gb_per_s": float,  # what the memory of this machine can give
            "bandwidth_share": float,  # of it, what decoding reached
            "samples_ms": {str: [float]},  # ttft: one a repeat
            "crowded": bool,  # by something outside: other programs, heat, a quota
            "noisy": bool,
            "noisy_why": str,
        }
    ],
    "in_turns": [  # rows of `bench` of the same `turns`, each against the first of them, pair by pair; change: of the speed, of the time
        {
            "file": str,
            "runtime": str,
            "against": str,
            "against_runtime": str,
            "threads": int,
            "prompt_tokens": int,
            "repeats": int,
            "decode": {"change": float, "word": str, "why": str},
            "ttft": {"change": float, "word": str, "why": str},
        }
    ],
    "devices": [  # others than `machine` that rows of `bench` were measured on, and how they were at both ends
        {
            **{"name": str, "class": str, "cpu": str, "cpu_features": [str], "cores": int, "memory_bytes": int, "os": str, "abi": str},
            **{"emulated": bool, "before": _STATE, "after": _STATE},
        }
    ],
    "estimates": [  # never measured: decode speeds that other devices should reach
        {
            "file": str,
            "runtime": str,
            "device": str,
            "decode_tok_per_s": float,
            "low": float,
            "high": float,
            "bytes_per_token": int,
            "bandwidth_gb_per_s": float,
            "efficiency": float,
            "validated": bool,
            "trust": str,
            "source": str,
        }
    ],
    "checks": [{"what": str, "limit": str, "value": str, "ok": bool, "why": str}],  # ok null: could not be judged
    "commands": [str],
    "notes": [str],
}
COMPARISON: dict[str, Any] = {
    "schema": int,
    "kind": str,
    "name": str,
    "over": str,  # "commits" where the runs are a series in time
    "runs": [{"label": str, "name": str, "created": str, "edgelora": str, "commit": str, "machine": MACHINE}],
    "rows": [
        {
            "format": str,
            "type": str,
            "what": str,
            "unit": str,
            "values": [float],
            "low": [float],
            "high": [float],
            "n": [int],
            "verdicts": [{"word": str, "why": str}],  # of each run against the first: real, noise or cannot tell
        }
    ],
    "notes": [str],
}
MEASURED = (  # of a row of `bench`: what depends on the device that ran it
    *("load_ms", "ttft_ms", "prefill_tok_per_s", "decode_tok_per_s", "peak_rss_bytes", "prefill_cpu_s", "cpu_s_per_token"),
    *("bandwidth_gb_per_s", "bandwidth_share", "samples_ms"),
)
_REQUIRED = ("schema", "name")
_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def is_comparison(doc: Mapping[str, Any]) -> bool:
    return doc.get("kind") == "comparison"


def validate(doc: Any, source: str) -> None:
    """ModelError naming the first wrong value of `doc` and how many more there are."""
    hint = "make the report again with this version of edgelora"
    if not isinstance(doc, Mapping):
        raise ModelError(f"{source} is not a report: it holds {_shown(doc)}, not a JSON object", hint)
    if doc.get("schema") != SCHEMA or isinstance(doc.get("schema"), bool):
        raise ModelError(f"{source} has schema {_shown(doc.get('schema'))}, this edgelora reads schema {SCHEMA}", hint)
    problems = [f"{key}: missing" for key in _REQUIRED if doc.get(key) is None]
    problems += _problems(COMPARISON if is_comparison(doc) else REPORT, doc, "", 0)
    problems += _emulated_figures(doc)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ModelError(f"{source} is damaged: {problems[0]}{more}", hint)


def plain(value: Any) -> Any:
    """A copy that JSON can hold: tuples become lists, NaN and infinities null, lone surrogates U+FFFD."""
    if isinstance(value, Mapping):
        return {plain(k) if isinstance(k, str) else k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _emulated_figures(doc: Mapping[str, Any]) -> Iterator[str]:
    """Times, speeds and memory of an emulator say nothing of a device: they are not shown because they cannot be there."""
    bench = doc.get("bench")
    for i, row in enumerate(bench if isinstance(bench, list) else []):
        if isinstance(row, Mapping) and row.get("emulated") and (held := [key for key in MEASURED if row.get(key) is not None]):
            yield f"bench[{i}].{held[0]}: an emulator's"


def _problems(kind: Any, value: Any, where: str, depth: int) -> Iterator[str]:
    if value is None:
        return
    if depth > _DEEPEST:
        yield f"{where}: nested more than {_DEEPEST} levels deep"
    elif kind is object:
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, item in inner:
            yield from _problems(object, item, f"{where}.{key}", depth + 1)
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{where}: {_shown(value)} is not a list"
            return
        for i, item in enumerate(value):
            yield from _problems(kind[0], item, f"{where}[{i}]", depth + 1)
    elif isinstance(kind, Mapping):
        if not isinstance(value, Mapping):
            yield f"{where}: {_shown(value)} is not an object"
            return
        for key, item in value.items():
            yield from _problems(kind.get(key, kind.get(str, object)), item, f"{where}.{key}".lstrip("."), depth + 1)
    elif not _fits(kind, value):
        yield f"{where}: {_shown(value)} is not {_NAMES[kind]}"


def _fits(kind: type, value: Any) -> bool:
    if kind in (int, float):
        kinds = (int, float) if kind is float else (int,)
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    """At most some sixty characters of a value of any size."""
    if isinstance(value, (Mapping, list)):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST:
        return "a number above 1e18"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
