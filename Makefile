# The two commands of a fresh machine are `make demo` and `make test`.
#   PYTHON    the interpreter to build .venv with, 3.11 or newer
#   PIP_ARGS  more arguments for pip. The torch pin may fetch a build for GPUs of several GB; an
#             index of CPU builds, given here with --index-url or --extra-index-url, avoids that.
#   ARGS      more arguments for `tamoe demo` or pytest
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install -q $(PIP_ARGS)
INSTALL = $(PIP) --no-deps --no-build-isolation

BESIDE = $(PIP) --no-deps --no-compile --upgrade --target

.PHONY: demo demo-data test frameworks lint format clean

demo: $(VENV)/ready
	@rm -rf build
	@$(INSTALL) .  # not editable: an editable install seen from the parent of a clone is empty
	$(VENV)/bin/tamoe demo $(ARGS)

demo-data: demo  # what experiments/ keeps of the demo, and the tables of its LOG.md
	cp tamoe-demo/results.json experiments/demo.json
	cp tamoe-demo/figures/steep-loss.svg experiments/demo.svg
	cp tamoe-demo/figures/top-8-exchanges.svg experiments/demo_exchanges.svg
	$(VENV)/bin/python -m tamoe.experiments.demo_table experiments/demo.json

test: $(VENV)/ready
	@$(INSTALL) -e .
	$(VENV)/bin/python -m pytest $(ARGS)
	$(VENV)/bin/python -m pytest -q --doctest-modules --ignore=tamoe/experiments tamoe

frameworks: $(VENV)/ready  # what the tests of adapters need beside .venv; about 1.3 GB
	$(BESIDE) $(VENV)/transformers4 -r tests/transformers4.txt
	$(BESIDE) $(VENV)/transformers52 -r tests/transformers52.txt
	$(BESIDE) $(VENV)/torchtitan -r tests/torchtitan.txt
	$(BESIDE) $(VENV)/megatron19 -r tests/megatron19.txt --only-binary :all: --python-version 3.12 --ignore-requires-python

lint: $(VENV)/ready
	@$(INSTALL) -e .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p tamoe

format: $(VENV)/ready
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tamoe needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@rm -rf build
	$(PIP) "setuptools>=77"
	$(PIP) -c constraints.txt ".[test]"
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
