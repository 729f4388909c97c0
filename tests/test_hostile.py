"""Files from outside are hostile: whatever their bytes are, there is a clear error, or what they say is true. Never more memory than they are long."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from edgelora.data import template
from edgelora.errors import ModelError
from edgelora.gguf_header import read_header
from tests import hostile_files

CASES = 1000  # of either format
MOST_BYTES = 4 << 20


def bounded(read: Callable[[], bool]) -> bool:
    tracemalloc.start()
    try:
        return read()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_BYTES


def test_damaged_gguf_headers(tmp_path: Path) -> None:
    file, good, taken = tmp_path / "x.gguf", hostile_files.small_gguf(), 0
    file.write_bytes(good)
    assert hostile_files.read_gguf(file)
    for seed in range(CASES):
        file.write_bytes(hostile_files.damaged(good, random.Random(seed)))
        taken += bounded(lambda: hostile_files.read_gguf(file))
    assert 0.05 < taken / CASES < 0.6  # strokes that hit values alone leave a file that can be read


def test_damaged_safetensors(tmp_path: Path) -> None:
    file, good, taken = tmp_path / "model.safetensors", hostile_files.small_safetensors(), 0
    file.write_bytes(good)
    assert hostile_files.read_safetensors(tmp_path)
    for seed in range(CASES):
        file.write_bytes(hostile_files.damaged(good, random.Random(seed)))
        taken += bounded(lambda: hostile_files.read_safetensors(tmp_path))
    assert 0.02 < taken / CASES < 0.6


@pytest.mark.parametrize(
    "index",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": ".."}}', "[" * 10**5],
)  # fmt: skip
def test_damaged_index(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "model.safetensors").write_bytes(hostile_files.small_safetensors())
    assert not bounded(lambda: hostile_files.read_safetensors(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
        "{{ self._TemplateReference__context.environment.from_string('x') }}",
        "{{ messages.append.__self__.__class__.__base__.__subclasses__()[0] }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}{{ 'x' * 10**6 }}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ ['x'] * 10**9 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 10 ** (10 ** 8) }}",
        "{% set ns = namespace(a='x' * 2000000) %}{% for i in range(40) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{{ 'x'.__format__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ raise_exception('no') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 5000 + " }}",
    ],
)
def test_templates_that_run_code_or_never_end(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        template.render(text, [("user", "hello")], {})
    assert list(tmp_path.iterdir()) == []


def test_a_template_inside_a_file_is_only_text(tmp_path: Path) -> None:
    file, evil = tmp_path / "x.gguf", b"{{ ''.__class__.__mro__[1]}}"
    file.write_bytes(hostile_files.small_gguf().replace(b"{{ messages[0]['content'] }}", evil))
    text = read_header(file).chat_template
    assert text == evil.decode()
    with pytest.raises(ModelError, match="chat template"):
        template.render(text, [("user", "x")], {})
