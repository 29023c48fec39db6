# What a person types here; `make` lists it. The first call sets up .venv, later ones cost nothing.

PYTHON ?= python3
STAMP := .venv/.installed
# two processes; a file's tests stay in one, as they share fixtures; started in the order of tests/conftest.py
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# every stage is a process of its own: without compiled modules importing torch and open_clip takes it 15 s longer
unexport PYTHONDONTWRITEBYTECODE

help:    ## list these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## */make \1\t/p' Makefile

repro: $(STAMP)    ## run what is missing or changed, data to report; OVERLAY=smoke: with params/smoke.yaml
	@if [ -n "$(OVERLAY)" ]; then python -m mclip.params apply params/$(OVERLAY).yaml; fi
	dvc repro
	@echo "The report: $(CURDIR)/reports/site/index.html"

check: lint    ## lint and the tests that start no process and train nothing: a minute
	$(PYTEST) -m "not slow and not long"

test: lint types    ## lint, mypy, all tests but the long ones, the small pipeline included: ten minutes
	$(PYTEST) -m "not long"

test-long: $(STAMP)    ## the tests that take long by nature
	python -m pytest -m long

lab: $(STAMP)    ## JupyterLab on the source notebooks
	jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

report: $(STAMP)    ## the report's pages only, from the notebooks executed so far
	dvc repro --single-item report
	@echo "The report: $(CURDIR)/reports/site/index.html"

lint: $(STAMP)    ## ruff, and are the source notebooks stripped?
	ruff check .
	ruff format --check mclip tests benchmarks
	python -m mclip strip --check

types: $(STAMP)    ## mypy
	python -m mypy

bench: $(STAMP)    ## every benchmark, one after the other
	@for script in benchmarks/*.py; do echo "== $$script"; python "$$script" || exit 1; done
	@echo "== mclip latency"; python -m mclip latency

hooks: $(STAMP)    ## strip source notebooks at every commit (a git hook of this clone)
	@hook="$$(git rev-parse --git-path hooks)/pre-commit"; \
	if [ -e "$$hook" ] && ! cmp -s .githooks/pre-commit "$$hook"; then \
	    echo "$$hook exists: call .githooks/pre-commit from it" >&2; exit 1; fi; \
	mkdir -p "$$(dirname "$$hook")" && cp .githooks/pre-commit "$$hook" && echo "installed $$hook"

setup: $(STAMP)    ## the locked packages in .venv, nothing more

# uv installs several times faster than pip and asks the index that pip is set to; pip where uv can't.
$(STAMP): requirements.txt pyproject.toml tests/peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) can't make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
	@python -m pip install --quiet --disable-pip-version-check uv || echo "no uv, pip it is" >&2
	@index="$${PIP_INDEX_URL:-$$(python -m pip config get global.index-url 2>/dev/null)}"; \
	[ -z "$$index" ] || export UV_DEFAULT_INDEX="$$index"; \
	{ uv pip install --python .venv/bin/python -r requirements.txt && \
	  uv pip install --quiet --python .venv/bin/python --no-deps -r tests/peers.txt --editable . ; } || \
	{ python -m pip install --disable-pip-version-check -r requirements.txt && \
	  python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/peers.txt --editable . ; }
	@touch $@

.PHONY: help repro check test test-long lab report lint types bench hooks setup
