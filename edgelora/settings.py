"""Settings in YAML: read safely, changed by ``key.sub=value``, turned into dataclasses with every problem told at once.

What the settings are, and their defaults, stands in `edgelora.recipe`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from edgelora.errors import RecipeError

_MAX_BYTES = 1 << 20


def read(path: Path, kind: str = "the recipe ") -> dict[Any, Any]:
    """The mapping in a small YAML file; `kind` is what a message calls it, with the space after it. RecipeError when there is none."""
    import yaml

    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{path} is larger than 1 MiB", "a recipe is a short YAML file")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"cannot read {kind}{path}: {error.strerror}", _neighbours(path)) from error
    try:
        values = yaml.load(text, Loader=_plain_loader())
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(
            f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}", "check the indentation and quotes at that line"
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no settings", "start from a recipe that `edgelora init` writes")
    return values


def build(cls: type, values: Any, where: str, problems: list[str]) -> Any:
    """The frozen dataclass `cls` out of plain values, None when there are problems, which are added to `problems`; `where` leads their keys."""
    if not isinstance(values, Mapping):
        problems.append(f"{where or 'recipe'}: expected settings, found {values!r}")
        return None
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("internal")}
    hints = typing.get_type_hints(cls)
    before = len(problems)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            guess = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            problems.append(f"{where}{key}: unknown key; {guess}")
    made = {}
    for name, spec in fields.items():
        if name in values:
            made[name] = _value(hints[name], values[name], f"{where}{name}", problems)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"{where}{name}: missing; it has no default")
    return cls(**made) if len(problems) == before else None


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            attempt: list[str] = []
            result = _value(option, value, where, attempt)
            if not attempt:
                return result
        problems.extend(attempt)
        return None
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, f"{where}.", problems)
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            problems.append(
                f"{where}: {value!r} is not one of {', '.join(map(str, args))}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            problems.append(f"{where}: expected a list, found {value!r}")
            return None
        return tuple(_value(args[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            problems.append(f"{where}: expected names and values, found {value!r}")
            return None
        return {str(k): (v if args[1] is Any else _value(args[1], v, f"{where}.{k}", problems)) for k, v in value.items()}
    return _scalar(hint, value, where, problems)


def _scalar(hint: type, value: Any, where: str, problems: list[str]) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 2e-4 as text
            number = float(value)
            if number == number and abs(number) != float("inf"):
                return number
        except ValueError:
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    name = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}[hint]
    problems.append(f"{where}: {value!r} is not {name}")
    return None


def override(values: dict[Any, Any], item: str) -> None:
    """Apply one ``key.sub=value`` to nested settings; RecipeError when it names no place."""
    _set(values, item, *_override(item))


def _override(item: str) -> tuple[list[str], Any]:
    import yaml

    key, sign, text = item.partition("=")
    if not sign or not key:
        raise RecipeError(f"--set {item!r} is not KEY=VALUE", "for instance --set train.lr=2e-4")
    try:
        return key.split("."), yaml.load(text, Loader=_plain_loader())
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"--set {item!r} is not valid YAML: {' '.join(str(error).split())[:300]}", "quote the value") from error


def _set(values: Any, item: str, keys: list[str], value: Any) -> None:
    """Put `value` at ``a.b.0.c`` of nested dictionaries and lists."""
    for depth, key in enumerate(keys):
        place: Any = key
        if isinstance(values, list):
            if not key.isdigit() or int(key) >= len(values):
                raise RecipeError(f"--set {item}: {'.'.join(keys[:depth])} has {len(values)} entries, none is {key!r}", "count from 0")
            place = int(key)
        elif not isinstance(values, dict):
            raise RecipeError(f"--set {item}: {'.'.join(keys[:depth])} is a value, not a section", "name a key of the recipe")
        if depth == len(keys) - 1:
            values[place] = value
        else:
            if isinstance(values, dict) and values.get(place) is None:
                values[place] = {}
            values = values[place]


def plain(value: Any) -> Any:
    """Nested mappings and tuples as JSON has them."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _plain_loader() -> type:
    """YAML's safe loader without anchors, aliases and repeated keys: what you read is what you get."""
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise yaml.YAMLError(f"anchors and aliases are not allowed (line {event.start_mark.line + 1})")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                if key_node.value in seen:
                    raise yaml.YAMLError(f"the key {key_node.value!r} stands twice (line {key_node.start_mark.line + 1})")
                if isinstance(key_node.value, str):
                    seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    return Plain


def _neighbours(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, sorted(p.name for p in folder.glob("*.y*ml")), n=3)
    return f"did you mean {', '.join(str(path.parent / n) for n in near)}?" if near else "write one with `edgelora init DATA`"
