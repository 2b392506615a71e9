# The project's commands; `make help` lists them. Works with GNU make 3.81, which macOS has.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DATA := plays_char
# On a terminal pip shows its downloads.
PIP_INSTALL = $(PY) -m pip install $$(test -t 1 || echo --quiet) --disable-pip-version-check -c constraints.txt

# A finished install leaves a stamp, named after all that decides what is installed and where; any other is stale.
KEY := $(shell { cat setup.py constraints.txt; pwd; $(PYTHON) --version; } 2>&1 | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(KEY)
INSTALLED_TEST := $(VENV)/.installed-test-$(KEY)

.PHONY: help quickstart test soak lint install clean
.DELETE_ON_ERROR:

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-12s%s\n' "$$name" "$$text"; done
	@echo "  make PYTHON=python3.12 ... chooses the interpreter (3.11 or newer)"

quickstart: $(INSTALLED)  ## install, prepare a corpus, train a small GPT, sample from it: minutes on a CPU
	@PYTHON=$(PY) DATA=$(DATA) sh train/quickstart.sh

test: $(INSTALLED_TEST)  ## install what the tests need, run them all
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses=8

soak: $(INSTALLED_TEST)  ## kill a run a hundred times, during saves too, and damage every file 2,000 times
	@KILLS=100 OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_faults.py -k killed
	@ROUNDS=1000 OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_damage.py

lint: $(INSTALLED_TEST)  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m mypy

install: $(INSTALLED)  ## only make .venv

clean:  ## remove .venv and caches; data and runs stay
	@rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: Python 3.11 or newer is needed and '$(PYTHON)' is not; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) lacks its venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV). PyTorch's usual wheel for Linux brings CUDA, about 3 GB to download; its CPU build is 200 MB."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP_INSTALL) -e .
	@touch $@

$(INSTALLED_TEST): $(INSTALLED)
	@echo "Installing what the tests need, about 170 MB to download."
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@
