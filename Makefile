# Two commands matter: `make run` and `make test`. Each installs what it needs into .venv, once.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NOX := build/lanes/bin/nox
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo -n)

# VGG16 with batch norm on the handwritten digits: about two minutes on two cores.
MAIN_JOB := --data-path digits --model vgg16_bn --epochs 6 --warmup 1 --lr 0.1 --lr-schedule cosine --fix-seed

.PHONY: help install run test browser lab check notebooks lanes pin clean
.DEFAULT_GOAL := help

help: ## what there is to make
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## set up .venv (the others do it when needed)

# TORCH_INDEX=<address> takes torch from another index, e.g. the one with CPU-only builds (see README.md).
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; try make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
ifdef TORCH_INDEX
	$(BIN)/pip install --quiet -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch torchvision
endif
	@echo "installing into .venv: some minutes and about 6 GB, most of it torch with CUDA (README.md has the CPU-only way)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m ipykernel install --sys-prefix --name vgglab --display-name "Python (vgglab)"
	@touch $@

run: $(INSTALLED) ## the main job: train VGG16 on the digits, then the first notebook as HTML
	@run=runs/$$(date +%Y%m%d-%H%M%S)-main && \
	$(BIN)/python -m vgglab.train $(MAIN_JOB) --run-dir $$run && \
	$(BIN)/python -m vgglab.book notebooks/00_start_here.ipynb --out build/run && \
	echo && echo "the run:      $$run (figures in report.json)" && echo "the notebook: build/run/00_start_here.html"

test: $(INSTALLED) browser ## all tests, every notebook included
	$(BIN)/python -m pytest -n auto --dist loadgroup

# Never fails: without a browser its tests are skipped, and say so.
browser: ## Chromium for the tests in a browser, where there is none and apt-get may install it
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ $(AS_ROOT) apt-get update -qq && $(AS_ROOT) apt-get install -y --no-install-recommends chromium; } || \
		echo "no Chromium: its tests are skipped; as root: apt-get install chromium" >&2

lab: $(INSTALLED) ## JupyterLab with the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

check: $(INSTALLED) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(INSTALLED) ## execute all notebooks and leave a site in build/notebooks; ARGS="-p profile full" for others
	$(BIN)/python -m vgglab.book $(ARGS)

lanes: $(NOX) ## the tests on the card vendors' old stacks too; LANES="t20 s60" for some (see noxfile.py)
	$(NOX) $(if $(LANES),-s $(LANES))

# Apart from .venv, so that no lane needs the room of two torches (6 GB each) on the disk.
$(NOX): constraints.txt
	$(PYTHON) -m venv build/lanes
	build/lanes/bin/pip install --quiet -c constraints.txt nox
	@touch $@

pin: $(INSTALLED) ## write constraints.txt anew from what .venv holds
	@{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable; } > build.tmp && mv build.tmp constraints.txt

clean: ## remove what was built; runs stay
	rm -rf build .venv .nox
