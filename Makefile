# make plan   set up .venv and plan examples/llama.py for 8 GPUs: leaves plan.yaml and report.html
# make test   set up .venv and run every check
# make lint   the checks that need no test run
# make reports  plan the samples in reports/ anew, with the outputs that the documents show
# make zoo    capture every family of models and write the table docs/zoo.md (minutes)
# make parity   train every model under every kind of plan on real processes and write docs/parity.md (many minutes)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: plan test lint format zoo parity clean reports

plan: $(STAMP)
	$(BIN)/autoplan plan examples/llama.py --gpus 8 --force

test: lint
	$(BIN)/python -m pytest --numprocesses auto

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,dev]'
	touch $@

zoo: $(STAMP)
	$(BIN)/python -m benchmarks.zoo

parity: $(STAMP)
	$(BIN)/python -m benchmarks.parity_matrix

reports: $(STAMP)
	$(BIN)/python reports/make.py

clean:
	rm -rf $(VENV) plan.yaml report.html
