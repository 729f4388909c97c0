"""What libraries find in the environment before a training on a processor."""

from __future__ import annotations

import os

import pytest

from edgelora import own_process


def test_few_kernels_are_kept_unless_somebody_said_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "")  # so that it is put back afterwards
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
    own_process.keep_few_kernels()
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("7", "128")
