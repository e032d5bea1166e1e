# Temper. `make` alone prints what there is.

# The first Python in the supported range; name another with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.11 python3.10 python3.12; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
# Installed first and alone, so that nothing else chooses a build of it. Pip options may follow the version:
# make test TORCH="torch==2.13.0 --index-url INDEX-WITH-CPU-BUILDS"
TORCH  ?= torch==2.13.0
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
# `make test ARGS="tests/api -k client"` runs a part of the tests.
ARGS   ?=
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
HAS_APT := $(shell command -v apt-get)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo serve test lint check bench bench-training bench-conversion clean

help: ## Print this help.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(READY) ## Make .venv and install Temper with everything that the demo and the tests need.

demo: $(READY) ## Walk the whole road with a tiny model: convert, prepare data, train, evaluate, export (minutes, no NPU).
	$(PY) -m tests.demo $(ARGS)

serve: $(READY) ## Start Temper on this machine (embedded mode): API and worker in one command.
	$(VENV)/bin/temper serve $(ARGS)

test: $(READY) ## Run the tests; installs and starts the PostgreSQL and Redis that they need, privately.
	$(PY) -m tests.services
	$(PY) -m pytest $(ARGS)

lint: $(READY) ## Formatting, lint, types and import contracts.
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

check: lint test ## Everything that has to be green before a push.

bench: $(READY) ## Measure: API start and memory, submit latency, event latency.
	$(PY) -m tests.services
	$(PY) -m pytest -m bench -s tests/bench/test_service.py $(ARGS)

bench-training: $(READY) ## Measure the training engine against transformers and TRL, which go into build/bench-peers (20 minutes).
	$(PY) -m pytest -m bench -s tests/bench/test_training.py $(ARGS)

bench-conversion: $(READY) ## Measure: the three weight conversions against `cp -r`, on a slice of the 7B model.
	$(PY) -m tests.bench.conversion $(ARGS)

clean: ## Remove the virtual environment, the demo's files and caches.
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian and Ubuntu ship Python without venv (and a bare container ships no Python): both come from apt when missing.
$(PY):
	@set -e; python="$(PYTHON)"; \
	if ! { [ -n "$$python" ] && "$$python" -c 'import ensurepip, venv' 2>/dev/null; }; then \
		[ -n "$(HAS_APT)" ] || { echo "Temper needs Python 3.10, 3.11 or 3.12 with venv; install it, or name it: make PYTHON=..." >&2; exit 1; }; \
		$(AS_ROOT) apt-get update -q; \
		$(AS_ROOT) env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends python3 python3-venv; \
		"$$python" -c 'import ensurepip, venv' 2>/dev/null || python=python3; \
	fi; \
	"$$python" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else "Temper needs Python 3.10, 3.11 or 3.12, this is %d.%d; name another: make PYTHON=..." % v)'; \
	"$$python" -m venv $(VENV)

$(READY): pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet -e '.[train,video,demo,dev]'
	@touch $@
