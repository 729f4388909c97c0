"""The report as files: written whole or not at all, read back with suspicion, and described by a JSON Schema."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelora import report
from edgelora.errors import DiskFull, EdgeloraError, ModelError
from edgelora.report import contract, schema
from tests.report_example import QUESTION, example, leaves


@pytest.fixture
def doc() -> dict[str, Any]:
    return example()


def test_json_round_trip_keeps_every_number(doc: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads(report.to_json(doc)) == doc
    paths = report.write(doc, tmp_path / "new" / "folder")
    assert report.read(paths["json"]) == doc
    assert report.read(tmp_path / "new" / "folder") == doc
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["report.html", "report.json", "report.md"]
    assert QUESTION in paths["json"].read_text(encoding="utf-8")  # readable, not escaped


def test_not_a_number_becomes_null(doc: dict[str, Any]) -> None:
    doc["files"][0]["kl"] = math.nan
    doc["training"]["curve"][5]["loss"] = math.inf
    back = json.loads(report.to_json(doc))
    assert back["files"][0]["kl"] is None
    assert back["training"]["curve"][5]["loss"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "{path} is not a report: it holds a list of 2, not a JSON object"),
        ("{", "{path} is not a report: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"schema": 1, "name": NaN}', "{path} is not a report: NaN is not a JSON number"),
        ('{"schema": 2, "name": "a"}', "{path} has schema 2, this edgelora reads schema 1"),
        ('{"name": "a"}', "{path} has schema None, this edgelora reads schema 1"),
        ('{"schema": 1}', "{path} is damaged: name: missing"),
        ('{"schema": 1, "name": 7}', "{path} is damaged: name: 7 is not text"),
        ('{"schema": 1, "name": "a", "files": {}}', "{path} is damaged: files: an object of 0 is not a list"),
        (
            '{"schema": 1, "name": "a", "files": [{}, {"size_bytes": "9 MB", "kl": true}]}',
            "{path} is damaged: files[1].size_bytes: '9 MB' is not a whole number (and 1 more)",
        ),
        ('{"schema": 1, "name": "a", "training": {"curve": [7]}}', "{path} is damaged: training.curve[0]: 7 is not an object"),
        ('{"schema": 1, "name": "a", "bench": [{"ttft_ms": 1e999}]}', "{path} is damaged: bench[0].ttft_ms: inf is not a number"),
        ('{"schema": 1, "name": "a", "checks": [{"ok": 1}]}', "{path} is damaged: checks[0].ok: 1 is not true or false"),
        (
            '{"schema": 1, "name": "a", "machine": {"cores": 1' + "0" * 400 + "}}",
            "{path} is damaged: machine.cores: a number above 1e18 is not a whole number",
        ),
    ],
)
def test_read_names_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        report.read(path)
    assert caught.value.message == message.format(path=path)
    assert caught.value.hint


def test_read_refuses_what_it_should_not_parse(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(ModelError, match="there is no report at"):
        report.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="is not a report: 'utf-8' codec"):
        report.read(path)
    path.write_text('{"schema": 1, "name": "a", "recipe": ' + '{"a": ' * 100 + "1" + "}" * 101, encoding="utf-8")
    with pytest.raises(ModelError, match="nested more than 24 levels deep"):
        report.read(path)
    path.write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(ModelError, match="is not a report"):
        report.read(path)
    with path.open("wb") as stream:
        stream.truncate(report.MAX_BYTES + 1)  # sparse: takes no room
    with pytest.raises(ModelError, match="is larger than 64 MiB"):
        report.read(path)


def test_write_refuses_what_read_would_refuse(doc: dict[str, Any], tmp_path: Path) -> None:
    doc["files"][0]["size_bytes"] = "105 MB"
    with pytest.raises(ModelError, match=re.escape("the report is damaged: files[0].size_bytes: '105 MB' is not a whole number")):
        report.write(doc, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_report(doc: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write(doc, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        report.write({**doc, "name": "other"}, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_write_into_a_file_is_a_clear_error(doc: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(EdgeloraError, match=r"cannot write the report into .*taken: File exists"):
        report.write(doc, tmp_path / "taken")


def test_needs_only_the_standard_library() -> None:
    code = "import sys, edgelora.report; print(sorted({m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    loaded = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert loaded.stdout.strip() == "['__main__', 'edgelora']"


def test_json_schema_accepts_what_validate_accepts(doc: dict[str, Any]) -> None:
    """Every key of the schema is in it, with its meaning where a name does not tell, and real documents satisfy it."""
    found = report.json_schema()
    assert found["$defs"]["report"]["properties"]["schema"]["const"] == schema.SCHEMA
    assert _named(found["$defs"]["report"]) == _keys(schema.REPORT)
    assert set(contract._MEANINGS) <= {key for path in (*_keys(schema.REPORT), *_keys(schema.COMPARISON)) for key in path}
    compared = report.compare([doc, doc])
    for document, name, other in ((doc, "report", "comparison"), (compared, "comparison", "report")):
        assert list(_violations(found["$defs"][name], document)) == []
        assert list(_violations(found["$defs"][other], document)) != []
    for path in leaves(doc):
        broken = json.loads(json.dumps(doc))
        place = broken
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = {"no": "such thing"}
        if path[0] != "recipe":
            assert list(_violations(found["$defs"]["report"], broken)), path
            with pytest.raises(ModelError):
                schema.validate(broken, "it")


def _keys(kind: Any, at: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if isinstance(kind, list):
        return _keys(kind[0], at)
    if not isinstance(kind, dict) or str in kind:
        return {at}
    return {path for key, inner in kind.items() for path in _keys(inner, (*at, key))}


def _named(made: dict[str, Any], at: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if "items" in made:
        return _named(made["items"], at)
    return {path for key, inner in made["properties"].items() for path in _named(inner, (*at, key))} if "properties" in made else {at}


def _violations(made: dict[str, Any], value: Any, at: str = "") -> Any:
    """The part of JSON Schema that ours uses."""
    if "const" in made and value != made["const"]:
        yield at
    types = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict, "null": type(None)}
    named = [made["type"]] if isinstance(made.get("type"), str) else made.get("type", list(types))
    if not any(isinstance(value, types[n]) and not (isinstance(value, bool) and n in ("integer", "number")) for n in named):
        yield at
    if isinstance(value, list) and "items" in made:
        for item in value:
            yield from _violations(made["items"], item, f"{at}[]")
    if isinstance(value, dict):
        yield from (f"{at}.{key}" for key in made.get("required", ()) if key not in value)
        if "not" in made and not list(_violations(made["not"], value)):
            yield at
        for key, item in value.items():
            inner = made.get("properties", {}).get(key, made.get("additionalProperties"))
            if inner is not None:
                yield from _violations(inner, item, f"{at}.{key}")
