"""ExecuTorch files as edgelora writes them against those of ExecuTorch's own command line: divergence, bytes, cost.

    python bench/executorch_stock.py recipes/quickstart.yaml MODEL --rows FILE --work DIR [--save]

MODEL is a merged folder of the llama architecture, for instance `runs/quickstart/model-...`. Ours is written as `edgelora run` writes it,
rounded by the recipe's training rows. ExecuTorch's command line (`export_llm`, 8da4w in groups of 32, 4-bit embedding) wants Meta's
layout: rows of q and k in pairs, a checkpoint in torch's format, parameters in JSON; both are written for it. Both files are run in
ExecuTorch and compared with MODEL in float32 on the same rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
from pathlib import Path
from typing import Any

import results
import torch
from phone_formats import measured, quiet

from edgelora import environments, evaluate
from edgelora.export import child, configuration, samples
from edgelora.export import executorch as export
from edgelora.export import executorch_layout as layout
from edgelora.export.reference import Reference
from edgelora.runtime import executorch as runtime
from edgelora.weights import Checkpoint

PACKAGES = ("torch", "transformers")


def spent() -> tuple[float, int]:
    """CPU seconds of this process and all its children so far, and the children's largest resident set (bytes)."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both), both[1].ru_maxrss * 1024


def in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in Meta's order: numbers that are turned together stand side by side, not half a head apart."""
    return rows.view(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def meta(model: Path, work: Path) -> tuple[Path, Path]:
    """Checkpoint and parameters as `export_llm` reads them."""
    config, checkpoint = configuration.opened(model), Checkpoint(model)
    made = {}
    for name, (source, first, end) in layout.tensors(config, checkpoint.shapes).items():
        vector = len(checkpoint.shapes[source]) == 1
        values = torch.from_numpy((checkpoint.rows(source)[0] if vector else checkpoint.rows(source, first, end)).copy())
        heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}.get(name.split(".")[-2])
        made[name] = in_pairs(values, heads) if heads else values
    torch.save(made, work / "meta.pth")
    keep = ("dim", "hidden_dim", "n_heads", "n_kv_heads", "n_layers", "vocab_size", "norm_eps")
    params = {key: value for key, value in layout.params(config, checkpoint.shapes, 1).items() if key in keep}
    params |= {"rope_theta": config.rope_parameters["rope_theta"], "use_scaled_rope": False, "multiple_of": 32}
    (work / "params.json").write_text(json.dumps(params), encoding="utf-8")
    return work / "meta.pth", work / "params.json"


def stock(model: Path, work: Path) -> Path:
    """The file that ExecuTorch's command line writes."""
    checkpoint, params = meta(model, work)
    longest = export.context(model)
    told = json.dumps(json.dumps({key: export._job(model, "int4")["methods"][key] for key in ("get_bos_id", "get_eos_ids")}))
    command = [
        str(environments.python("executorch")),
        *("-m", "executorch.extension.llm.export.export_llm", "base.model_class=smollm2", f"base.params={params}"),
        *(f"base.checkpoint={checkpoint}", f"base.metadata={told}", "model.use_kv_cache=True", "model.use_sdpa_with_kv_cache=True"),
        *("model.dtype_override=fp32", "quantization.qmode=8da4w", "quantization.group_size=32"),
        *("quantization.embedding_quantize='4,32'", "backend.xnnpack.enabled=True", "backend.xnnpack.extended_ops=True"),
        *(f"export.max_seq_length={longest}", f"export.max_context_length={longest}", f"export.output_name={work / 'stock.pte'}"),
    ]
    environment = {key: value for key, value in child.environment(work).items() if key != "PYTHONPATH"}
    (work / "tmp").mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return work / "stock.pte"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    work: Path = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    files = {}
    known = measured(given.recipe, given.model, work)
    for who in ("export_llm", "edgelora"):
        before, _ = spent()
        files[who] = stock(given.model, work) if who == "export_llm" else export.write(given.model, "int4", work, "ours", quiet, known)
        after, rss = spent()
        found[who] = {"cpu_s": after - before, "peak_rss_bytes_so_far": rss, "size_bytes": files[who].stat().st_size}
    rows = samples.rows(given.model, given.rows)[0][: given.most]
    reference = Reference(given.model, Checkpoint(given.model), None, rows, 1)
    for who, file in files.items():
        with runtime.open(file, 1) as session:
            found[who] |= evaluate.divergence_summary(evaluate.divergence(reference, session, rows))
        print(who, found[who], flush=True)
    headline = [
        (who, f"{row['size_bytes'] / 1e6:.1f} MB, KL {row['kl']:.4f} [{row['kl_low']:.4f}, {row['kl_high']:.4f}], {row['cpu_s']:.0f} CPU-s")
        for who, row in found.items()
    ]
    if given.save:
        results.save(
            "executorch-stock",
            f"python bench/executorch_stock.py {given.recipe} MODEL --rows {given.rows} --work DIR",
            PACKAGES,
            headline,
            {"found": found},
        )


if __name__ == "__main__":
    main()
