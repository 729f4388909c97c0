"""The estimates in the headers of the recipes that come with the package: written by `python tests/recipe_headers.py --write`.

Each header names the command of its estimate; what that command says of one H100 and of the cheapest card stands below it.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from edgelora import estimate, gpus, outline
from edgelora import recipe as recipes
from edgelora.data import lengths, split
from edgelora.report.figures import plainest, seconds, size

RECIPES = Path(__file__).parent.parent / "recipes"
_BEGIN, _WIDTH = "# Estimated", 130
_CARD = "h100-80gb"


def described() -> list[Path]:
    """The recipes whose headers hold an estimate."""
    return [path for path in sorted(RECIPES.glob("*.yaml")) if _BEGIN in path.read_text(encoding="utf-8")]


def document(path: Path) -> dict[str, Any]:
    """What the header's own command prints, as `--json` does."""
    command = re.search(r"^# +edgelora estimate (.+)$", path.read_text(encoding="utf-8"), re.M)
    assert command is not None, path.name
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--tokens", type=int)
    asked = parser.parse_args(shlex.split(command[1]))
    assert asked.recipe == f"recipes/{path.name}"
    recipe, table = recipes.load(path), gpus.load()
    base = outline.of(recipe.base, recipe.folder)
    if asked.rows:
        found = lengths.assumed(asked.rows, asked.tokens, recipe.data.valid_share)
    else:
        found = lengths.of(recipe, base, split.load(recipe))
    return estimate.estimate(recipe, base, found, table, table.chosen([]))


def text(found: dict[str, Any]) -> str:
    """The lines of a header."""
    fitting = [row for row in found["devices"] if row["fits"]]
    card = next(row for row in fitting if row["gpu"] == _CARD)
    cheapest = min(fitting, key=lambda row: row["whole_dollars"])
    rows = found["rows_counted"].removeprefix("assumed: ") if "assumed" in found["rows_counted"] else f"{found['rows']:,} rows"
    epochs = f"{plainest(found['epochs'])} epoch{'' if found['epochs'] == 1 else 's'}"
    files = ", ".join(f"{row['format']} {size(row['size_bytes'])}" for row in found["files"])
    words = f"{_BEGIN} for {rows}, {epochs}. {_said(card)}."
    if cheapest is not card:
        words += f" {_said(cheapest)}."
    words += f" Results: {files}; {size(found['disk_bytes'])} of disk."
    return "\n".join(_wrapped(words))


def _said(row: dict[str, Any]) -> str:
    return (
        f"{row['device']}: {seconds(row['seconds'])} of training, {size(row['needed_bytes'])} of memory, ${row['dollars']:.2f} "
        f"(¥{row['yen']:,.0f}); all steps {seconds(row['whole_s'])}, ${row['whole_dollars']:.2f}"
    )


def _wrapped(words: str) -> list[str]:
    lines = [""]
    for word in words.split(" "):
        if len(lines[-1]) + 1 + len(word) > _WIDTH:
            lines.append("#")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def updated(path: Path) -> str:
    """The recipe's text with the estimate made anew."""
    old = path.read_text(encoding="utf-8")
    return re.sub(rf"{_BEGIN} for [^\n]*\n(?:# [^\n]+\n)*", lambda _: text(document(path)) + "\n", old, count=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    for path in described():
        path.write_text(updated(path), encoding="utf-8")


if __name__ == "__main__":
    main()
