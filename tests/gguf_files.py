"""GGUF files with something changed, to see that it is noticed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def rewritten(
    source: Path, target: Path, change: Mapping[str, Any], weights: Callable[[str, np.ndarray], np.ndarray | None] | None = None
) -> Path:
    """A copy of a GGUF file with other metadata, and with the raw data of its tensors changed; None leaves a key or a tensor out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        value = change.get(name, field.contents())
        if not name.startswith("GGUF.") and name != "general.architecture" and value is not None:
            kinds = [*field.types, None]
            writer.add_key_value(name, value, kinds[0], kinds[1] if len(field.types) > 1 else None)
    assert change.keys() <= reader.fields.keys()
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        changed = weights(tensor.name, data) if weights else data
        if changed is not None:
            writer.add_tensor(tensor.name, changed, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
