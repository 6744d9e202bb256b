# The main commands are `make run` and `make test`. Each installs what it needs into .venv on first use and ends with
# one line: the result, the time it took, and what to do next.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NOX := build/lanes/bin/nox
# uv, unlike pip, does not compile what it installs; with this variable set, every process would compile it again.
unexport PYTHONDONTWRITEBYTECODE
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo -n)

# VGG16 with batch norm on the handwritten digits: two to four minutes on two cores.
MAIN_JOB := --data-path digits --model vgg16_bn --epochs 6 --warmup 1 --lr 0.1 --lr-schedule cosine --fix-seed
# The test files whose expected numbers could depend on the processor's kernels.
NUMBERS := compare expected_losses experiments features model parity predictions schedule
# Tests in these files that add nothing about kernels: deeper networks, faults a million times larger than rounding,
# commands.
NOT_NUMBERS := vgg13 or vgg16 or vgg19 or fault or command_line or drawn

# $(call INSTALL,words,index) installs with the uv on the PATH or in .venv, or with pip if there is no uv or it fails.
# uv does not read pip's configuration, so a package index (mirror) configured there is passed to uv.
PIPS_INDEX = $$($(1) config list 2>/dev/null | sed -n "s/.*[.]index-url='\(.*\)'/\1/p" | head -1)
define INSTALL
{ uv=$$(command -v uv || command -v $(BIN)/uv) && \
	UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX-$(call PIPS_INDEX,$(BIN)/pip)}" \
	$$uv pip install --quiet --python $(BIN)/python -c constraints.txt $(if $(2),--default-index $(2)) $(1); } || \
{ echo "uv is not available or failed: installing with pip, which takes a few minutes" >&2; \
	$(BIN)/pip install --quiet -c constraints.txt $(if $(2),--index-url $(2)) $(1); }
endef

.PHONY: help install run test test-long test-kernels browser lab check notebooks lanes pin clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## set up .venv (other targets do this when needed)

# TORCH_INDEX=<address> installs torch from another index, e.g. the one with CPU-only builds (see docs/install.md).
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or later; try make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@command -v uv >/dev/null || $(BIN)/pip install --quiet -c constraints.txt uv 2>/dev/null || true
ifdef TORCH_INDEX
	@$(call INSTALL,--no-deps torch torchvision,$(TORCH_INDEX))
endif
	@echo "installing into .venv: this takes half a minute plus the download, and about 6 GB of disk space, mostly for" \
		"CUDA libraries (docs/install.md describes how to leave them out)"
	@$(call INSTALL,-e ".[dev]")
	$(BIN)/python -m ipykernel install --sys-prefix --name vgglab --display-name "Python (vgglab)"
	@touch $@

run: $(INSTALLED) ## train VGG16 on the digits, then run the first notebook and save it as HTML
	@run=runs/$$(date +%Y%m%d-%H%M%S)-main; start=$$(date +%s); failed() { code=$$1; shift; \
		echo "make run: $$1; to repeat only this step: $$2" >&2; exit $$code; }; \
	train="$(BIN)/python -m vgglab.train $(MAIN_JOB) --run-dir $$run --resume auto"; \
	book="$(BIN)/python -m vgglab.book notebooks/00_start_here.ipynb --out build/run"; \
	$$train || failed $$? "the training failed" "$$train"; \
	$$book || failed $$? "the training is complete ($$run), but the notebook failed" "$$book"; \
	seconds=$$(($$(date +%s) - start)); best=$$(sed -n 's/^ *"acc1": \([0-9.]*\).*/\1/p' $$run/report.json); \
	test -n "$$best" || failed 1 "$$run/report.json contains no accuracy" "$$train"; \
	printf '\n%.2f %% accuracy on the held-out digits, total time %d min %02d s; run directory: %s; to view it: %s; %s\n' \
		"$$best" $$((seconds / 60)) $$((seconds % 60)) $$run "$(BIN)/python -m vgglab.view.results $$run" \
		"$(BIN)/python -m webbrowser file://$(CURDIR)/build/run/00_start_here.html"

# tests/last_line.py prints the last line: the result and what to do next. The marker long is for slow tests, mostly
# repetitions that look for rare race conditions.
PYTEST := $(BIN)/python -m pytest -p tests.last_line -n auto --dist loadgroup

test: $(INSTALLED) browser ## run all tests except the long ones, including every notebook
	@$(PYTEST)

test-long: $(INSTALLED) ## run the long tests, mostly repetitions that look for rare race conditions
	@$(PYTEST) -m long

# With the kernels of the oldest processor, expected numbers that hold only on newer processors make a test fail.
test-kernels: $(INSTALLED) ## run the numerical tests again, with torch's kernels for older CPUs
	@ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST) -k "not ($(NOT_NUMBERS))" \
		$(patsubst %,tests/test_%.py,$(NUMBERS))

# Never fails: without a browser, the browser tests are skipped with a message.
browser: ## install Chromium for the browser tests with apt-get, if it is missing
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ $(AS_ROOT) apt-get update -qq && $(AS_ROOT) apt-get install -y --no-install-recommends chromium; } || \
		echo "no Chromium found, so the browser tests are skipped; to install it as root: apt-get install chromium" >&2

lab: $(INSTALLED) ## open JupyterLab with the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

check: $(INSTALLED) ## check style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	@echo "make check: no problems found; next: make test"

notebooks: $(INSTALLED) ## run all notebooks, build a web site in build/notebooks; parameters: ARGS="-p profile full"
	$(BIN)/python -m vgglab.book $(ARGS)

lanes: $(NOX) ## run tests on the card vendors' older stacks; LANES="t20 s60" selects some (see noxfile.py)
	@UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX-$(call PIPS_INDEX,build/lanes/bin/pip)}" $(NOX) $(if $(LANES),-s $(LANES))

# nox has its own environment, so that the lanes do not require .venv with its current torch. Without uv, pip installs
# each lane.
$(NOX): constraints.txt
	$(PYTHON) -m venv build/lanes
	build/lanes/bin/pip install --quiet -c constraints.txt nox
	@command -v uv >/dev/null || build/lanes/bin/pip install --quiet -c constraints.txt uv 2>/dev/null || \
		echo "uv is not available: pip will install the lanes, which takes a few minutes and 6 GB for each" >&2
	@touch $@

pin: $(INSTALLED) ## update constraints.txt from the packages in .venv
	@{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable; } > build.tmp && mv build.tmp constraints.txt

clean: ## remove build, .venv and .nox, but keep all runs
	rm -rf build .venv .nox
