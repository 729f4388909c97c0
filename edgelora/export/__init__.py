"""Exported formats, one file each. A format is a module with:

    DEFAULT_TYPE: str
    TYPES: Mapping[str, str]                # name -> one line that describes it
    RUNTIME: str                            # the entry of edgelora.runtime.RUNTIMES that its users will run it with
    FURTHER: tuple[str, ...]                # others of them that must answer alike
    REQUIRES: tuple[str, ...]               # importable modules it needs
    ENVIRONMENT: str                        # optional: the entry of edgelora.environments.ENVIRONMENTS that it needs too
    MERGES: bool                            # whether an adapter is added on the way: predict_bytes and write take `weights`, write `threads`
    APART: bool                             # whether the adapter stays a file of its own, beside a base that others share
    PHONE: phone_readme.Phone               # optional, for a format of apps: how it gets into one
    def context(model: Path) -> int         # with one: tokens that the file holds at most
    OPTIONS: frozenset[str]                 # further keys of recipe.Export that predict_bytes and write take
    CALIBRATION: str                        # with "importance" among OPTIONS: the stage that measures it, "importance" or "moments",
    def calibration(path: Path) -> Any      # and what write takes as `importance`, from the file that stage wrote
    def gains_from_importance(model: Path, type: str) -> bool
    def predict_bytes(model: Path, type: str, name: str) -> int
    def bytes_of(config, shapes, type, [tensor_types, header]) -> int    # of a model of which only the shape is here; may be absent
    def estimate_of(config, shapes, type, importance: bool) -> dict[str, float]    # `peak_bytes` and CPU `seconds` of writing; absent where little
    def write(model: Path, type: str, folder: Path, name: str, progress) -> Path

`progress(share, text)` is called on the way. `model` is a Hugging Face folder (config.json, *.safetensors, tokenizer files). `write` fills `folder` and returns the
path that a runtime opens: a file for GGUF, a folder for ONNX. Whatever else it leaves in `folder` ships beside it.
"""

FORMATS = {
    "gguf": "edgelora.export.gguf",
    "gguf-lora": "edgelora.export.gguf_lora",
    "onnx": "edgelora.export.onnx",
    "executorch": "edgelora.export.executorch",
    "litert": "edgelora.export.litert",
    "mnn": "edgelora.export.mnn",
}

# Formats whose files can be planned to a size or a loss (`budget`) -> a module with
#
#   MEASURED: str                           # stage and kind of what was measured on training rows
#   COMPETING: tuple[str, ...]              # ways of rounding whose plans are both written and measured: "compensated", "nearest"
#   ENDING: str                             # of the file's or folder's name
#   STANDS_FOR: str                         # the type whose memory, and whose name for browsers, a planned file has
#   SETTINGS: tuple[str, ...]               # further keys of recipe.Export that `open` takes
#   PACKAGES: tuple[str, ...]               # whose versions decide what the file is
#   def matrices(model, name, weights=None) -> tuple[int, dict[str, Matrix]]    # bytes of all else, and what has a choice; from headers alone
#   def mixture(model, name, plan, weights=None) -> dict                        # bits a weight, how many matrices of each type
#   def open(described, name, weights, scratch, threads, progress, **settings) -> Writer
#
# `budget.Matrix` and `budget.Writer` say what those two can do. Planning imports PLANNING besides.
PLANNERS = {
    "gguf": "edgelora.export.gguf_plan",
    "onnx": "edgelora.export.onnx_plan",
}
PLANNING = ("threadpoolctl",)
