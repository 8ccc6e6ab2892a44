# ConsistentID, whole: photographs → FGID shards and report → adapter → portraits.
# `make help` lists all targets. The first one that is run installs the project into .venv. Nothing is
# written outside this folder and the cache of weights.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
comma := ,
BIN := $(VENV)/bin
RUN := $(BIN)/python
PRESET ?= demo
OUT ?= runs/demo/dataset
DEMO ?= runs/demo
COUNT ?=
STEPS ?=
ARGS ?=
# As in has_nvidia_driver (stages/backends/runtime.py). `command` needs a shell, and make before 4.3 starts one only for
# special characters, such as those of a redirection.
DRIVER := $(shell command -v nvidia-smi 2>/dev/null)$(wildcard /dev/nvidiactl)
# 1: install CUDA builds; 0: don't. By default what is installed, else 1 where there is an NVIDIA driver.
GPU ?= $(if $(wildcard $(VENV)/.installed-gpu),1,$(if $(wildcard $(VENV)/.installed),0,$(if $(DRIVER),1)))
ON_GPU := $(filter-out 0,$(GPU))
# The mark of a complete environment of this kind.
INSTALLED := $(VENV)/.installed$(if $(ON_GPU),-gpu)
# For targets that also work before an install: PYTHON, if it was set, else the environment's, if there is one.
ANY_PYTHON = $(or $(if $(filter file,$(origin PYTHON)),$(wildcard $(RUN))),$(PYTHON))

# uv doesn't read pip's configuration, so pass on pip's index and find-links (for example, a folder
# with a CPU build of torch, which is left out with GPU=1).
pip_config = $$($(PYTHON) -m pip config get global.$(1) 2>/dev/null)
UV_INSTALL = \
	links="$${UV_FIND_LINKS:-$(if $(ON_GPU),,$${PIP_FIND_LINKS:-$(call pip_config,find-links)})}"; \
	index="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$(call pip_config,index-url)}}"; \
	if [ -n "$$links" ]; then export UV_FIND_LINKS="$$(echo $$links | tr ' ' ',')"; fi; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(RUN)

.DEFAULT_GOAL := help
.PHONY: help install doctor gpu-check demo base learn-proof dataset features train replay infer report inspect weights caption-servers test golden chaos \
	chaos-train quality lint format bench bench-scale clean

help: ## list all targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'
	@echo
	@echo '  CONFIG=FILE chooses a preset in configs/; ARGS="key=value …" overrides its settings.'

install: $(INSTALLED) ## install the project into .venv; other targets do this first. GPU=1: CUDA builds

# An environment without this kind's mark is deleted first: its builds or its Python may be others, or its install failed.
$(INSTALLED): pyproject.toml constraints.txt overrides.txt overrides-gpu.txt
	$(if $(wildcard $@),,$(PYTHON) -m venv --clear $(VENV))
	@$(RUN) -m pip install --quiet --disable-pip-version-check uv 2>&1 | grep -v "is ignored" || true
	@echo installing into $(VENV)$(if $(ON_GPU),$(comma) with CUDA builds)
	@$(UV_INSTALL) -c constraints.txt --override overrides.txt \
		$(if $(ON_GPU),--override overrides-gpu.txt) -e ".[dev$(if $(ON_GPU),$(comma)gpu)]"
	@touch $@

doctor: ## print what runs on which device, what is missing, and what to type
	$(ANY_PYTHON) -m pipelines.doctor $(ARGS)

gpu-check: ## what only a GPU can show, in minutes: equality with the CPU, training, speed. PYTHON= ARGS="--output gpu.json"
	$(ANY_PYTHON) -m bench.gpu_check $(ARGS)

demo: install ## all steps: synthetic people → shards and report → training → portraits. COUNT= STEPS= ARGS="--launcher ray"
	$(RUN) -m pipelines.demo.run --folder $(DEMO) $(if $(COUNT),--count $(COUNT)) $(if $(STEPS),--steps $(STEPS)) $(ARGS)

base: install ## synthetic people → shards → a small base model. PRESET=smoke, cpu or gpu OUT=runs/base ARGS="rounds=2"
	$(RUN) -m pipelines.demo.base --preset $(if $(filter file,$(origin PRESET)),cpu,$(PRESET)) \
		--output $(if $(filter file,$(origin OUT)),runs/base,$(OUT)) $(ARGS)

