# make demo    record demonstrations, train a policy on them, and measure it in closed loop (less than 10 minutes on 2 cores)
# make test    what CI runs: library in sync, every notebook, the docs site, the tests
# make docs    build the site in _docs and say how to look at it
# make lab     open the notebooks in JupyterLab
# make bench   the measured comparisons behind the numbers on the site
PYTHON ?= python3
EXTRAS ?= dev,docs,sim
# On a machine without a GPU, UV_ARGS="--index https://download.pytorch.org/whl/cpu" takes the small CPU build of torch.
UV_ARGS ?= $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: help env demo test docs lab bench clean
help:
	@sed -n 's/^# //p' Makefile

env: .venv/ready
.venv/ready: settings.ini pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vla_nb needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	uv pip install -q $(UV_ARGS) torch==2.13.0 -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: env
	vla-nb demo $(ARGS)

test: env
	bash tests/run.sh

docs: env
	@if command -v npm >/dev/null; then npm ci --prefix docs --ignore-scripts --silent; else echo 'npm not found: formulas will load from the web'; fi
	python docs/build.py
	@echo 'look at it: python -m http.server -d _docs'

lab: env
	jupyter lab nbs

bench: env
	vla-nb bench data

clean:
	rm -rf .venv _docs _proc _proc_site outputs
