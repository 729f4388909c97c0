"""Real files: what `data inspect` finds against what their documentation says. Needs --corpora DIR."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def bench() -> Any:
    spec = importlib.util.spec_from_file_location("corpora_bench", Path(__file__).parent.parent / "bench" / "corpora.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list(bench().FILES))
def test_found_as_documented(corpora: Path, name: str) -> None:
    differ = [check for check in bench().look(corpora, name)["checks"] if not check["agrees"] and not check["why"]]
    assert differ == []


def test_every_file_is_looked_at(corpora: Path) -> None:
    files = {str(file.relative_to(corpora)) for file in corpora.glob("*/**/*.*") if "LICENSES" not in file.parts}
    assert files == set(bench().FILES)
