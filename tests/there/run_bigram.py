"""A model small enough to check by hand, behind the real `serve`: after token t the likeliest is t + 1, the next likeliest t + 2."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "edgelora" / "runtime" / "there"))

import numpy as np
import serve

VOCABULARY = 600


class Bigram:
    def __init__(self, path: str, threads: int) -> None:
        words = Path(path).read_text()
        if "damaged" in words:
            raise ValueError("no such\nmodel")
        os.write(1, b"a library that chats\n")
        self.facts = {"context": 40, "vocabulary": VOCABULARY, "stop_ids": [49]}
        self._read: list[int] = []
        self._slow = "slow" in words
        self._ballast = np.ones(30_000_000, np.uint8) if "large" in words else None

    def feed(self, ids: list[int], at: int, keep: int) -> np.ndarray:
        if ids == [45]:
            raise serve.Refused("forty-five")
        if ids == [46]:
            sys.stderr.write("a last word\n")
            sys.stderr.flush()
            sys.exit(3)
        if self._slow:
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass
        self._read = self._read[:at] + ids
        rows = np.zeros((keep, VOCABULARY), np.float32)
        for row, token in zip(rows, self._read[-keep:], strict=True):
            row[(token + 1) % VOCABULARY], row[(token + 2) % VOCABULARY] = 5, 4
        return rows

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())


serve.serve(Bigram)
