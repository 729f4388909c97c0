"""The size of an exported file before there is a model: exact where the base is on this disk, near where only its shape is known."""

from __future__ import annotations

import inspect
from typing import Any

from edgelora import recipe as recipes
from edgelora.errors import ModelError
from edgelora.export import stage
from edgelora.outline import Outline


def predict(outline: Outline, section: recipes.Export, name: str, trained: int) -> dict[str, Any]:
    """A row of format, type, size (bytes; None where it cannot be known yet) and what the matrices will be.

    `trained` weights of an adapter that stays apart are added, in 16 bits.
    """
    section = stage.resolve(section)
    module = stage.format_module(section.format)
    row: dict[str, Any] = {"format": section.format, "type": section.type or budget_words(section)}
    size: int | None = None
    if outline.folder is not None:
        size, mixture = stage.predict(outline.folder, section, name)
        row |= ({"weights": mixture} if mixture else {}) | stage.estimate(outline.folder, section)
    elif section.max_size is not None:
        size = recipes.size_bytes(section.max_size)
    elif not section.planned and section.exporter is None and hasattr(module, "bytes_of"):
        known = {"tensor_types": section.tensor_types, "header": outline.header_bytes, "block": section.block}
        options = {key: value for key, value in known.items() if key in inspect.signature(module.bytes_of).parameters}
        try:
            size = module.bytes_of(outline.config, outline.shapes, section.type, **options)
        except (KeyError, ValueError) as error:
            raise ModelError(f"{outline.name}: its shape does not fit {section.format}: {error}", "check its config.json") from error
    return row | {"size_bytes": size + 2 * trained if size is not None and module.APART else size}


def budget_words(section: recipes.Export) -> str:
    """What stands for the type of a file whose types a plan will choose; its size here is that of a plan without data."""
    if section.max_size is not None:
        graph = "; the graph's own bytes are an estimate" if section.format == "onnx" else ""
        return f"within {section.max_size} (types chosen on training rows; here as if every weight mattered alike{graph})"
    limit = f"a KL of at most {section.max_kl}" if section.max_kl is not None else f"a score of at least {section.min_score}"
    return f"with {limit} (size known once it is measured; here the largest)"
