# The README's two commands are `make demo` and `make test`; each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Stamps: what the demo needs is installed; what the tests, their peers among them, need is.
DEMO_READY := $(VENV)/.demo-ready
READY := $(VENV)/.ready
WORKERS ?= 2
# `make test ORDER=random SEED=1` shuffles the tests; without SEED a seed is drawn and printed. OPTIONS go to pytest.
ORDER ?= written
SHUFFLE := $(if $(filter random,$(ORDER)),-p randomly --randomly-dont-reset-seed $(if $(SEED),--randomly-seed=$(SEED)))

OLDEST_TRITON := 3.6.0

.PHONY: demo test test-slow collection mutants lint format compile-check compile-check-oldest compile-cost bench bench-evaluation bench-gpu docs doctor clean

# torch first and alone: what it brings (a CUDA build brings its own triton) decides the rest.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(1)]"
endef

$(DEMO_READY): pyproject.toml constraints.txt
	$(call install,demo)
	touch $@

$(READY): pyproject.toml constraints.txt
	$(call install,dev)
	touch $(DEMO_READY) $@

# Beside other work, threads that spin while they wait for each other made the demo ten times as slow.
demo: $(DEMO_READY)
	OMP_WAIT_POLICY=passive $(BIN)/ppl demo

# Files in their order: those of few tests, which xdist would put last, take longest. A thread a worker: with all cores each, workers wait for each other (a third longer on 2 cores). test-slow has all of them.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" $(SHUFFLE) $(OPTIONS)

# Properties are drawn from a new seed, which is printed: OPTIONS="--hypothesis-seed=N" draws them again.
test-slow: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow --hypothesis-profile=slow $(SHUFFLE) $(OPTIONS)

# Workers must collect the same tests in the same order, whatever the clock and the hash seed.
collection: $(READY)
	mkdir -p build
	for seed in 1 2; do \
		PYTHONHASHSEED=$$seed $(BIN)/python -m pytest --collect-only -q > build/collected-$$seed.txt || exit 1; \
		grep :: build/collected-$$seed.txt > build/names-$$seed.txt || exit 1; \
	done
	diff build/names-1.txt build/names-2.txt

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	mkdir -p build/typing/perplexity
	ln -sfn ../../../kernels build/typing/perplexity/kernels
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile-cost: $(READY)
	$(BIN)/python -W ignore -m perplexity.kernels.compile_cost --against bench/results/kernel-cost.json $(OPTIONS)

compile-check: $(READY)
	$(BIN)/python -m perplexity.kernels.compile_check --markdown docs/compile-check.md

# OPTIONS as in `python tests/mutants.py --help`
mutants: $(READY)
	$(BIN)/python tests/mutants.py --seed $(or $(SEED),1) --workers $(WORKERS) $(OPTIONS)

# Against every peer that runs on this machine: half an hour on 2 cores. OPTIONS: --seconds, --out, pytest's -k.
bench: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]" || echo "bench: a peer is missing, its rows say so"
	$(BIN)/python -m pytest bench -q --benchmark-quiet $(OPTIONS)

# A whole evaluation beside the model's own loss: two minutes on 2 cores.
bench-evaluation: $(READY)
	$(BIN)/python bench/evaluation.py $(OPTIONS)

# OPTIONS as in `python bench/gpu.py --help`
bench-gpu: $(READY)
	$(BIN)/python bench/gpu.py $(OPTIONS)

# The covering set with the oldest triton supported, beside the one in .venv: numpy 2.4 breaks its interpreter, not its compiler.
compile-check-oldest: $(READY)
	test -d build/triton-$(OLDEST_TRITON) || \
		$(BIN)/python -m pip install --quiet --no-deps --target build/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	PYTHONPATH=build/triton-$(OLDEST_TRITON) \
		$(BIN)/python -m perplexity.kernels.compile_check --quick --expect-triton $(OLDEST_TRITON)

# The pages of docs/ and the reference of every export, into build/site. A dead link fails.
docs: $(DEMO_READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

doctor: $(DEMO_READY)
	$(BIN)/ppl doctor

clean:
	rm -rf $(VENV) build *.egg-info demo-out
