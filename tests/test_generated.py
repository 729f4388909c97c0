"""What documents hold that a program wrote: as the program would write it today."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import reference

ROOT = Path(__file__).parent.parent
AGAIN = "run `make docs`"


@pytest.fixture(scope="module")
def results() -> Any:
    """bench/results.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "bench" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_current_reference() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert reference.updated(text) == text, AGAIN


def test_the_table_of_results_is_current(results: Any) -> None:
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert results.whole(text) == text, AGAIN


@pytest.mark.parametrize("document", ["README.md", "bench/README.md", "bench/NOTES.md"])
def test_what_a_document_points_to_is_there(document: str) -> None:
    file = ROOT / document
    found = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8"))
    assert [target for target in found if not (file.parent / target).exists()] == []


def test_every_result_says_what_was_found_where_and_at_which_commit(results: Any) -> None:
    files = sorted((ROOT / "bench" / "results").glob("*/*.json"))
    assert files
    for path in files:
        document = json.loads(path.read_text(encoding="utf-8"))
        _, commit, what = results.parted(path)
        assert document["commit"] == commit, path.name
        assert results.headline(document), path.name
        assert what, path.name


def test_a_result_is_saved_with_its_machine_and_listed(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "HERE", tmp_path)
    path = results.save("speed", "python bench/speed.py", ("numpy",), [["a | b", "3 tok/s"]], {"rows": [1]})
    document = json.loads(path.read_text(encoding="utf-8"))
    assert path.parent.name == document["machine"]["class"]
    assert document["rows"] == [1]
    assert set(document["versions"]) == {"edgelora", "numpy"}
    row = results.table(tmp_path / "results").splitlines()[-1]
    assert row.split(" | ")[-1] == "a \\| b: 3 tok/s |"
    assert f"| {document['date']} | {document['commit']} | [speed](results/{path.parent.name}/{path.name}) |" in row
