"""The Modelfile beside a GGUF file: its template says what the file's own template says."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from edgelora.data import template
from edgelora.errors import ModelError
from edgelora.export import gguf as export
from edgelora.export import modelfile
from tests.tiny_models import CHAT_TEMPLATE, tiny_model

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles') }}"
    "{%- endif -%}{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}{%- else -%}{%- set role = message['role'] -%}"
    "{%- endif -%}{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'system' %}{{ '<<SYS>>' + message['content'] + '<</SYS>> ' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ {'system': '', 'user': 'User: ', 'assistant': 'Assistant: '}[m['role']] + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
TALKS = (
    (("user", "Hi {{ .System }}"),),
    (("system", 'Be "brief".\nAlways.'), ("user", "2 + 2?"), ("assistant", "4"), ("user", "And 3 + 3?")),
)


def rendered(jinja: str, messages: modelfile.Messages) -> str | None:
    try:
        return template.render(jinja, messages, SPECIALS)
    except ModelError:  # this template takes no such conversation
        return None


@pytest.mark.parametrize("jinja", [CHAT_TEMPLATE, SMOLLM2, GEMMA, MISTRAL, PLAIN], ids=["chatml", "smollm2", "gemma", "mistral", "plain"])
def test_translation_renders_the_same(jinja: str) -> None:
    turns = modelfile.read_off(lambda messages: rendered(jinja, messages))
    assert turns is not None
    for talk in TALKS:
        assert turns.render(talk) == rendered(jinja, talk)


@pytest.mark.skipif(shutil.which("go") is None, reason="the go command is not installed")
@pytest.mark.parametrize("jinja", [CHAT_TEMPLATE, SMOLLM2, GEMMA, MISTRAL, PLAIN], ids=["chatml", "smollm2", "gemma", "mistral", "plain"])
def test_go_renders_what_we_say_it_does(jinja: str, tmp_path: Path) -> None:
    turns = modelfile.read_off(lambda messages: rendered(jinja, messages))
    assert turns is not None
    cases = [
        {"System": next((c for r, c in talk if r == "system"), ""), "Messages": [{"Role": r, "Content": c} for r, c in talk]}
        for talk in TALKS
    ]
    (tmp_path / "main.go").write_text(
        'package main\nimport ("encoding/json"; "os"; "strings"; "text/template")\n'
        "type M struct { Role, Content string }\ntype C struct { System string; Messages []M }\n"
        "func main() { var in struct { Go string; Cases []C }; json.NewDecoder(os.Stdin).Decode(&in); out := []string{}\n"
        't := template.Must(template.New("t").Parse(in.Go)); for _, c := range in.Cases { var b strings.Builder\n'
        "if err := t.Execute(&b, c); err != nil { panic(err) }; out = append(out, b.String()) }; json.NewEncoder(os.Stdout).Encode(out) }\n"
    )
    given = json.dumps({"Go": turns.go(), "Cases": cases})
    done = subprocess.run(["go", "run", "main.go"], cwd=tmp_path, input=given, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [turns.render(talk) for talk in TALKS]


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",  # numbers its turns
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{{ messages[-1]['content'] }}",  # forgets what was said
        "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0]['content'] }}",
    ],
)
def test_what_cannot_be_said_is_not_translated(jinja: str) -> None:
    assert modelfile.read_off(lambda messages: rendered(jinja, messages)) is None


def test_the_file(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "model")
    file = export.write(folder, "q8_0", tmp_path, "tiny", lambda share, text: None)
    text = modelfile.write(file, licence="apache-2.0").read_text()
    assert text.splitlines()[:2] == ["# ollama create tiny-q8_0 -f Modelfile", "FROM ./tiny-q8_0.gguf"]
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "PARAMETER num_ctx 256" in text
    assert "PARAMETER temperature 0" in text
    assert 'TEMPLATE """{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}' in text
    assert 'LICENSE """apache-2.0"""' in text
    assert "ADAPTER ./bot.gguf" in modelfile.write(file, adapter=tmp_path / "bot.gguf").read_text()


def test_a_template_that_cannot_be_translated_is_said(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] | upper }}")
    file = export.write(folder, "q8_0", tmp_path, "tiny", lambda share, text: None)
    text = modelfile.write(file).read_text()
    assert "TEMPLATE" not in text
    assert "cannot be said in Go's template language" in text
