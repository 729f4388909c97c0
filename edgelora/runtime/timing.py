"""What reading a prompt and going on with it took, whoever held the clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """One prompt, read and continued: milliseconds to the first token and of each later one, and the CPU seconds of both parts."""

    prompt_tokens: int
    ttft_ms: float
    decode_ms: tuple[float, ...]
    prefill_cpu_s: float
    decode_cpu_s: float
