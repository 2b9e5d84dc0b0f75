# Each target does the set-up it needs. Override: make PYTHON=python3.12 VENV=/somewhere/venv TARGET
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK = 1

STAMP := $(VENV)/.d2dense-ready
REQUIREMENTS := $(wildcard requirements/*.txt) setup.py pyproject.toml d2dense/install_detectron2.py
PIP_INSTALL = $(PY) -m pip install --quiet --constraint requirements/constraints.txt

.PHONY: setup demo test test-long lint bench bench-projects detectron2-official clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10) and "error: Python >= 3.10 is needed, %s is %d.%d; run make PYTHON=python3.11" % (sys.executable, *v))'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned requirements into $(VENV) (torch is large: minutes on a slow network)"
	@$(PIP_INSTALL) setuptools wheel -r requirements/runtime.txt -r requirements/dev.txt || \
	  { echo "error: the requirements could not be installed; check the network and run 'make setup' again" >&2; exit 2; }
	@$(PIP_INSTALL) --no-deps -r requirements/no-deps.txt
	@$(PY) d2dense/install_detectron2.py --constraints requirements/constraints.txt
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@$(PY) tools/collect_env.py --brief
	@touch $@

demo: setup
	@$(PY) tools/run_demo.py

test: setup
	@$(PY) -m pytest $(PYTEST_ARGS)

# one at a time: they kill processes, measure memory and count executions
test-long: setup
	@$(PY) -m pytest -m long -n 0 $(PYTEST_ARGS)

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@for folder in tools projects/*/tools; do $(PY) -m mypy $$folder/*.py || exit 1; done

# waiting threads sleep, so that another job on the machine does not multiply the times
bench bench-projects: export OMP_WAIT_POLICY = PASSIVE
bench: setup
	@$(PY) tools/benchmark.py $(BENCH_ARGS)

# what each project's own parts bring, minutes each
bench-projects: setup
	@for script in projects/*/tools/benchmark.py; do $(PY) $$script $(BENCH_ARGS) || exit 1; done

# For users with a C++ (and CUDA) compiler and network: the official build, with its compiled operators.
detectron2-official: setup
	$(PY) -m pip uninstall --yes detectron2
	$(PY) -m pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git' || \
	  { echo "error: the official build failed; 'make setup' after 'rm $(STAMP)' brings the pure-Python copy back" >&2; exit 2; }
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