learn-proof: install ## train adapters on the frozen base, and measure whether they learn identity. PRESET=smoke, cpu or gpu OUT=runs/learn-proof
	$(RUN) -m pipelines.demo.proof --preset $(if $(filter file,$(origin PRESET)),cpu,$(PRESET)) \
		--output $(if $(filter file,$(origin OUT)),runs/learn-proof,$(OUT)) $(ARGS)

dataset: install ## photographs → shards and report. CONFIG=configs/dataset/… ARGS="source.path=… output=…"
	$(RUN) -m pipelines.cli run --config $(or $(CONFIG),configs/dataset/demo.yaml) $(ARGS)

train: install ## shards → adapter. CONFIG=configs/train/… ARGS="data=… output=…" RAY_ADDRESS= WORKERS=
	$(RUN) -m train.cli run --config $(or $(CONFIG),configs/train/demo.yaml) \
		$(if $(RAY_ADDRESS),ray.address=$(RAY_ADDRESS)) $(if $(WORKERS),ray.workers=$(WORKERS)) $(ARGS)

features: install ## compute encoders' features of a data set once, for training. CONFIG=configs/train/… ARGS="data=…"
	$(RUN) -m train.cli features --config $(or $(CONFIG),configs/train/demo.yaml) $(ARGS)

replay: install ## compute the losses of a training step again, sample by sample. OUT=… STEP=… ARGS="--images FOLDER"
	$(RUN) -m train.cli replay $(OUT) --step $(STEP) $(ARGS)

infer: install ## a photograph and a prompt → portraits. CONFIG=configs/infer/… ARGS="--photo … --prompt …"
	$(RUN) -m infer.cli --config $(or $(CONFIG),configs/infer/demo.yaml) $(ARGS)

report: install ## write the report of the data set OUT again. OUT=…
	$(RUN) -m pipelines.cli report $(OUT)

inspect: install ## show one input in the terminal or as PNG. OUT=… KEY=… ARGS="--png FILE"
	$(RUN) -m pipelines.cli inspect $(OUT) $(KEY) $(ARGS)

weights: install ## fetch weights before a run. PRESET=demo or fgid
	$(RUN) -m pipelines.cli weights --config configs/dataset/$(PRESET).yaml $(ARGS)

caption-servers: install ## start vLLM servers on a Ray cluster (docs/captions.md). MODEL=… GPUS=… SERVERS= ENGINE= ARGS="-- COMMAND"
	$(RUN) -m pipelines.cli caption-servers --model "$(MODEL)" $(if $(GPUS),--gpus $(GPUS)) \
		$(if $(SERVERS),--servers $(SERVERS)) $(if $(ENGINE),--engine $(ENGINE)) $(ARGS)

test: install ## run the tests, in two processes. ARGS="-m thorough" runs those that take long and are left out
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not thorough" $(ARGS)

golden: install ## compare the model with the reference's recorded outputs
	$(RUN) -m tests.golden.check tests/golden

chaos: install ## kill workers, actors, nodes and the driver of a Ray cluster, then compare all bytes. ROUNDS=5
	$(RUN) -m tests.chaos --rounds $(or $(ROUNDS),5) $(ARGS)

chaos-train: install ## kill, stop and resume training on 1, 2 and 4 processes, then compare samples and weights. ROUNDS=3
	$(RUN) -m tests.chaos.train --rounds $(or $(ROUNDS),3) $(ARGS)

quality: install ## plant faults in portraits; the rules must drop these and few others. COUNT=… ARGS="--each 20"
	$(RUN) -m tests.quality --count $(or $(COUNT),64) $(ARGS)

lint: install ## check style, types, import layers, sizes and names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(RUN) -m tests.sizes
	$(RUN) -m tests.names

format: install ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## speed of the models in a loop, of inline and of Ray. ARGS="--against reference" or img2dataset
	$(RUN) -m bench.dataset $(ARGS)

bench-scale: install ## speed of Ray with 1 to 32 simulated workers, and the driver's memory at 1k to 1M inputs
	$(RUN) -m bench.scale $(ARGS)

clean: ## remove runs and caches; not .venv and weights
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
