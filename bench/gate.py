"""What edgelora gates on itself: the bytes of the quick start's files and of the wheel, and what `--help` loads.

    make gate

Writes a report with the files' sizes and the wheel into a folder; `edgelora check` judges both with `budgets.yaml` and the
baseline in `baselines/`. After a change that is meant: `edgelora baseline update runs/gate -o bench/baselines`.

The exported files' sizes are predicted from headers, exact to the byte for GGUF: nothing is trained. Import time is told in
modules, which no busy machine can change.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgelora import __version__, machine, models
from edgelora import recipe as recipes
from edgelora.export import stage

ROOT = Path(__file__).parent.parent
_MOST_MODULES = 250  # 183 when this was written, most of them click's and Python's own
_MODULES = "import sys\nfrom edgelora.cli import main\nsys.argv = ['edgelora', '--help']\ntry: main()\nexcept SystemExit: print(len(sys.modules), file=sys.stderr)"


def files(out: Path) -> list[dict[str, Any]]:
    recipe = recipes.load(ROOT / "recipes" / "quickstart.yaml")
    base = models.open_base(recipe.base, recipe.folder, out)
    rows = []
    for section in map(stage.resolve, recipe.exports):
        module = stage.format_module(section.format)
        size = module.predict_bytes(base.folder, section.type, recipe.name)
        rows.append(
            {"file": f"quickstart {section.format} {section.type}", "format": section.format, "type": section.type, "size_bytes": size}
        )
    return rows


def wheel(out: Path) -> None:
    for old in out.glob("edgelora-*.whl"):
        old.unlink()
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)], check=True)


def modules() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", _MODULES], capture_output=True, text=True, check=True)
    return {"what": "modules that `edgelora --help` loads", "count": int(done.stderr.split()[-1])}


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    wheel(out)
    loaded = modules()
    document = {
        "schema": 1,
        "name": "edgelora itself",
        "created": datetime.now(UTC).date().isoformat(),
        "edgelora": __version__,
        "machine": machine.describe(),
        "files": files(out),
        "notes": [f"{loaded['what']}: {loaded['count']}"],
    }
    (out / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if loaded["count"] > _MOST_MODULES:
        sys.exit(f"{loaded['what']}: {loaded['count']}, limit {_MOST_MODULES}")


if __name__ == "__main__":
    main()
