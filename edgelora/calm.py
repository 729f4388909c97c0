"""Third-party progress bars and warnings off: stdout is a command's result, stderr is ours."""

from __future__ import annotations

import contextlib
import logging
import warnings

_LIBRARIES = r"(transformers|peft|bitsandbytes|torch|accelerate|huggingface_hub)(\..*)?"


def calm_libraries() -> None:
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    for name in ("bitsandbytes", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def is_calm() -> bool:
    """Whether `calm_libraries` was called in this process."""
    return logging.getLogger("bitsandbytes").level == logging.ERROR
