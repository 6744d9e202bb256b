# Two commands matter: `make run` and `make test`. Each installs what it needs into .venv, once; each ends with one line:
# the result, the time, and what to do next.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NOX := build/lanes/bin/nox
# Each process would compile the modules again that uv, unlike pip, has not compiled.
unexport PYTHONDONTWRITEBYTECODE
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo -n)

# VGG16 with batch norm on the handwritten digits: about two minutes on two cores.
MAIN_JOB := --data-path digits --model vgg16_bn --epochs 6 --warmup 1 --lr 0.1 --lr-schedule cosine --fix-seed
# Of the tests, those whose numbers could depend on the processor's kernels.
NUMBERS := compare expected_losses experiments features model parity predictions schedule
# Of these, what says nothing more about kernels: deeper networks, faults a million times larger than rounding, commands.
NOT_NUMBERS := vgg13 or vgg16 or vgg19 or fault or door or drawn

# $(call INSTALL,words,index): by the uv on the PATH, or by the one that pip has brought into .venv; by pip where there is
# none or it fails. uv does not read pip's configuration, so an index that is set there (a mirror) is passed on to it.
PIPS_INDEX = $$($(1) config list 2>/dev/null | sed -n "s/.*[.]index-url='\(.*\)'/\1/p" | head -1)
define INSTALL
{ uv=$$(command -v uv || command -v $(BIN)/uv) && \
	UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX-$(call PIPS_INDEX,$(BIN)/pip)}" \
	$$uv pip install --quiet --python $(BIN)/python -c constraints.txt $(if $(2),--default-index $(2)) $(1); } || \
{ echo "uv is not available or failed: installing with pip, which takes some minutes" >&2; \
	$(BIN)/pip install --quiet -c constraints.txt $(if $(2),--index-url $(2)) $(1); }
endef

.PHONY: help install run test test-long test-kernels browser lab check notebooks lanes pin clean
.DEFAULT_GOAL := help

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## set up .venv (the others do it when needed)

# TORCH_INDEX=<address> takes torch from another index, e.g. the one with CPU-only builds (see README.md).
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or later; try make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@command -v uv >/dev/null || $(BIN)/pip install --quiet -c constraints.txt uv 2>/dev/null || true
ifdef TORCH_INDEX
	@$(call INSTALL,--no-deps torch torchvision,$(TORCH_INDEX))
endif
	@echo "installing into .venv: half a minute plus the download, about 6 GB on disk, most of it torch with CUDA" \
		"(README.md has the CPU-only way)"
	@$(call INSTALL,-e ".[dev]")
	$(BIN)/python -m ipykernel install --sys-prefix --name vgglab --display-name "Python (vgglab)"
	@touch $@

run: $(INSTALLED) ## the main job: train VGG16 on the digits, then the first notebook as HTML
	@run=runs/$$(date +%Y%m%d-%H%M%S)-main; start=$$(date +%s); failed() { code=$$1; shift; \
		echo "make run: $$1; to repeat just that: $$2" >&2; exit $$code; }; \
	train="$(BIN)/python -m vgglab.train $(MAIN_JOB) --run-dir $$run --resume auto"; \
	book="$(BIN)/python -m vgglab.book notebooks/00_start_here.ipynb --out build/run"; \
	$$train || failed $$? "the training failed" "$$train"; \
	$$book || failed $$? "the training is done ($$run), the notebook failed" "$$book"; \
	seconds=$$(($$(date +%s) - start)); best=$$(sed -n 's/^ *"acc1": \([0-9.]*\).*/\1/p' $$run/report.json); \
	test -n "$$best" || failed 1 "$$run/report.json names no accuracy" "$$train"; \
	printf '\n%.2f %% of the held-out digits are right, after %d min %02d s; the run: %s; to look at it: %s; %s\n' \
		"$$best" $$((seconds / 60)) $$((seconds % 60)) $$run "$(BIN)/python -m vgglab.view.results $$run" \
		"$(BIN)/python -m webbrowser file://$(CURDIR)/build/run/00_start_here.html"

# tests/last_line.py ends each with the result and what to do next. The marker long: repetitions that look for rare races.
PYTEST := $(BIN)/python -m pytest -p tests.last_line -n auto --dist loadgroup

test: $(INSTALLED) browser ## all tests but the long ones, every notebook included
	@$(PYTEST)

test-long: $(INSTALLED) ## the tests that repeat something often, to find rare races
	@$(PYTEST) -m long

# Numbers that hold on this processor only would fail here: the kernels of the oldest one.
test-kernels: $(INSTALLED) ## the tests of numbers once more, with the kernels of an old processor
	@ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST) -k "not ($(NOT_NUMBERS))" \
		$(patsubst %,tests/test_%.py,$(NUMBERS))

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
	$(BIN)/lint-imports --no-logo --no-cache
	@echo "make check: nothing wrong with style and types; next: make test"

notebooks: $(INSTALLED) ## execute all notebooks and leave a site in build/notebooks; ARGS="-p profile full" for others
	$(BIN)/python -m vgglab.book $(ARGS)

lanes: $(NOX) ## the tests on the card vendors' old stacks too; LANES="t20 s60" for some (see noxfile.py)
	@UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX-$(call PIPS_INDEX,build/lanes/bin/pip)}" $(NOX) $(if $(LANES),-s $(LANES))

# Apart from .venv, so that a lane does not need today's torch as well. Without uv each lane is installed by pip.
$(NOX): constraints.txt
	$(PYTHON) -m venv build/lanes
	build/lanes/bin/pip install --quiet -c constraints.txt nox
	@command -v uv >/dev/null || build/lanes/bin/pip install --quiet -c constraints.txt uv 2>/dev/null || \
		echo "uv is not available: pip installs the lanes, in some minutes and 6 GB each" >&2
	@touch $@

pin: $(INSTALLED) ## write constraints.txt anew from what .venv holds
	@{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable; } > build.tmp && mv build.tmp constraints.txt

clean: ## remove what was built; runs stay
	rm -rf build .venv .nox
