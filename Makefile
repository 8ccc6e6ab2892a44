# ConsistentID, whole: photographs → FGID shards + report → adapter → portraits. `make help` lists what there is.
# Everything installs itself into .venv on first use; nothing outside this folder and the weights' cache is touched.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
PRESET ?= demo
OUT ?= runs/demo/dataset
DEMO ?= runs/demo
COUNT ?= 64
STEPS ?=
ARGS ?=

# uv reads its own variables, not pip's: hand on where wheels lie (a CPU torch, say) and which index is configured.
pip_config = $$($(PYTHON) -m pip config get global.$(1) 2>/dev/null)
UV_INSTALL = \
	links="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$(call pip_config,find-links)}}"; \
	index="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$(call pip_config,index-url)}}"; \
	if [ -n "$$links" ]; then export UV_FIND_LINKS="$$(echo $$links | tr ' ' ',')"; fi; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(RUN)

.DEFAULT_GOAL := help
.PHONY: help install demo dataset train infer report inspect weights test golden chaos quality lint format bench \
	bench-scale clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo
	@echo '  CONFIG=FILE names a preset of configs/, ARGS="key=value …" overrides any setting of it.'

install: $(VENV)/.installed ## set up .venv (done by itself before the others)

$(VENV)/.installed: pyproject.toml constraints.txt overrides.txt
	$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check uv 2>&1 | grep -v "is ignored" || true
	@echo installing into $(VENV)
	@$(UV_INSTALL) -c constraints.txt --override overrides.txt -e ".[dev]"
	@touch $@

demo: install ## everything once, on real faces: portraits → shards + report → training → portraits
	$(RUN) -m pipelines.demo.run --folder $(DEMO) --count $(COUNT) $(if $(STEPS),--steps $(STEPS)) $(ARGS)

dataset: install ## photographs → shards + report. CONFIG=configs/dataset/… ARGS="source.path=… output=…"
	$(RUN) -m pipelines.cli run --config $(or $(CONFIG),configs/dataset/demo.yaml) $(ARGS)

train: install ## shards → adapter. CONFIG=configs/train/… ARGS="data=… output=…"
	$(RUN) -m train.cli --config $(or $(CONFIG),configs/train/demo.yaml) $(ARGS)

infer: install ## a photograph and a prompt → portraits. CONFIG=configs/infer/… ARGS="--photo … --prompt …"
	$(RUN) -m infer.cli --config $(or $(CONFIG),configs/infer/demo.yaml) $(ARGS)

report: install ## write the report of OUT=… again
	$(RUN) -m pipelines.cli report $(OUT)

inspect: install ## one sample in the terminal or as PNG. OUT=… KEY=… ARGS="--png FILE"
	$(RUN) -m pipelines.cli inspect $(OUT) $(KEY) $(ARGS)

weights: install ## fetch weights ahead of a run. PRESET=demo or fgid
	$(RUN) -m pipelines.cli weights --config configs/dataset/$(PRESET).yaml $(ARGS)

test: install ## all tests, two files at a time
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

golden: install ## compare the model with the reference's answers
	$(RUN) -m tests.golden.check tests/golden

chaos: install ## kill workers, actors, nodes and the driver of a Ray cluster, and compare every byte. ROUNDS=5
	$(RUN) -m tests.chaos --rounds $(or $(ROUNDS),5) $(ARGS)

quality: install ## plant faults among COUNT portraits; the rules must drop these and few others. ARGS="--each 20"
	$(RUN) -m tests.quality --count $(COUNT) $(ARGS)

lint: install ## style, types, import layers, sizes, names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(RUN) -m tests.sizes
	$(RUN) -m tests.names

format: install ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## speed of the bare models, of the inline executor and of Ray, side by side. ARGS="--against reference" or img2dataset
	$(RUN) -m bench.dataset $(ARGS)

bench-scale: install ## the Ray executor with 1 to 32 simulated workers, and the driver's memory at 1k to 1M inputs
	$(RUN) -m bench.scale $(ARGS)

clean: ## remove what was made here (runs, caches); .venv and fetched weights stay
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
