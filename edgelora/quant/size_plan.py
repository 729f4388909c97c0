"""Which type each tensor gets so that the file keeps within a size, or a loss, at the best exchange.

A menu lists, for every tensor that has a choice, what it may be stored as: bytes, and the predicted KL divergence that the
rounding costs. Costs add up (to second order, errors of different matrices are independent), so the best plan of
every size is a knapsack. Nothing here knows what a type is: an exporter that can name its options and their bytes is served.
A file that was measured corrects the menu it was planned from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from edgelora.errors import ModelError, Unsupported
from edgelora.quant.knapsack import Frontier

SCHEMA = 1
_POINTS = 40  # of a frontier that is shown
_FARTHEST = 16.0  # how many times a measured file may correct costs
_MOST_BYTES = 16 << 20  # of a plan's file


@dataclass(frozen=True)
class Option:
    """One way of storing a tensor: the format's name of it, bytes in the file, predicted cost in nats an answer token."""

    type: str
    bytes: int
    cost: float


@dataclass(frozen=True)
class Plan:
    """Types by tensor; the exact bytes of the file; the predicted KL divergence, nats an answer token."""

    types: Mapping[str, str]
    size_bytes: int
    kl: float


@dataclass(frozen=True)
class Menu:
    """`options` of every tensor that has a choice; `fixed_bytes` is all else in the file: metadata, tokenizer, vectors.

    Costs of the tensors in `outright` are losses computed as such (the head's), those of the others quadratic forms.
    """

    options: Mapping[str, tuple[Option, ...]]
    fixed_bytes: int
    outright: frozenset[str] = frozenset()
    measured: bool = True  # whether costs are losses; else they only tell better from worse

    def plan(self, max_bytes: int) -> Plan:
        """The plan of least predicted loss within `max_bytes`; Unsupported names the smallest size when nothing fits."""
        try:
            return self._plan(self._frontier.choose(max_bytes - self.fixed_bytes))
        except ValueError:
            smallest = self.smallest()
            # without data a cost is no loss
            smallest_loss = f", with a predicted KL of {smallest.kl:.2g} nats a token" if self.measured else ""
            raise Unsupported(
                f"{max_bytes / 1e6:.1f} MB cannot be reached: the smallest file is {smallest.size_bytes / 1e6:.1f} MB "
                f"({smallest.size_bytes} bytes){smallest_loss}",
                self.ways(max_bytes),
            ) from None

    def plan_within(self, kl: float) -> Plan:
        """The smallest plan whose predicted loss is at most `kl`, the best one where none is."""
        return self._plan(self._frontier.within(kl) or self._frontier.choose(self._frontier.largest))

    def smallest(self) -> Plan:
        return self._plan(self._frontier.choose(self._frontier.smallest))

    def frontier(self, points: int = _POINTS) -> list[Plan]:
        """Best plans from the smallest to the largest size that pays, evenly spaced, none twice."""
        least, most = self._frontier.smallest, self._frontier.largest
        found: dict[int, Plan] = {}
        for i in range(points):
            plan = self._plan(self._frontier.choose(least + (most - least) * i // (points - 1)))
            found.setdefault(plan.size_bytes, plan)
        return list(found.values())

    def corrected(self, plan: Plan, kl: float) -> Menu:
        """The same after the file of one of its plans was measured: quadratic forms are scaled so that `plan` is predicted to cost `kl`.

        A quadratic form at a point where the model is nearly sure of its answers takes errors for smaller than they are, and with them
        everything but the head. Within 1/16 and 16 times: what is further off is no matter of scale.
        """
        costs = {(name, o.type): o.cost for name, item in self.options.items() for o in item}
        if not plan.types.items() <= costs.keys():
            return self  # made by hand, of types that were never costed
        outright = math.fsum(costs[chosen] for chosen in plan.types.items() if chosen[0] in self.outright)
        quadratic = math.fsum(costs[chosen] for chosen in plan.types.items()) - outright
        if quadratic <= 0:
            return self
        factor = min(max((kl - outright) / quadratic, 1 / _FARTHEST), _FARTHEST)
        return replace(self, options={name: item if name in self.outright else _times(factor, item) for name, item in self.options.items()})

    @cached_property
    def _frontier(self) -> Frontier:
        items = self.options.values()
        return Frontier([[o.bytes for o in item] for item in items], [[o.cost for o in item] for item in items])

    def _plan(self, chosen: tuple[int, ...]) -> Plan:
        size, cost = self._frontier.total(chosen)
        types = {name: self.options[name][o].type for name, o in zip(self.options, chosen, strict=True)}
        return Plan(types, self.fixed_bytes + size, cost)

    def ways(self, max_bytes: int) -> str:
        """What would bring the smallest file down to `max_bytes`."""
        least = {name: min(o.bytes for o in item) for name, item in self.options.items()}
        total, name = self.fixed_bytes + sum(least.values()), max(least, key=lambda n: least[n])
        share = (total - max_bytes) / least[name]
        trimmed = f"or one whose vocabulary is trimmed by {share:.0%} ({name} alone is {least[name] / 1e6:.1f} MB at its smallest)"
        return f"ask for {-(-total // 10**5) / 10:.1f}MB or more, or take another base: one of {max_bytes / total:.0%} of its size" + (
            f", {trimmed}" if share < 1 else ""
        )


def _times(factor: float, item: tuple[Option, ...]) -> tuple[Option, ...]:
    return tuple(replace(option, cost=factor * option.cost) for option in item)


def menu_as_dict(menu: Menu) -> dict[str, Any]:
    """JSON values from which `menu_of` makes the menu again."""
    options = {name: [[o.type, o.bytes, o.cost] for o in item] for name, item in menu.options.items()}
    return {"fixed_bytes": menu.fixed_bytes, "outright": sorted(menu.outright), "options": options}


def menu_of(values: Mapping[str, Any]) -> Menu:
    options = {name: tuple(Option(*o) for o in item) for name, item in values["options"].items()}
    return Menu(options, values["fixed_bytes"], frozenset(values.get("outright", ())))


def write_plan(path: Path, plan: Plan, compensated: bool, frontier: Mapping[str, Any]) -> None:
    """A plan as a file that `read_plan` takes: types by tensor, how they are to be rounded, and for people the whole `frontier`."""
    values = {
        "schema": SCHEMA,
        "size_bytes": plan.size_bytes,
        "predicted_kl": plan.kl,
        "compensated": compensated,
        "types": dict(plan.types),
        **frontier,
    }
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_plan(path: Path) -> tuple[Plan, bool]:
    """The plan of a file, and whether it wants compensated rounding; ModelError for a file that is none."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ModelError(f"{path} is larger than {_MOST_BYTES >> 20} MiB", "name a plan.json that edgelora wrote")
        values = json.loads(path.read_text(encoding="utf-8"))
        types = values["types"]
        if values["schema"] != SCHEMA or not all(isinstance(kind, str) for kind in types.values()):
            raise ValueError("unknown schema")
        return Plan(types, int(values["size_bytes"]), float(values["predicted_kl"])), bool(values["compensated"])
    except OSError as error:
        raise ModelError(f"cannot read the plan {path}: {error.strerror}", "name a plan.json that edgelora wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a size plan: {error}", "name a plan.json that edgelora wrote") from error
