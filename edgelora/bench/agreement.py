"""Whether a file answers in a browser as it does in its native runtime: same tokens, same probabilities, on the same prompts.

A speed proves nothing about a file that answers nonsense there. The native runtime goes first and says for every token of an answer how
likely it is and which one is likeliest; the browser is made to write the same answer and says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgelora import evaluate, talk
from edgelora.bench.rounds import prompt
from edgelora.data.row import Row
from edgelora.errors import Unsupported
from edgelora.progress import Progress
from edgelora.recipe import Evaluate
from edgelora.runtime import IN_BROWSER, Session, browser_of, runtime, runtime_of

_OWN_PROMPTS = (8, 24, 48)  # tokens of the bench's text, where no rows are given
_ANSWER = 16  # tokens of a greedy answer that is compared


def of_browsers(
    named: Sequence[tuple[Path, str]], rows: Sequence[Row], name: str, threads: int, progress: Progress
) -> list[dict[str, Any]]:
    """`measured` for every file of `named` (file, runtime) whose runtime is a browser's."""
    chosen = [path for path, runtime_name in named if runtime_name in IN_BROWSER.values()]
    found = []
    for number, path in enumerate(chosen):
        progress(number / len(chosen), f"comparing {path.name} in Chromium")
        found.append(measured(path, rows, name, threads))
    return found


def measured(path: Path, rows: Sequence[Row], name: str, threads: int) -> dict[str, Any]:
    """A row of a report's `agreement`.

    With `rows` their answers are scored (`rows` counts those that the browser could tell of), else what the native runtime answers to the bench's own text; `answers_equal` counts greedy answers
    of at most 16 tokens that are the same, and `differing` holds those that are not. `loss` has a 95 % bootstrap interval over prompts.
    """
    native_name, browser_name = runtime_of(path), browser_of(path)
    with runtime(native_name).open(path, threads) as native:
        asked = [(ids := talk.prompt_ids(native, row.messages[:-1]), list(talk.encode(native, row).ids[len(ids) :])) for row in rows]
        if not rows:
            asked = [(ids, _greedy(native, ids)) for ids in (prompt(native, n) for n in _OWN_PROMPTS)]
        longest = max(len(ids) + max(len(answer), _ANSWER) for ids, answer in asked)
        with _in_browser(browser_name, path, threads, longest + 8) as session:
            scored = [score for ids, answer in asked if answer and (score := _score(native, session, ids, answer))]
            shown = (
                [asked[i * len(asked) // Evaluate.answers][0] for i in range(Evaluate.answers)] if len(asked) > Evaluate.answers else None
            )
            said = [
                {
                    "prompt": native.detokenize(ids),
                    "native": _whole(native.detokenize(_greedy(native, ids))),
                    "browser": _whole(session.write(ids, _ANSWER)),
                }
                for ids in shown or [ids for ids, _ in asked]
            ]
        differing = [answer for answer in said if answer["native"] != answer["browser"]]
    return {
        "set": name if rows else "the bench's own text",
        "file": path.name,
        "runtime": browser_name,
        "against": native_name,
        "rows": len(scored),
        **(_figures(scored) if scored else {}),
        "answers": len(said),
        "answers_equal": len(said) - len(differing),
        "differing": differing,
    }


def _figures(scored: Sequence[tuple[float, float, int, int]]) -> dict[str, Any]:
    tokens = np.array([count for _, _, count, _ in scored])
    return {
        "tokens": int(tokens.sum()),
        "loss": evaluate.summary(evaluate.Losses(np.array([nats for nats, _, _, _ in scored]), tokens)),
        "against_loss": float(sum(nats for _, nats, _, _ in scored) / tokens.sum()),
        "top1": float(sum(same for _, _, _, same in scored) / tokens.sum()),
    }


def _whole(text: str) -> str:
    """Without what the last token left unfinished: a runtime may keep the beginning of a character to itself."""
    return text.rstrip("\ufffd").strip()


def _in_browser(name: str, path: Path, threads: int, context: int) -> Any:
    opened: Any = runtime(name)
    return opened.open(path, threads, context=context)


def _greedy(native: Session, ids: Sequence[int]) -> list[int]:
    """The greedy answer with the stop token that ended it, as a browser gives it."""
    made: list[int] = []
    for token in native.generate(ids, _ANSWER, ()):
        made.append(token)
        if token in native.stop_ids:
            break
    return made


def _score(native: Session, session: Any, ids: Sequence[int], answer: Sequence[int]) -> tuple[float, float, int, int] | None:
    """(nats in the browser, nats natively, tokens, tokens whose likeliest is the same) of one answer; None where the browser cannot tell."""
    try:
        said = session.follow(ids, answer)
    except Unsupported:
        return None
    expected = native.score([*ids, *said.ids[:-1]], first=len(ids) - 1)
    own = expected[np.arange(len(said.ids)), list(said.ids)].astype(np.float64)
    return -sum(said.logprobs), float(-own.sum()), len(said.ids), int((expected.argmax(-1) == np.array(said.likeliest)).sum())
