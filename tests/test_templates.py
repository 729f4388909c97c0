"""Masks under the ways in which stock templates behave. The templates are ours; what they do is what those of the models do.

Llama 3.1: a header with dates before everything, end-of-turn tokens, content trimmed. Qwen 3: thinking is taken out of
earlier answers, the last one gets an empty block of it. Gemma: no system turn, turns must alternate, the assistant is
called "model", a turn ends with a token that is not end-of-sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgelora import models
from edgelora.data import chat, template
from edgelora.data.row import Row
from edgelora.errors import DataError, ModelError

LLAMA = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
QWEN = """
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.last %}
            {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in message.content else '' %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + said + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + said + '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
GEMMA = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}U:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
TURNS = (("user", "one?"), ("assistant", "<think>\nhm\n</think>\n\nuno"), ("user", "two?"), ("assistant", " dos "))
PLAIN = tuple((role, content.split("\n")[-1].strip()) for role, content in TURNS)


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return models.open_tokenizer(tiny_base)


def trained(tokenizer: Any, row: Row) -> str:
    encoded = chat.encode(tokenizer, row)
    return str(tokenizer.decode([i for i, on in zip(encoded.ids, encoded.trained, strict=True) if on]))


def test_llama(tokenizer: Any) -> None:
    tokenizer.chat_template = LLAMA
    row = Row((("system", "S"), *PLAIN), 1)
    assert "Today Date: 26 Jul 2024" in chat.render(tokenizer, row.messages)
    assert trained(tokenizer, row) == f"uno<|eot_id|>dos<|eot_id|>{tokenizer.eos_token}"
    assert chat.parts(tokenizer, row) == [row]


def test_qwen_trains_every_answer_as_it_is_said(tokenizer: Any) -> None:
    tokenizer.chat_template = QWEN
    row = Row(TURNS, 1)
    first, last = chat.parts(tokenizer, row)
    assert (first.messages, last) == (TURNS[:2], row)
    assert trained(tokenizer, first) == "<think>\nhm\n</think>\n\nuno<|im_end|>"
    assert trained(tokenizer, last) == "<think>\n\n</think>\n\n dos <|im_end|>"
    assert "hm" not in tokenizer.decode(chat.encode(tokenizer, last).ids)
    assert len(chat.encode_all(tokenizer, [row], 512)) == 2


def test_gemma_gets_the_system_message_in_the_first_turn(tokenizer: Any) -> None:
    tokenizer.chat_template = GEMMA
    assert trained(tokenizer, Row(PLAIN, 1)) == f"uno<end_of_turn>dos<end_of_turn>{tokenizer.eos_token}"
    with pytest.raises(DataError, match=r"line 7: the chat template fails: Conversation roles must alternate"):
        chat.encode(tokenizer, Row((*PLAIN[:1], *PLAIN), 7))
    with pytest.raises(DataError, match="System role not supported"):
        chat.encode(tokenizer, Row((("system", "S"), *PLAIN), 7))
    tokenizer.chat_template = chat.taking_system(tokenizer)
    assert trained(tokenizer, Row(PLAIN, 1)) == f"uno<end_of_turn>dos<end_of_turn>{tokenizer.eos_token}"
    text = chat.render(tokenizer, (("system", "S"), *PLAIN))
    assert "<start_of_turn>user\nS\n\none?<end_of_turn>" in text
    given = chat.with_system(tokenizer.chat_template, "S")
    assert template.render(given, PLAIN, tokenizer.special_tokens_map, open_turn=False) == text


def test_a_base_that_refuses_system_messages_is_opened_with_a_template_that_takes_them(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(tiny_base, tmp_path / "gemma")
    (folder / "chat_template.jinja").write_text(GEMMA)
    opened = models.open_tokenizer(folder)
    assert "S\n\nHi" in chat.render(opened, (("system", "S"), ("user", "Hi")))
    opened.save_pretrained(tmp_path / "saved")
    assert models.open_tokenizer(tmp_path / "saved").chat_template == opened.chat_template


@pytest.mark.parametrize("written", [LLAMA, QWEN, GEMMA, MARKED])
def test_rendering_equals_transformers(tokenizer: Any, written: str) -> None:
    """But for the date, which transformers takes from the clock."""
    tokenizer.chat_template = written
    for messages, open_turn in ((PLAIN, False), (PLAIN[:1], True), (PLAIN[:3], True)):
        theirs = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=open_turn,
            date_string="26 Jul 2024",
        )
        assert chat.render(tokenizer, messages, open_turn=open_turn) == theirs


def test_generation_marks_are_text_like_any_other(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED
    assert trained(tokenizer, Row(PLAIN, 1)) == f"uno{tokenizer.eos_token}dos{tokenizer.eos_token}"


def test_a_template_that_swallows_answers_is_an_error(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    with pytest.raises((DataError, ModelError)):
        chat.encode(tokenizer, Row(PLAIN, 1))


def test_plain_text_is_trained_as_a_whole(tokenizer: Any) -> None:
    assert trained(tokenizer, Row((("text", "Once upon a time"),), 1)) == f"Once upon a time{tokenizer.eos_token}"
