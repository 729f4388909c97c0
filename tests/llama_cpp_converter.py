"""llama.cpp's own converter, from the sources inside llama-cpp-python's sdist, as an oracle for ours.

    python tests/llama_cpp_converter.py SOURCES MODEL OUTFILE [OUTTYPE]

SOURCES is the folder of llama.cpp (vendor/llama.cpp of the unpacked sdist). It knows pre-tokenizers by a hash of what
they do to one text, and a tokenizer trained on a page of text by none: the name that ours found stands in for it. Of Phi-3
and Gemma 3 it wants SentencePiece's own file, which tiny models have not: of these it writes no tokenizer.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path


def convert(sources: Path, model: Path, outfile: Path, outtype: str = "f16") -> None:
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    import convert_hf_to_gguf as converter
    import transformers.models.auto.tokenization_auto  # noqa: F401 - looks for SentencePiece itself
    from conversion.base import TextModel
    from conversion.gemma import Gemma3Model
    from conversion.phi import Phi3MiniModel

    from edgelora.export import gguf_tokenizer

    # It imports SentencePiece before it sees that there is no file for it.
    sys.modules.setdefault("sentencepiece", types.SimpleNamespace(SentencePieceProcessor=None))  # type: ignore[arg-type]

    backend = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    if not backend["model"].get("byte_fallback"):
        name = gguf_tokenizer._pre_tokenizer(backend)
        TextModel.get_vocab_base_pre = lambda self, tokenizer: name
    if json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"] in ("phi3", "gemma3_text"):
        for kind in (Gemma3Model, Phi3MiniModel):
            kind.set_vocab = lambda self: None
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outfile", str(outfile), "--outtype", outtype]
    converter.main()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
