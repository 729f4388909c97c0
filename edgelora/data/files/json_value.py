"""One JSON value of a stranger's file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from typing import Any

from edgelora.data.row import Broken, Record

_LOOKS = 'a row looks like {"question": "...", "answer": "..."}'

_FIRST = 100  # records


def columns(records: Iterable[tuple[int, Record]]) -> tuple[str, ...]:
    """The names in the first records, in the order in which they come: a record may leave some out."""
    return tuple(
        dict.fromkeys(name for _, record in islice(records, _FIRST) if not isinstance(record, Broken) for name in map(str, record))
    )


def parse(text: str, line: int) -> Any:
    """The value, or Broken."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return Broken(line, f"not JSON ({error.msg})", text, "each row should be one JSON object")
    except RecursionError:
        return too_deep(line)
    except ValueError as error:  # a number of thousands of digits
        return Broken(line, f"not a usable number ({error})", text[:200], "write such numbers as text")


def too_deep(line: int) -> Broken:
    return Broken(line, "nested too deeply", "", "each row should be one flat JSON object")


def as_record(line: int, value: Any) -> Record:
    """An object as it is, a text as a record of one column."""
    if isinstance(value, (dict, Broken)):
        return value
    if isinstance(value, str):
        return {"text": value}
    return Broken(line, f"expected an object, found {type(value).__name__}", str(value)[:200], _LOOKS)
