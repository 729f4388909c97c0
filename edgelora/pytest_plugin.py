"""The pytest plugin: a team's own tests assert budgets, with a readable difference on failure.

    @pytest.mark.edgelora_budget("dist/bot.gguf", size=["130MB", "+1%"])
    def test_the_bot_stays_small(): ...

    def test_another_way(edgelora_budget):
        edgelora_budget("runs/bot", kl=0.3, decode="-5%")

Paths are relative to pytest's root. The baseline is `baselines/` there, or the `edgelora_baseline` setting. Files are only
read, so tests may run in several processes. Nothing of edgelora is imported before a budget is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

_MARK = "edgelora_budget"


class BudgetWarning(UserWarning):
    """A budget could not be judged: no baseline, another machine, other work, too noisy."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("edgelora_baseline", "A baseline of edgelora, or a folder of them; default baselines.", default="baselines")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{_MARK}(artifact, **budgets): hold a model file, a report or a run against budgets")


@pytest.fixture
def edgelora_budget(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function ``(artifact, **budgets)`` that fails the test when a budget is broken."""
    return lambda artifact, **budgets: _hold(request.config, artifact, budgets)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    for mark in item.iter_markers(_MARK):
        if len(mark.args) != 1 or not mark.kwargs:
            pytest.fail(f"@pytest.mark.{_MARK} takes one artifact and budgets, for instance ('bot.gguf', size='130MB')", pytrace=False)
        _hold(item.config, mark.args[0], mark.kwargs)
    return (yield)


def _hold(config: pytest.Config, artifact: str | Path, budgets: Mapping[str, Any]) -> None:
    from edgelora import baseline, check
    from edgelora.errors import EdgeloraError
    from edgelora.measured import measured

    root = config.rootpath
    try:
        document, find = measured(root / artifact)
        known = baseline.read(root / config.getini("edgelora_baseline"), (document.get("machine") or {}).get("class"))
        verdicts = check.check(document, budgets, known, find)
    except EdgeloraError as error:
        pytest.fail(f"{error.message}\n{error.hint}".strip(), pytrace=False)
    for verdict in check.unjudged(verdicts):
        warnings.warn(BudgetWarning(f"{verdict.what}: {verdict.value}, limit {verdict.limit}; {verdict.why}"), stacklevel=2)
    if failed := check.broken(verdicts):
        lines = [f"{len(failed)} of {len(verdicts)} budgets broken:"]
        lines += [f"  {v.what}\n    limit    {v.limit}\n    measured {v.value}" + (f"\n    {v.why}" if v.why else "") for v in failed]
        pytest.fail("\n".join(lines), pytrace=False)
