"""The report of a run: one document, shown as JSON, as Markdown for a pull request, and as one HTML page.

    schema      what the document may hold, and `validate`; contract: the same as a JSON Schema
    figures     a number -> text with its unit
    tables      the document -> tables of text, shared by Markdown and HTML
    markdown    fits a pull-request comment
    page        one self-contained HTML file, nothing fetched; plot draws its SVG, style dresses it, sorting is its one script
    fronts      Pareto plots, and which files answer nonsense; agreement: and which do so in a browser
    turns       files of one bench, each against its first
    document    files benched outside of a run -> the document
    comparison  several documents -> one, rows joined by file type; differences: what of it is noise

Nothing here needs more than the standard library. A figure that was not measured is absent from the document
(or null) and then appears nowhere: no dash, no zero, no heading of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelora.artifact import writing
from edgelora.errors import EdgeloraError, ModelError
from edgelora.report.comparison import compare, findings, over_commits
from edgelora.report.contract import json_schema
from edgelora.report.document import of_files, parts
from edgelora.report.markdown import to_markdown
from edgelora.report.page import to_html
from edgelora.report.schema import SCHEMA, is_comparison, plain, validate

__all__ = [
    "SCHEMA",
    "compare",
    "findings",
    "json_schema",
    "of_files",
    "over_commits",
    "parts",
    "read",
    "to_html",
    "to_json",
    "to_markdown",
    "validate",
    "write",
]

MAX_BYTES = 64 << 20


def to_json(doc: Mapping[str, Any]) -> str:
    """The document as JSON text. NaN and infinities, which JSON does not have, become null: not measured."""
    return json.dumps(plain(doc), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write(doc: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write report.json, report.md and report.html (of a comparison: comparison.*) into `folder`.

    Returns the three paths by suffix (``json``, ``md``, ``html``). Each file appears whole or not at all.
    ModelError when the document is not one that `read` would accept; DiskFull when there is no room; EdgeloraError when
    `folder` cannot be written.
    """
    doc = plain(doc)
    validate(doc, "the report")
    stem = "history" if doc.get("over") else "comparison" if is_comparison(doc) else "report"
    texts = {"html": to_html(doc), "md": to_markdown(doc), "json": to_json(doc)}
    paths = {suffix: folder / f"{stem}.{suffix}" for suffix in texts}
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for suffix, text in texts.items():
                _replace(paths[suffix], text)
    except OSError as error:
        raise EdgeloraError(f"cannot write the report into {folder}: {error.strerror}", "name a folder that you may write to") from error
    return paths


def read(path: Path) -> dict[str, Any]:
    """Read and validate a report.json, or the one in the folder `path`.

    ModelError when it is missing, larger than 64 MiB, not JSON, of another schema, or has a section of a wrong type.
    """
    path = path / "report.json" if path.is_dir() else path
    again = "name a report.json that edgelora wrote, or the folder it lies in"
    if not path.is_file():
        raise ModelError(f"there is no report at {path}", again)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ModelError(f"cannot read the report {path}: {error.strerror}", again) from error
    if len(data) > MAX_BYTES:
        raise ModelError(f"{path} is larger than 64 MiB", again)
    try:
        doc = json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not a report: {error}", again) from error
    validate(doc, str(path))
    return dict(doc)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
