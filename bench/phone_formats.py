"""Is a file for phones as near to its model as its exporter's own? LiteRT and MNN, our exports and the stock ones, on the same rows.

    edgelora doctor --install litert && edgelora doctor --install mnn
    python bench/phone_formats.py recipes/quickstart.yaml runs/quickstart/model-1a2b3c4d --rows recipes/data/edgelora-faq-paraphrase.jsonl --save

Ours are written as `edgelora run` writes them: 4 bits rounded by the recipe's training rows.
Stock means the exporter's own entry with its defaults at the same type, on the checkpoint as it lies: what it needs to run at all (a name
that it imports undeclared, settings where transformers 4 looks, no reports to a server) is given to it. Both files run in the
same runtime, their predictions made token by token as answers are. KL divergence from the model in float32, nats a token, with its 95 %
interval; aim: ours no worse. LiteRT's int8 is rounded by the same quantizer in both, so there the graphs should be equal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results

from edgelora import environments, evaluate, pipeline, tuned
from edgelora import recipe as recipes
from edgelora.data import split
from edgelora.data.chat import Encoded
from edgelora.export import child, elsewhere, litert, mnn, on_grid, samples, stage, transformers4
from edgelora.export.reference import Reference
from edgelora.quant import moments
from edgelora.quant.curvature import Moments
from edgelora.runtime import runtime
from edgelora.weights import Checkpoint

STOCK = {
    "litert": """
import sys; sys.path.insert(0, sys.argv[1])
import write_litert
write_litert.exporter()(model=sys.argv[2], output_dir=sys.argv[3], quantization_recipe=sys.argv[4], cache_length=2048, prefill_lengths=[128])
""",
    "mnn": """
import sys; sys.path.insert(0, sys.argv[1])
import write_mnn
write_mnn.exporter().export(sys.argv[2], dst_path=sys.argv[3], export="mnn", quant_bit=int(sys.argv[4]))
""",
}
TYPES = {"litert": ("int4", "int8"), "mnn": ("int4", "int8")}


def quiet(share: float, text: str) -> None:
    pass


def measured(recipe: Path, model: Path, work: Path) -> Moments:
    """What `edgelora run` rounds by: second moments of the model's inputs on the recipe's training rows."""
    wanted = recipes.load(recipes.locate(recipe))
    rows = pipeline.planning_rows(wanted, model, split.load(wanted))
    return on_grid.calibration(moments.measure(tuned.plain(model, model.name), rows, work, quiet).path / moments.FILE)


def stock(name: str, model: Path, type: str, folder: Path) -> Path:
    """What the exporter leaves by itself."""
    target, source, how = folder / "stock", model, str(litert._ROUNDING[type])
    (folder / "tmp").mkdir()
    if name == "mnn":
        source, how = transformers4.described(model, folder), str(mnn._BITS[type])
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        said = json.loads((model / "config.json").read_text(encoding="utf-8")).get("dtype", "float32")
        (source / "config.json").write_text(json.dumps(config | {"torch_dtype": said}), encoding="utf-8")
    command = [str(environments.python(name)), "-c", STOCK[name], str(elsewhere.THERE), str(source), str(target), how]
    done = subprocess.run(command, cwd=folder, env=child.environment(folder), capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"the stock exporter of {name} failed: {done.stderr.strip().splitlines()[-1]}")
    if name == "mnn":
        mnn._settle(target, 2048)  # how many tokens it may hold; the rest of it concerns sampling
        return target
    return target / "model.litertlm"


def row(reference: Reference, path: Path, name: str, rows: Sequence[Encoded]) -> dict[str, Any]:
    with runtime(stage.format_module(name).RUNTIME).open(path, 1) as session:
        found = evaluate.divergence_summary(evaluate.divergence(reference, session, rows))
    return {"size_bytes": stage.size_bytes(path), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="of which the training rows say how to round")
    parser.add_argument("model", type=Path, help="merged model, a Hugging Face folder")
    parser.add_argument("--rows", type=Path, help="data file of rows that were not trained on")
    parser.add_argument("--most", type=int, default=40, help="rows that are compared")
    parser.add_argument("--format", choices=STOCK, action="append", dest="formats", help="only this one")
    parser.add_argument("--save", action="store_true", help="keep the figures among the results")
    given = parser.parse_args()
    model = given.model.resolve()
    rows = samples.rows(model, given.rows)[0][: given.most]
    reference = Reference(model, Checkpoint(model), None, rows, 1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        known = measured(given.recipe, model, Path(folder))
    for name in given.formats or STOCK:
        for type in TYPES[name]:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "ours").mkdir()
                ours = stage.format_module(name).write(model, type, Path(folder) / "ours", "x", quiet, known)
                found[f"{name} {type}"] = {
                    "ours": row(reference, ours, name, rows),
                    "stock": row(reference, stock(name, model, type, Path(folder)), name, rows),
                }
            print(f"{name} {type}: {said(found[f'{name} {type}'])}", flush=True)
    if "litert" in (given.formats or STOCK):
        with tempfile.TemporaryDirectory() as folder:
            coarse = litert.write(model, "int4-channel", Path(folder), "x", quiet)
            found["litert int4-channel"] = {"as written": row(reference, coarse, "litert", rows)}
        print(f"litert int4-channel: {said(found['litert int4-channel'])}", flush=True)
    headline = [(name, said(pair)) for name, pair in found.items()]
    if given.save:
        versions = ("torch", "transformers")
        about = {key: environments.versions(key) for key in STOCK}
        results.save(
            "phone-formats",
            f"python bench/phone_formats.py {given.recipe} MODEL --rows {given.rows}",
            versions,
            headline,
            {"environments": about, "rows": found},
        )


def said(pair: dict[str, Any]) -> str:
    parts = [
        f"{whose} KL {r['kl']:.4f} ({r['kl_low']:.4f} to {r['kl_high']:.4f}), {r['size_bytes'] / 1e6:.1f} MB" for whose, r in pair.items()
    ]
    return "; ".join(parts)


if __name__ == "__main__":
    main()
