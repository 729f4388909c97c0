"""Stages' figures as lines of text."""

from __future__ import annotations

import math
from typing import Any

from edgelora.report.figures import number


def training(facts: Any) -> list[str]:
    from edgelora.train import estimate

    each = f" in each of {facts['processes']} processes" if facts.get("processes", 1) > 1 else ""
    lines = [
        f"trained {facts['trained_parameters']:,} of {facts['total_parameters']:,} parameters ({facts['trained_share']:.2%}); "
        f"full fine-tuning would hold {facts['full_finetune_bytes'] / 1e9:.1f} GB of weights, gradients and optimizer",
        f"memory: {estimate.peak_bytes(facts['measured']) / 1e9:.1f} GB{each} ({estimate.peak_bytes(facts['predicted']) / 1e9:.1f} predicted)"
        + (
            f"; time: {facts['measured']['seconds']:.0f} s ({facts['predicted']['seconds']:.0f} predicted)"
            if "seconds" in facts["measured"]
            else ""
        ),
    ]
    return lines + [f"note: {note}" for note in facts["notes"]]


def file(facts: Any) -> list[str]:
    from edgelora.export import remarks

    merge = facts.get("merge")
    return [
        f"{facts['file']}: {facts['size_bytes'] / 1e6:.1f} MB ({facts['predicted_bytes'] / 1e6:.1f} predicted); against the trained model: "
        f"tokens and template equal, KL {facts['kl']:.3g} nats a token, top-1 {facts['top1']:.1%}, n = {facts['tokens']} tokens",
        *([f"{facts['file']}: kept the {merge['kept']} merge: {merge['why']}"] if merge else []),
        *([f"{facts['file']} goes with {facts['base_file']}, {facts['base_bytes'] / 1e6:.1f} MB"] if "base_file" in facts else []),
        *(f"  {remark}" for remark in remarks.all_of(facts)),
    ]


def bench(row: Any) -> str:
    share, ceiling = row["bandwidth_share"], row["bandwidth_gb_per_s"]
    threads = f"{row['threads']} thread{'' if row['threads'] == 1 else 's'}"
    reached = f" ({share:.0%} of the {ceiling:.1f} GB/s that {threads} can read here)" if share else ""
    return (
        f"{row['file']}  {row['runtime']}, {threads}, prompt {row['prompt_tokens']}: first token {row['ttft_ms']:.0f} ms, "
        f"prefill {row['prefill_tok_per_s']:.0f} tok/s, decode {row['decode_tok_per_s']:.1f} tok/s{reached}, "
        f"peak {row['peak_rss_bytes'] / 1e6:.0f} MB" + (f"; doubtful: {row['noisy_why']}" if row["noisy"] else "")
    )


def device_bench(row: Any) -> str:
    """A row that a runner on another device measured: only what it tells."""
    threads = f"{row['threads']} thread{'' if row['threads'] == 1 else 's'}"
    where = f"{row['file']}  {row['runtime']} on {row['device']}, {threads}, prompt {row['prompt_tokens']}: "
    if row.get("emulated"):
        return f"{where}it runs; EMULATED ({row['emulated_why']}), so no speed is shown"
    peak = f", peak {row['peak_rss_bytes'] / 1e6:.0f} MB" if row.get("peak_rss_bytes") else ""
    return (
        f"{where}first token {row['ttft_ms']:.0f} ms, prefill {row['prefill_tok_per_s']:.0f} tok/s, decode {row['decode_tok_per_s']:.1f} tok/s"
        f"{peak}" + (f"; doubtful: {row['noisy_why']}" if row["noisy"] else "")
    )


def quality(row: Any) -> str:
    after = row["after"]
    return (
        f"{row['file']} on {row['set']} (n = {row['rows']} rows): loss {after['loss']:.4f} [{after['low']:.4f}, {after['high']:.4f}], "
        f"perplexity {math.exp(after['loss']):.4g}"
    )


def agreement(row: Any) -> str:
    scored = (
        f" (n = {row['rows']} answers, {row['tokens']} tokens): loss {row['loss']['loss']:.4f} against {row['against_loss']:.4f}, "
        f"same top token {row['top1']:.1%}, greedy answers equal"
        if row["rows"]
        else ": greedy answers equal"
    )
    return f"{row['file']} in {row['runtime']} against {row['against']}{scored} {row['answers_equal']} of {row['answers']}"


def divergence(row: Any) -> str:
    return (
        f"{row['file']} against the reference (n = {row['rows']} rows): KL {row['kl']:.3g} [{row['kl_low']:.3g}, {row['kl_high']:.3g}] "
        f"nats a token, top-1 {row['top1']:.1%}"
    )


def accuracy(row: Any) -> str:
    return f"{row['file']} on {row['set']} (n = {row['rows']} rows): accuracy {row['after']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def estimate(row: Any) -> str:
    return (
        f"ESTIMATE  {row['device']}, {row['file']} in {row['runtime']}: decode about {number(row['decode_tok_per_s'], 2)} tok/s "
        f"({number(row['low'], 2)} to {number(row['high'], 2)})\n"
        f"          {row['efficiency']:.0%} of {row['bandwidth_gb_per_s']:g} GB/s over {row['bytes_per_token'] / 1e6:.0f} MB a token; {row['trust']}"
    )


def summary(document: Any) -> list[str]:
    lines = training(document["training"])
    if "merge" in document:
        lines.append(f"merge in 16 bits: kept {document['merge']['kept']}: {document['merge']['why']}")
    for row in document["files"]:
        lines += file(row)
    for row in document.get("losses", []):
        lines.append(
            f"{row['file']} on {row['set']} (n = {row['rows']}): loss {row['before']['loss']:.3f} -> {row['after']['loss']:.3f}, "
            f"{row['change']:+.0%} [{row['change_low']:+.0%}, {row['change_high']:+.0%}]"
        )
    for row in document.get("accuracy", []):
        lines.append(f"{row['file']} on {row['set']} (n = {row['rows']}): accuracy {row['before']:.1%} -> {row['after']:.1%}")
    return lines + [device_bench(row) if row.get("device") else bench(row) for row in document.get("bench", [])]
