"""APP.md beside a file for phones: what whoever builds the app has to know, and nothing else.

The few lines of Kotlin and Swift are ours, written after the libraries' sources; no compiler of either language runs where
files are exported, and the page says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from edgelora.data import template
from edgelora.runtime.text import FolderText

FILE = "APP.md"
# https://support.google.com/googleplay/android-developer/answer/9859372 and
# https://developer.apple.com/help/app-store-connect/reference/maximum-build-file-sizes, read in November 2026
_ASSET_PACK, _APP_STORE = 1_500_000_000, 4_000_000_000
_QUESTION = "qzquestion"  # a word that no template holds


@dataclass(frozen=True)
class Phone:
    """How one format gets into an app. `android` is a Maven coordinate, `ios` a Swift package and its products, "" where there is none.

    In `kotlin`, `swift` and `cpp` stand $file (its name), $prompt (a string literal around `question`) and $tokens (the longest context).
    """

    library: str
    android: str
    kotlin: str
    ios: str
    swift: str
    beside: tuple[str, ...] = ()  # files that the app needs too
    cpp: str = ""  # of a library without Kotlin and Swift: what both call


def write(folder: Path, facts: Mapping[str, Any], phone: Phone, texts: FolderText, tokens: int) -> Path:
    """Write APP.md into `folder`. `texts` is the model's tokenizer and template, `tokens` the longest context of the file."""
    target = folder / FILE
    target.write_text("\n".join(_lines(facts, phone, texts, tokens)) + "\n", encoding="utf-8")
    return target


def _lines(facts: Mapping[str, Any], phone: Phone, texts: FolderText, tokens: int) -> Iterator[str]:
    file, size = str(facts["file"]), int(facts["size_bytes"])
    prompt = template.render(texts.chat_template, (("user", _QUESTION),), texts.special_tokens)
    yield f"# {file} in an app\n"
    yield f"Runs in {phone.library}. {size / 1e6:.0f} MB, at most {tokens} tokens of question and answer together.\n"
    if phone.beside:
        yield f"The app needs beside it: {', '.join(f'`{name}`' for name in phone.beside)}.\n"
    yield "## Android\n"
    yield from _android(file, size)
    source = f'// build.gradle.kts: implementation("{phone.android}")\n' if phone.android else ""
    yield f"\n```kotlin\n{source}{_said(phone.kotlin, file, _literal(prompt, '$question', '$'), tokens)}```\n"
    yield "## iOS\n"
    if phone.swift:
        yield f"Add the file to the target's resources, or download it into Application Support. The App Store takes apps of up to {_APP_STORE / 1e9:.0f} GB.\n"
        yield f"```swift\n// {phone.ios}\n{_said(phone.swift, file, _literal(prompt, chr(92) + '(question)', ''), tokens)}```\n"
    else:
        yield "This format has no released runtime for iOS. Export the model as gguf (llama.cpp), executorch or mnn instead.\n"
    if phone.cpp:
        yield "## What both call\n"
        yield f"```cpp\n{_said(phone.cpp, file, _literal(prompt, '', ''), tokens)}```\n"
    yield "Core ML is not written: its files can be checked on a Mac only, and edgelora ships no file that it has not run.\n"
    yield "## Prompt and end\n"
    yield "The model was trained on this text and answers well to no other; `question` is what the user typed:\n"
    yield f"```\n{prompt.replace(_QUESTION, '{question}')}\n```\n"
    ends = ", ".join(f"`{texts.token(i)}` (id {i})" for i in texts.stop_ids)
    yield f"An answer ends at {ends}. The greedy choice (temperature 0) is what was measured.\n"
    yield "The lines above follow the libraries' own sources; they were not compiled where this file was made."


def _android(file: str, size: int) -> Iterator[str]:
    if size <= _ASSET_PACK:
        yield "Ship it as an asset pack of its own (Google Play allows 1.5 GB each), or download it on first start into `filesDir`."
    else:
        yield "It is larger than an asset pack of Google Play may be (1.5 GB): download it on first start into `filesDir`."
    yield f"While developing: `adb push {file} /data/local/tmp/`."


def _said(lines: str, file: str, prompt: str, tokens: int) -> str:
    return Template(lines).substitute(file=file, prompt=prompt, tokens=tokens, stem=Path(file).stem)


def _literal(prompt: str, question: str, also: str) -> str:
    """The prompt as a string literal of Kotlin or Swift that puts `question` in; `also` is a character that wants a backslash too."""
    escaped = prompt.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    if also:
        escaped = escaped.replace(also, "\\" + also)
    return '"' + escaped.replace(_QUESTION, question) + '"'
