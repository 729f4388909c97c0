"""Whether every ONNX type loads where it should, with the same answers: four runtimes, one question.

    python bench/onnx_loads.py FOLDER... --question "What is edgelora?"

FOLDER is an exported folder, NAME-TYPE-onnx. ONNX Runtime's greedy answer is the yardstick for onnxruntime-genai,
transformers.js in Node, and the page of the web folder in Chromium (transformers.js on onnxruntime-web's WASM build). Needs
`edgelora doctor --install web`, Node and Chromium. Answers may part after many tokens: kernels round differently.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import Any

import results

from edgelora import environments
from edgelora.data import template
from edgelora.export import onnx_web
from edgelora.runtime import runtime

BROWSER = Path(__file__).parent.parent / "tests" / "browser.mjs"
TOKENS = 48


def in_python(folder: Path, name: str, question: str) -> tuple[str, list[int], str]:
    """Prompt, greedy ids and text of one runtime."""
    with runtime(name).open(folder, 1) as session:
        prompt = template.render(session.chat_template, [("user", question)], session.special_tokens)
        ids = [*session.generate(session.tokenize(prompt), TOKENS, session.stop_ids)]
        return prompt, ids, session.detokenize(ids)


def in_chromium(folder: Path, question: str) -> dict[str, Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    playwright = environments.require("web") / "node_modules" / "playwright-core" / "index.mjs"
    command = ["node", str(BROWSER), str(playwright), chromium, str(folder.parent), folder.name, question]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "no answer"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(folder: Path, question: str, work: Path) -> dict[str, Any]:
    kind = folder.name.removesuffix("-onnx").split("-", 1)[1]
    prompt, ids, expected = in_python(folder, "onnxruntime", question)
    genai = in_python(folder, "onnxruntime-genai", question)[2]
    web = onnx_web.write(folder, kind, work / f"{folder.name.removesuffix('-onnx')}-web")
    rendered = template.render((folder / "chat_template.jinja").read_text(encoding="utf-8"), [("user", "Hello")], {})
    node = onnx_web.check(web, {}, {prompt: ids}, rendered)
    page = in_chromium(web, question)
    answer = str(page.get("answer", ""))
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, expected, strict=False)))
    shutil.rmtree(web)
    return {
        "type": kind,
        "onnxruntime": expected,
        "onnxruntime-genai": genai,
        "transformers.js in Node": node,
        "Chromium": page | {"characters_alike": alike},
        "found": {
            "onnxruntime-genai": "the same answer" if genai == expected else "another answer",
            "transformers.js in Node": "the same answer" if node.get("same_text") else "another answer",
            "Chromium": "the same answer" if answer and alike in (len(answer), len(expected)) else f"the same first {alike} characters",
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--question", default="What is edgelora?")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for folder in arguments.folders:
            rows.append(row(folder, arguments.question, Path(work)))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    headline = [(one["type"], ", ".join(f"{name}: {said}" for name, said in one["found"].items())) for one in rows]
    results.save(
        "onnx-loads",
        "python bench/onnx_loads.py FOLDER...",
        ("onnxruntime", "onnxruntime-genai"),
        headline,
        {"question": arguments.question, "rows": rows},
    )


if __name__ == "__main__":
    main()
