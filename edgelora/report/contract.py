"""The report's schema as a JSON Schema document (draft 2020-12), for those who read report.json with other tools.

`SCHEMA` in `edgelora.report.schema` is the version: it grows when a key changes its meaning or its type or goes away. New keys
do not change it, so a reader should ignore what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.report.schema import COMPARISON, REPORT, SCHEMA

_KINDS = {str: "string", bool: "boolean", int: "integer", float: "number"}
# What a name does not say by itself. Units are in the names: _bytes, _ms, _s, tok_per_s, gb_per_s (10^9).
_MEANINGS = {
    "schema": "version of this schema",
    "class": "machines whose speeds may be compared, for instance x86-2core",
    "load_average": "processes that wanted a core, averaged over the minute before the first measurement",
    "files": "exported files; the first one is the one that ships",
    "predicted_bytes": "the size that was foretold before the file was written",
    "kl": "KL divergence from the trained (or named reference) model, nats a token",
    "top1": "share of tokens whose most likely next token is the reference's",
    "rows": "rows that a figure was measured on",
    "tokens": "tokens that a figure was measured on",
    "low": "lower end of the 95 % interval (bootstrap over rows; of an estimate the range for 19 of 20 devices)",
    "high": "upper end of the same",
    "loss": "mean negative log-likelihood of the answers' tokens, nats a token; its exponential is the perplexity",
    "before": "the untuned base exported to the same type",
    "after": "the exported file",
    "change": "relative change of the loss, rows paired: -0.3 is 30 % lower",
    "score": "share of rows whose label is chosen; without labels, of answer tokens that are the model's first choice",
    "frontier": "least predicted KL at every size, planned for this model and these rows",
    "parts": "bytes of each group of tensors by type",
    "agreement": "whether a file answers in a browser as in its native runtime, `against`",
    "answers_equal": "greedy answers of at most 16 tokens that are the same, of `answers` that were compared",
    "bench": "one row a file, runtime, prompt length and number of threads, measured on `machine` or on the `device` it names",
    "device": "the device that a row was measured on or estimated for, by its model: never a serial or a host",
    "device_class": "devices whose speeds may be compared",
    "devices": "those that rows of `bench` name, and how they were before and after",
    "emulated": "no real device ran it: the row has no time, speed or memory",
    "running": "threads that wanted a core at that moment, ours left out",
    "clock_share": "part of its highest clock that the device allows itself",
    "temperature_c": "of the hottest zone of the processor",
    "workload": "version of the text, order and warm-up: rows of another number did other work",
    "processor": "its name and instruction sets: speeds of other processors are not compared, whatever the class of the machine",
    "turns": "rows with the same one were measured by one bench whose files took turns: their repeats are pairs",
    "in_turns": "files of one bench against its first: real, noise or cannot tell, and by how much the speed or the time changes",
    "load_ms": "from nothing to a session that answers, median",
    "ttft_ms": "from the prompt's ids to the first token, median of the repeats",
    "prefill_tok_per_s": "prompt tokens over the time to the first token",
    "decode_tok_per_s": "inverse of the median time of a later token",
    "peak_rss_bytes": "most memory resident in the process that ran the file, interpreter included, or in the browser's processes",
    "prefill_cpu_s": "processor time of all threads for reading the prompt, median",
    "cpu_s_per_token": "processor time of all threads for one decoded token, median",
    "bytes_per_token": "bytes of weights that decoding one token reads",
    "bandwidth_gb_per_s": "of `bench`: what the memory was measured to give with these threads; of `estimates`: its data sheet",
    "bandwidth_share": "part of it that decoding reached: bytes_per_token x decode_tok_per_s over bandwidth",
    "samples_ms": "raw samples: load and ttft have one a repeat, decode has decode_tokens a repeat, in order, or on a device the mean of each repeat",
    "crowded": "something from outside disturbed the row: other programs, a hypervisor, a quota, heat",
    "noisy": "the row is doubtful, noisy_why says why",
    "estimates": "decode speeds that other devices should reach; nothing in it was measured",
    "efficiency": "share of the data sheet's bandwidth that the runtime reaches in published figures",
    "validated": "whether three or more published figures of the runtime could test the estimate",
    "checks": "budgets; ok is null where one could not be judged",
    "verdicts": "of each run against the first: real, noise or cannot tell",
    "over": "'commits' where the runs are a series in time",
}


def json_schema() -> dict[str, Any]:
    """What report.json and comparison.json may hold."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"edgelora report, schema {SCHEMA}",
        "description": "Every key but schema and name may be missing or null: a figure that was not measured is not there.",
        "anyOf": [{"$ref": "#/$defs/report"}, {"$ref": "#/$defs/comparison"}],
        "$defs": {"report": _whole(REPORT, {"const": "report"}), "comparison": _whole(COMPARISON, {"const": "comparison"})},
    }


def _whole(kind: Mapping[Any, Any], name: dict[str, Any]) -> dict[str, Any]:
    made = _object(kind)
    made["properties"] |= {"schema": {"const": SCHEMA, "description": _MEANINGS["schema"]}, "name": {"type": "string"}}
    if name["const"] == "comparison":
        made["properties"]["kind"] = name
        return {**made, "required": ["schema", "name", "kind"]}
    return {**made, "required": ["schema", "name"], "not": {"properties": {"kind": {"const": "comparison"}}, "required": ["kind"]}}


def _typed(kind: Any) -> dict[str, Any]:
    if kind is object:
        return {}
    if isinstance(kind, list):
        return {"type": ["array", "null"], "items": _typed(kind[0])}
    if isinstance(kind, Mapping):
        return {**_object(kind), "type": ["object", "null"]}
    return {"type": [_KINDS[kind], "null"]}


def _object(kind: Mapping[Any, Any]) -> dict[str, Any]:
    if str in kind:  # any name
        return {"type": "object", "additionalProperties": _typed(kind[str])}
    found = {}
    for name, inner in kind.items():
        found[name] = _typed(inner) | ({"description": _MEANINGS[name]} if name in _MEANINGS else {})
    return {"type": "object", "properties": found}
