"""Compare an exported file, opened in its real runtime, with the model as it was trained, and name the culprit.

In the order in which one fault hides behind another: tokenizer, chat template, end-of-sequence, then the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from edgelora import evaluate, models
from edgelora.data import chat, template
from edgelora.data.chat import Encoded
from edgelora.errors import VerifyError
from edgelora.export.reference import Reference
from edgelora.runtime import Session, runtime


class OwnText(Session, Protocol):
    """A session of a library that brings a tokenizer and a template engine of its own."""

    def library_tokenize(self, text: str) -> list[int]: ...

    def library_render(self, messages: Sequence[tuple[str, str]]) -> str: ...


_COMPARED = 4  # rows on which further runtimes are held against the first one
_GREEDY = 24  # tokens of an answer that they write
_SAME_KL = 0.01  # nats a token between two runtimes of one file: kernels that round activations differ by some 1e-4
_EXACT_KL = 0.01  # nats a token that a file in the widest type may be away; f16 is near 1e-5

# In Unicode's composed form: some tokenizers compose what they read and llama.cpp does not, a difference of other texts only.
# What tokenizers get wrong: digits, spaces, line ends, contractions, other scripts, marks, joined emoji, control text.
PROBES = (
    "Hello world! I'm here, don't you think they'll see 3.14159 and 2024-11-05?",
    "  two spaces,\ttab\n\n\nthree line ends\r\nand CRLF ",
    "質問：サーバーの設定を変更できますか？ ﾊﾝｶｸ ＡＢＣ １２３ 。",
    "naïve café — “quotes” … ½ ² ①",
    "👩‍👩‍👧‍👦 🇯🇵 नमस्ते Здравствуйте مرحبا",
    "def f(x):\n    return x**2  # 100% of $5.00 <b>&amp;</b>",
    "a" * 40 + " " + "0" * 20,
)
CONVERSATIONS = (
    (("user", "Hello"),),
    (("system", "Be brief."), ("user", "What is 2 + 2?"), ("assistant", "4"), ("user", "And 3 + 3?")),
)


def verify(
    model: Path,
    exported: Path,
    runtime_name: str,
    reference: Reference,
    rows: Sequence[Encoded],
    max_kl: float,
    threads: int,
    full_precision: Callable[[], Path],
    merged: Callable[[], Reference],
    finer: str = "choose a larger one",
) -> dict[str, Any]:
    """Facts about `exported` against `reference`, the model as trained, on `rows`; VerifyError names what differs.

    `model` is the folder whose configuration and tokenizer it was written with. `reference` begins with `rows`.
    `full_precision` writes the same model in the format's widest type, `merged` runs the weights it was written from;
    they are called only to tell coarse weights from a wrong conversion or a merge that went away from what was trained.
    `finer` is what to do about coarse ones.
    """
    tokenizer = models.open_tokenizer(model)
    with runtime(runtime_name).open(exported, threads) as session:
        _same_tokens(tokenizer, session, exported, rows)
        _same_template(tokenizer, session, exported)
        _same_end(tokenizer, reference.stop_ids, session, exported)
        measured = evaluate.divergence_summary(evaluate.divergence(reference, session, rows))
    if not measured["kl"] <= max_kl:  # also catches NaN
        with runtime(runtime_name).open(full_precision(), threads) as widest:
            culprit = _culprit(reference, widest, rows, merged, finer)
        raise VerifyError(
            f"{exported.name}: KL {measured['kl']:.3g} nats a token from the trained model, more than evaluate.max_kl = {max_kl}", culprit
        )
    return {**measured, "tokens_equal": True, "template_equal": True}


def further(exported: Path, first: str, others: Sequence[str], rows: Sequence[Encoded], threads: int) -> dict[str, dict[str, Any]]:
    """How other runtimes of `exported` answer beside the `first` one: KL divergence, greedy text, their own tokenizer and template.

    VerifyError when one computes something else from the same file. What a runtime's own tokenizer or template engine
    does otherwise is no fault of the file, and reported.
    """
    chosen = rows[:_COMPARED]
    with runtime(first).open(exported, threads) as session:
        expected = evaluate.answer_scores(session, chosen)
        texts = [session.detokenize(row.ids) for row in chosen]
        tokens = [session.tokenize(text) for text in (*PROBES, *texts)]
        prompts = [template.render(session.chat_template, conversation, session.special_tokens) for conversation in CONVERSATIONS]
        greedy = [session.detokenize([*session.generate(session.tokenize(p), _GREEDY, session.stop_ids)]) for p in prompts]
    found = {}
    for name in others:
        with cast(OwnText, runtime(name).open(exported, threads)) as session:
            kl = float(evaluate.divergence_summary(evaluate.divergence(expected, session, chosen))["kl"])
            if not kl <= _SAME_KL:
                raise VerifyError(
                    f"{exported.name}: {name} and {first} disagree about it: KL {kl:.3g} nats a token",
                    "the culprit is the runtime: do not ship the file for both",
                )
            again = [session.detokenize([*session.generate(session.tokenize(p), _GREEDY, session.stop_ids)]) for p in prompts]
            own = [session.library_tokenize(text) for text in (*PROBES, *texts)]
            rendered = [session.library_render(conversation) for conversation in CONVERSATIONS]
        found[name] = {
            "kl": kl,
            "same_text": again == greedy,
            "tokens_equal": own == tokens,
            "rows_equal": own[len(PROBES) :] == tokens[len(PROBES) :],
            "template_equal": rendered == prompts,
        }
    return found


def expected(exported: Path, name: str, threads: int) -> tuple[dict[str, list[int]], dict[str, list[int]], str]:
    """What another program should make of `exported`, by the runtime `name`: ids of texts, greedy ids after prompts, the template around "Hello"."""
    with runtime(name).open(exported, threads) as session:
        texts = {text: list(session.tokenize(text)) for text in PROBES}
        prompts = [template.render(session.chat_template, conversation, session.special_tokens) for conversation in CONVERSATIONS]
        greedy = {p: [*session.generate(session.tokenize(p), _GREEDY, session.stop_ids)] for p in prompts}
    return texts, {prompt: ids for prompt, ids in greedy.items() if ids}, prompts[0]


def _same_tokens(tokenizer: Any, session: Session, exported: Path, rows: Sequence[Encoded]) -> None:
    for text in (*PROBES, *(tokenizer.decode(row.ids) for row in rows)):
        expected = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        found = list(session.tokenize(text))
        if expected != found:
            at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found)))
            raise VerifyError(
                f"{exported.name}: token ids differ from the trained model's from position {at} of {text[:40]!r}: "
                f"{expected[at : at + 4]} against {found[at : at + 4]}",
                "the culprit is the tokenizer: its pre-tokenizer or its merges were not carried over",
            )


def _same_template(tokenizer: Any, session: Session, exported: Path) -> None:
    for conversation in CONVERSATIONS:
        expected = chat.render(tokenizer, conversation, open_turn=True)
        found = template.render(session.chat_template, conversation, session.special_tokens)
        if expected != found:
            raise VerifyError(
                f"{exported.name}: the chat template renders {found[:80]!r} where training saw {expected[:80]!r}",
                "the culprit is the chat template",
            )


def _same_end(tokenizer: Any, stop_ids: Sequence[int], session: Session, exported: Path) -> None:
    """An answer ends with the token that training taught, and otherwise only with marks: runtimes add those they know by name."""
    marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    strange = set(session.stop_ids) - marks - set(stop_ids)
    if strange or session.stop_ids[:1] != (tokenizer.eos_token_id,):
        raise VerifyError(
            f"{exported.name}: end-of-sequence differs: the model stops at id {tokenizer.eos_token_id}, the file at {list(session.stop_ids)}",
            "the culprit is the end-of-sequence token: answers would end too late or too early",
        )


def _culprit(reference: Reference, widest: Session, rows: Sequence[Encoded], merged: Callable[[], Reference], finer: str) -> str:
    def kl(one: Session | Reference, other: Session | Reference) -> float:
        return float(evaluate.divergence_summary(evaluate.divergence(one, other, rows))["kl"])

    away = kl(reference, widest)
    if away <= _EXACT_KL:
        return f"the culprit is the weights: in full precision the KL is {away:.2g}, so this type is too coarse for this model; {finer}"
    weights = merged()
    if kl(weights, widest) <= _EXACT_KL:
        return (
            f"the culprit is the merge: in full precision it is {kl(reference, weights):.2g} from the trained model; write merge.base: nf4"
        )
    return f"the culprit is the conversion or the runtime: even in full precision the KL is {away:.2g}"
