# What maintainers type. PYTHON is the interpreter that the package is installed in, with the extra `test`.
PYTHON ?= .venv/bin/python

help:  ## list what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{ printf "  make %-8s %s\n", $$1, $$2 }'

install:  ## a virtual environment with the package and what the tests need
	python3 -m venv .venv && .venv/bin/python -m pip install -q -e '.[test]'

check:  ## style, types, architecture: seconds, before every commit
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_architecture.py tests/test_public_api.py tests/test_guarantees.py

test:  ## everything, as CI runs it in the installed environment: ten minutes on two cores
	$(PYTHON) -m pytest -q -n 2

smoke:  ## every recipe once, on almost nothing
	$(PYTHON) -m pytest -q tests/recipes

faults:  ## break the mechanism in every known way and see whether the checks notice: seven minutes
	$(PYTHON) recipes/fault_injection.py

audit:  ## canaries, rounding, speed of noise: five minutes; writes recipes/audit.md
	$(PYTHON) recipes/audit.py

matrix:  ## everything with the oldest and the newest versions, each in an environment of its own: an hour on two cores
	$(PYTHON) recipes/versions.py

bench:  ## time and memory beside ordinary training (extra `dev`), on an idle machine; writes recipes/benchmark.md
	$(PYTHON) recipes/benchmark.py --suite cpu --threads 1

api:  ## write tests/public_api.json anew, after a change of the public surface that is meant
	$(PYTHON) tests/public_api.py > tests/public_api.json

.PHONY: help install check test smoke faults audit matrix bench api
