# `make train` and `make test` do everything on a machine with Python 3.11+, git and make; `make help` lists the rest.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_VERSION := 0.13.9
# relative, because the path of this folder may contain spaces and quotes
UV := VIRTUAL_ENV=$(VENV) $(BIN)/uv

# Which build of torch, in the lock's version: `lock` is PyPI's (CUDA on Linux), any other is a backend of uv, whose
# wheels are on pytorch.org: TORCH=cpu, cu126, rocm7.2, xpu ... Without TORCH, the installed build stays.
INSTALLED := $(or $(shell cat $(STAMP) 2>/dev/null),lock)
TORCH ?= $(INSTALLED)
OTHER := $(filter-out $(INSTALLED),$(TORCH))
REINSTALL := $(if $(OTHER),--reinstall-package torch --reinstall-package torchvision)

.DEFAULT_GOAL := help
.PHONY: help setup train test clusters faults faults-clusters faults-storage results docs rename lint lock FORCE

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 18

setup: $(STAMP)  ## create .venv and install the locked dependencies and this package into it; TORCH=cpu, cu126, rocm7.2 ... chooses the build of torch

# Bytecode is compiled here: with PYTHONDONTWRITEBYTECODE set, each command would otherwise take eight seconds longer.
# The stamp makes a second `make` cost nothing; it is older than the lock file if the lock has changed. It holds TORCH.
# The lock has the hashes of PyPI's wheels only: those of pytorch.org are installed by version.
$(STAMP): requirements.lock pyproject.toml $(if $(OTHER),FORCE)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: choose another one with PYTHON=python3.12" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@rm -f $@
ifeq ($(TORCH),lock)
	@echo "Installing the locked dependencies into $(VENV) (about 6 GB with torch's CUDA libraries) ..."
	@$(UV) pip install --quiet --compile-bytecode --require-hashes $(REINSTALL) --requirements requirements.lock
else
	@echo "Installing the locked dependencies into $(VENV), and torch for $(TORCH) from pytorch.org ..."
	@awk '/^[^ ]/ { of_torch = /^(torch|torchvision|triton|(nvidia|cuda)-[a-z0-9-]+)==/ } !of_torch' requirements.lock > $(VENV)/without-torch.lock
	@$(UV) pip install --quiet --compile-bytecode --require-hashes --no-deps --requirements $(VENV)/without-torch.lock
	@$(UV) pip install --quiet --compile-bytecode --torch-backend=$(TORCH) $(REINSTALL) $(shell sed -nE 's/^(torch|torchvision)==([^ ]+).*/\1==\2/p' requirements.lock)
endif
	@$(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	@echo $(TORCH) > $@

FORCE:

train: setup  ## train, with overrides: make train ARGS="model=alexnet trainer=ddp"
	@$(BIN)/python train.py $(ARGS)
	@test "$$VIRTUAL_ENV" -ef $(VENV) || echo "first:       source $(VENV)/bin/activate"

test: setup  ## run all tests except tests/clusters; ARGS="-k name" narrows it
	@$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal --ignore=tests/clusters $(ARGS)

clusters: setup  ## tests on two machines (network namespaces) and a real SLURM: needs root; apt-get install slurm-wlm munge postgresql
	@$(BIN)/python -m pytest tests/clusters $(ARGS)

faults: setup  ## kill runs, ranks and writers at random, far more often than `make test`, and all of W&B's faults: 45 minutes
	@ALEXLAB_FAULTS=25 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 tests/callbacks/test_exact_resume.py tests/commands/test_faults.py tests/commands/test_dying_ranks.py tests/loggers/test_wandb_logger.py $(ARGS)

faults-clusters: setup  ## kill ranks of two machines at random, 102 times: 15 minutes; needs what `make clusters` needs
	@ALEXLAB_FAULTS=17 $(BIN)/python -m pytest tests/clusters/test_kills.py $(ARGS)

faults-storage: setup  ## kill runs that use an S3 server that fails, 208 times: 7 minutes
	@ALEXLAB_FAULTS=13 $(BIN)/python -m pytest tests/commands/test_buckets.py -k kills $(ARGS)

results: setup  ## train what the tables of docs/results.md need, and write them; ARGS="rates photos=FOLDER" chooses
	@$(BIN)/python docs/results.py $(ARGS)

docs: setup  ## build the pages of docs/ and the API reference as a site; a broken link is an error
	@rm -rf docs/_build docs/api  # warnings are printed only for pages that are read again
	@$(BIN)/python -m sphinx --quiet --fail-on-warning docs docs/_build/html
	@echo "site:        docs/_build/html/index.html"

rename:  ## give the project a name of its own: make rename NAME=myproject
	@$(PYTHON) docs/rename.py $(NAME)
	@test ! -x $(BIN)/uv || $(UV) pip uninstall --quiet alexlab
	@rm -f $(STAMP)
	@$(MAKE) --no-print-directory setup
	@$(BIN)/ruff check --fix --exit-zero --silent . && $(BIN)/ruff format --quiet . && $(BIN)/ruff check --add-noqa --quiet .  # lines that are too long now
	@git add --all && echo "Look at the result with git diff --cached, and then: git commit -m 'Our name'"

lint: setup  ## run what pre-commit runs: ruff, mypy, JSON schemas, YAML, large files, secrets
	@$(BIN)/pre-commit run --all-files --show-diff-on-failure

lock: setup  ## resolve pyproject.toml again into requirements.lock (hashes, no addresses)
	@$(BIN)/uv pip compile --universal --generate-hashes --python-version 3.11 --all-extras --no-emit-index-url --no-annotate \
		--quiet pyproject.toml --output-file requirements.lock
