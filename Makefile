# The README's two commands are `make demo` and `make test`; each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: demo test test-slow lint format compile-check bench-gpu doctor clean

# torch first and alone: what it brings (a CUDA build brings its own triton) decides the rest.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/ppl demo

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile-check: $(READY)
	$(BIN)/python -m perplexity.kernels.compile_check --markdown docs/compile-check.md

# OPTIONS as in `python bench/gpu.py --help`
bench-gpu: $(READY)
	$(BIN)/python bench/gpu.py $(OPTIONS)

doctor: $(READY)
	$(BIN)/ppl doctor

clean:
	rm -rf $(VENV) build *.egg-info demo-out
