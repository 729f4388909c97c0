"""Artifacts: a folder that exists is finished, and nothing else ever carries a final name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgelora import artifact
from edgelora.errors import DiskFull, EdgeloraError, ModelError

GIVEN = {"made_from": {"a": "1"}, "recipe": {"x": 2}, "versions": {"edgelora": "0"}}


def write_hello(folder: Path) -> dict[str, int]:
    (folder / "sub").mkdir()
    (folder / "sub" / "hello.txt").write_text("hello")
    return {"n": 5}


def test_made_once_and_found_again(tmp_path: Path) -> None:
    made = artifact.build(tmp_path, "thing", "kind", write_hello, **GIVEN)
    assert made.path.name == f"thing-{made.key[:8]}"
    assert made.files == {"sub/hello.txt": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}
    assert (made.bytes, made.facts) == (5, {"n": 5})

    def never(folder: Path) -> dict[str, int]:
        raise AssertionError("made twice")

    assert artifact.build(tmp_path, "thing", "kind", never, **GIVEN) == made


def test_any_change_of_input_makes_another(tmp_path: Path) -> None:
    keys = {artifact.build(tmp_path, "thing", "kind", write_hello, **{**GIVEN, name: {"other": "value"}}).key for name in GIVEN} | {
        artifact.build(tmp_path, "thing", "kind", write_hello, **GIVEN).key
    }
    assert len(keys) == 4


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> dict[str, int]:
        (folder / "half").write_text("x")
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        artifact.build(tmp_path, "thing", "kind", fails, **GIVEN)
    assert list(tmp_path.iterdir()) == []


def test_a_resumable_stage_finds_what_it_left(tmp_path: Path) -> None:
    seen = []

    def make(folder: Path) -> dict[str, int]:
        seen.append((folder / "checkpoint").exists())
        (folder / "checkpoint").touch()
        if len(seen) == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        artifact.build(tmp_path, "thing", "kind", make, resumable=True, **GIVEN)
    artifact.build(tmp_path, "thing", "kind", make, resumable=True, **GIVEN)
    assert seen == [False, True]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    def fills(folder: Path) -> dict[str, int]:
        with open("/dev/full", "w") as full:
            full.write("x" * 100_000)
        return {}

    with pytest.raises(DiskFull, match="no space left on the disk"):
        artifact.build(tmp_path, "thing", "kind", fills, **GIVEN)
    assert list(tmp_path.iterdir()) == []


def test_what_libraries_say_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    with pytest.raises(DiskFull), artifact.writing(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_two_commands_do_not_write_into_one_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from edgelora import artifact\nwith artifact.locked(Path(sys.argv[1])): pass"
    with artifact.locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert other.returncode != 0
    assert "another edgelora command is writing into" in other.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "kind": "a", "key": "b", "bytes": 1, "surprise": 2}']
)
def test_a_damaged_manifest_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match=r"damaged|another version"):
        artifact.load(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(EdgeloraError, match="is not an edgelora artifact"):
        artifact.load(tmp_path)


def test_the_manifest_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    made = artifact.build(tmp_path, "thing", "kind", write_hello, **GIVEN)
    text = (made.path / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["made_from"] == {"a": "1"}
