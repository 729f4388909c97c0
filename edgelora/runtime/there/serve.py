"""The far end of `edgelora.runtime.elsewhere`: runs inside another environment, so only the standard library may be imported here.

One JSON object a line in; one, or for `generate` one a token and an end, out. Arrays are float32 in base64. Whatever a
library prints goes to stderr, out of the replies' way.
"""

import base64
import json
import os
import select
import sys
from typing import Any, TextIO


class Refused(Exception):
    """What the model cannot do, as opposed to what is broken."""


def quiet() -> TextIO:
    """Where replies go; what is printed from now on goes to stderr. For a library that prints when it is imported."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def serve(open_model: Any, replies: TextIO | None = None) -> None:
    """Answer requests until the other end closes. `open_model(path, threads)` gives an object with

    facts          a dict that the other end is told: "context" (tokens that fit), "vocabulary", perhaps "stop_ids"
    feed(ids, at, keep)
                   reads `ids` as the tokens from position `at` on, forgetting what stood there; the raw predictions after
                   the last `keep` of them: anything with `tobytes` of float32 and a `shape` of (keep, vocabulary)
    generate(ids, most)
                   optional: greedy ids, one at a time; else they are made with `feed`
    tokenize(text) optional: the library's own tokenizer, special tokens parsed and none added

    Any other request goes to a method of that name, whose dict is the reply: `text`, `render` and `answer` of those that
    `elsewhere.OwnText` speaks to. Every request, whatever it is, ends a `generate` that is still going on.
    """
    out = replies or quiet()

    def reply(**values: Any) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    reply(ready=True)
    model: Any = None
    while line := sys.stdin.buffer.readline():
        asked = json.loads(line)
        try:
            if asked["do"] == "open":
                model = open_model(asked["path"], asked["threads"])
                reply(**model.facts)
            elif asked["do"] == "feed":
                found = model.feed(asked["ids"], asked["at"], asked["keep"])
                reply(shape=list(found.shape), data=base64.b64encode(found.tobytes()).decode())
            elif asked["do"] == "tokenize":
                reply(ids=[int(i) for i in model.tokenize(asked["text"])])
            elif asked["do"] == "generate":
                _generate(model, asked["ids"], asked["most"], set(asked["stop"]), reply)
            else:
                reply(**getattr(model, asked.pop("do"))(**asked))
        except Refused as error:
            reply(error="Unsupported", text=str(error))
        except Exception as error:
            reply(error="ModelError", text=f"{type(error).__name__}: {error}")


def _generate(model: Any, ids: Any, most: int, stop: Any, reply: Any) -> None:
    """A line a token. A new request from the other end means that it wants no more."""
    for token in model.generate(ids, most) if hasattr(model, "generate") else _greedy(model, ids, most):
        if token in stop or select.select([sys.stdin], [], [], 0)[0]:
            break
        reply(token=int(token))
    reply(end=True)


def _greedy(model: Any, ids: Any, most: int) -> Any:
    at = 0
    for _ in range(most):
        token = int(model.feed(ids, at, 1)[-1].argmax())
        yield token
        at, ids = at + len(ids), [token]
