# Needs a Python from 3.11 on, and make. Everything else goes into .venv.
.DEFAULT_GOAL := help
.PHONY: help install demo test check crash mutants bench clean

VENV := .venv
PYTHON = $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
#: options of pytest, as in `make test ARGS="tests/unit -x"`
ARGS ?=

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

install: $(VENV)/installed ## .venv with everything in it; done again when pyproject.toml or constraints.txt change

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "There is no Python from 3.11 on: install one, or say where: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV): one to three minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install ## a workflow on real data, with servers of its own
	$(VENV)/bin/pipeline demo

test: install ## every test, on real servers
	$(VENV)/bin/python -m pytest $(ARGS)

check: install ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict

crash: install ## ten minutes of faults of every kind, then three losses in the middle of work
	$(VENV)/bin/python -m pipeline.testing --minutes 10 --scenarios $(ARGS)

bench: install ## side by side with stock Celery and its peers, about an hour; ARGS=--quick: five minutes
	$(VENV)/bin/python -m benchmarks $(ARGS)

mutants: install ## break the store on purpose, piece by piece, and see that its tests notice; six minutes
	$(VENV)/bin/python -m tests.store.mutants $(ARGS)

clean: ## remove what was built; .pipeline, with your data, stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
