"""How far `edgelora bench --estimate` is from speeds that others published: each row predicted from the others.

    python bench/estimates.py

For every runtime of edgelora/devices.yaml: the error of each published row when it is left out, and where a runtime was
measured on several devices, when its whole device is left out. Aim: 25 %. A runtime with fewer than three rows is not
validated. Computes nothing but that; the figures are as old as the table.
"""

from __future__ import annotations

from typing import Any

import results

from edgelora import roofline


def main() -> None:
    table = roofline.load()
    found: dict[str, Any] = {}
    headline = []
    for runtime in dict.fromkeys(row.runtime for row in table.published):
        kinds = {"row left out": roofline.leave_one_out(table, runtime), "device left out": roofline.leave_one_out(table, runtime, True)}
        found[runtime] = {
            kind: [
                {"device": row.device, "model": row.model, "published": row.decode_tok_per_s, "error": round(error, 4)}
                for row, error in rows
            ]
            for kind, rows in kinds.items()
        }
        for kind, rows in kinds.items():
            for row, error in rows:
                print(f"{runtime:12} {kind:16} {row.device:18} {row.model:26} {row.decode_tok_per_s:7.2f} tok/s {error:+.1%}")
        worst = {kind: max((abs(error) for _, error in rows), default=None) for kind, rows in kinds.items()}
        words = ", ".join(f"at most {value:.1%} with a {kind}" for kind, value in worst.items() if value is not None)
        headline.append([f"{runtime} ({len(table.rows_of(runtime))} published figures)", words or "not validated"])
        print(f"{runtime}: {words or 'not validated'}")
    results.save("estimates", "python bench/estimates.py", (), headline, {"errors": found})


if __name__ == "__main__":
    main()
