"""A whole report to change and look at, and its page as a browser would see it."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

GGUF, ONNX = "quickstart-q4_k_m.gguf", "quickstart-int4-mixed-onnx"
QUESTION, ANSWER = "荷物が届かない場合はどうすればよいですか。", "「注文履歴」から調査を依頼してください。"
MINUS = "\u2212"
TAGS = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "h1", "h2", "h3", "p", "div"}
TAGS |= {"span", "i", "bdi", "figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "pre", "code"}
TAGS |= {"details", "summary", "svg", "text", "rect", "line", "circle", "polyline", "path", "script", "wbr"}


def example() -> dict[str, Any]:
    """A report with something in every section; a new one each time, to be changed at will."""
    return {
        "schema": 1,
        "name": "quickstart",
        "created": "2026-11-23",
        "edgelora": "0.1.0",
        "commit": "abc1234",
        "machine": {"class": "x86-2core", "cpu": "AMD EPYC", "cores": 2, "memory_bytes": 24_300_000_000, "gpu": None, "load_average": 0.42},
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "recipe": {"name": "quickstart", "train": {"r": 16, "lr": 2e-4}, "exports": [{"format": "gguf", "type": None}], "budgets": {}},
        "training": {
            "method": "qlora",
            "base": "SmolLM2-135M-Instruct",
            "trained_parameters": 4_884_480,
            "total_parameters": 139_399_488,
            "trained_share": 0.03504,
            "rows": 1204,
            "tokens": 182_344,
            "epochs": 3.0,
            "curve": [{"step": i, "loss": 1.5 + 1.4 * math.exp(-i / 20)} for i in range(1, 61)],
            "valid_curve": [{"step": 20, "loss": 2.11}, {"step": 40, "loss": 1.742}, {"step": 60, "loss": 1.78}],
            "predicted": {"peak_rss_bytes": 3_100_000_000, "seconds": 840},
            "measured": {"peak_rss_bytes": 2_930_000_000, "seconds": 911.4, "tokens_per_s": 600.3},
            "full_finetune_bytes": 5_400_000_000,
            "model_16bit_bytes": 269_100_000,
            "notes": ["Stopped after epoch 3."],
        },
        "merge": {
            "kept": "nf4",
            "why": "It is closest to the model as trained.",
            "candidates": [
                {
                    "base": "nf4",
                    "loss": 1.7431,
                    "kl": 0.00021,
                    "kl_low": 0.0001,
                    "kl_high": 0.0003,
                    "top1": 0.997,
                    "rows": 16,
                    "tokens": 950,
                },
                {"base": "16bit", "loss": 1.8562, "kl": 0.277, "top1": 0.751},
            ],
        },
        "files": [
            {
                "file": GGUF,
                "format": "gguf",
                "type": "q4_k_m",
                "runtime": "llama.cpp",
                "size_bytes": 105_461_344,
                "predicted_bytes": 105_400_000,
                "kl": 0.03961,
                "kl_low": 0.0381,
                "kl_high": 0.0412,
                "top1": 0.912,
                "tokens": 8245,
                "tokens_equal": True,
                "template_equal": True,
                "sha256": "9f2c4e01aa" + "0" * 54,
                "parts": {
                    "embedding": {"Q8_0": 30_081_024},
                    "attention": {"Q4_K": 20_000_000, "Q6_K": 5_000_000},
                    "metadata": {"-": 380_320},
                },
            },
            {
                "file": ONNX,
                "format": "onnx",
                "type": "int4-mixed",
                "runtime": "onnxruntime",
                "size_bytes": 113_600_000,
                "kl": 0.157,
                "tokens": 8245,
                "tokens_equal": True,
                "template_equal": False,
            },
        ],
        "losses": [
            {
                "set": "paraphrase",
                "file": GGUF,
                "rows": 60,
                "tokens": 4120,
                "before": {"loss": 2.914, "low": 2.784, "high": 3.054},
                "after": {"loss": 1.719, "low": 1.629, "high": 1.819},
                "change": -0.4101,
                "change_low": -0.45,
                "change_high": -0.376,
            }
        ],
        "confusion": [{"set": "sealed", "file": GGUF, "labels": ["card", "fee"], "counts": [[50, 10], [9, 51]]}],
        "accuracy": [{"set": "sealed", "file": GGUF, "rows": 120, "before": 0.408, "after": 0.842, "low": 0.775, "high": 0.9}],
        "answers": [{"question": QUESTION, "before": "荷物 is a Japanese word.", "after": {GGUF: ANSWER}}],
        "agreement": [
            {
                "set": "paraphrase",
                "file": GGUF,
                "runtime": "wllama",
                "against": "llama.cpp",
                "rows": 60,
                "tokens": 4120,
                "loss": {"loss": 1.7204, "low": 1.631, "high": 1.82},
                "against_loss": 1.719,
                "top1": 0.9912,
                "answers": 5,
                "answers_equal": 4,
                "differing": [{"prompt": "Where is my parcel?", "native": "In the lorry.", "browser": "In the van."}],
            }
        ],
        "bench": [
            {
                "file": GGUF,
                "runtime": "llama.cpp",
                "threads": 1,
                "prompt_tokens": 32,
                "load_ms": 310.2,
                "ttft_ms": 118.4,
                "prefill_tok_per_s": 271.3,
                "decode_tok_per_s": 65.27,
                "peak_rss_bytes": 245_000_000,
                "cpu_s_per_token": 0.0151,
                "load_average": 0.4,
                "bandwidth_gb_per_s": 14.7,
                "bandwidth_share": 0.47,
                "samples_ms": {"ttft": [117.0, 118.4, 131.0], "decode": [15.1, 15.3, 15.6]},
            }
        ],
        "in_turns": [
            {
                "file": ONNX,
                "runtime": "onnxruntime",
                "against": GGUF,
                "against_runtime": "llama.cpp",
                "threads": 1,
                "prompt_tokens": 32,
                "repeats": 15,
                "decode": {"change": -0.134, "word": "real", "why": "slower, p = 0.0003 that this is chance"},
                "ttft": {"change": 0.012, "word": "noise", "why": "within 5%"},
            }
        ],
        "devices": [
            {
                "name": "Acme One",
                "class": "acme-one",
                "cpu": "Acme A1",
                "cores": 8,
                "memory_bytes": 8_000_000_000,
                "os": "Android 14 (API 34)",
                "abi": "arm64, arm",
                "emulated": False,
                "before": {"governor": "schedutil", "temperature_c": 36.5, "thermal_status": "none", "clock_share": 1.0},
                "after": {"governor": "schedutil", "temperature_c": 51.0, "thermal_status": "light", "clock_share": 0.8},
            }
        ],
        "estimates": [
            {
                "file": GGUF,
                "runtime": "llama.cpp",
                "device": "Raspberry Pi 5",
                "decode_tok_per_s": 101.3,
                "low": 77.8,
                "high": 131.2,
                "bytes_per_token": 103_400_000,
                "bandwidth_gb_per_s": 17.1,
                "efficiency": 0.62,
                "validated": True,
                "trust": "leaving each of 4 published figures on 1 device out: at most 10% off",
                "source": "LPDDR4X-4267, 32 bits wide",
            }
        ],
        "checks": [{"what": f"size of {GGUF}", "limit": "<= 130 MB", "value": "105.5 MB", "ok": True}],
        "commands": ["edgelora run quickstart.yaml"],
        "notes": ["Other work ran on this machine."],
    }


class Page(HTMLParser):
    """Tags and attributes as a browser would see them; fails on a tag that is not closed in its order."""

    VOID = frozenset({"meta", "br", "col", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.prose: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text.append(data)
            if self.open[-1] != "code":  # a recipe may say null
                self.prose.append(data)
            if self.open[-1] == "h2":
                self.headings.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.prose)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every single value, three entries of a list at most."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value[:3])
        return [leaf for key, item in items for leaf in leaves(item, (*path, key))]
    return [path]
