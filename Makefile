# `make demo` runs the main job, `make test` passes the tests; both set up all they need in .venv. The rest is for contributors.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
NATIVE := $(wildcard shmbroker/_native/*.c shmbroker/_native/*.h shmbroker/_native/*.pyx shmbroker/_native/*.pxi)
PYTEST_ARGS ?=
TEST_PROCESSES ?= 4# whatever the number of cores: most tests wait, for processes and disks

# Container images like to set it; each of the thousand processes of the tests would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo venv test long-test lint format native-test native-arm bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         stream a text file through a broker whose processes are killed on the way; nothing may be lost"
	@echo "make venv         the command alone, as .venv/bin/shmbroker"
	@echo "make test         all Python tests               PYTEST_ARGS='-k ring' runs some of them"
	@echo "make long-test    what would take the tests too long: hypothesis plays with the whole broker for half an hour"
	@echo "make lint         ruff, mypy, cython-lint, import contracts, C warnings"
	@echo "make native-test  the C tests under address, undefined-behaviour and thread sanitizers"
	@echo "make native-arm   compile the native core for 64-bit ARM"
	@echo "make bench        the benchmark, each figure beside this machine's own floor"
	@echo "make clean        remove what these commands made"

demo: $(VENV)/.installed
	$(BIN)/shmbroker demo

venv: $(VENV)/.installed

test: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

long-test: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m shmbroker.tools.bench

native-test:
	@PYTHON="$(PYTHON)" sh tools/preflight.sh
	$(MAKE) --no-print-directory --silent -C tests/native

# Compiles the native core for 64-bit ARM, with clang and glibc 2.31 from a wheel; runs nothing.
native-arm: $(VENV)/.installed
	$(BIN)/pip install --quiet ziglang
	for source in $$(ls shmbroker/_native/*.c | grep -v _core.c); do \
		$(BIN)/python -m ziglang cc -target aarch64-linux-gnu.2.31 -std=gnu11 -O2 -Wall -Wextra -Wconversion -Werror \
			-c "$$source" -o /dev/null || exit 1; \
	done

# mypy and import-linter look at the tree as it is installed: workers/ and tools/ inside the package.
lint: $(VENV)/.installed $(VENV)/.test-tools $(VENV)/.lint-tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf build/tree && mkdir -p build/tree && cp -rs "$(CURDIR)/shmbroker" build/tree/
	cp -rs "$(CURDIR)/workers" "$(CURDIR)/tools" build/tree/shmbroker/ && cp -rs "$(CURDIR)/tests" build/tree/
	cd build/tree && MYPYPATH=tests "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" shmbroker tests
	cd build/tree && "$(CURDIR)/$(BIN)/lint-imports" --no-cache --config "$(CURDIR)/pyproject.toml"
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint $(wildcard shmbroker/_native/*.pyx shmbroker/_native/*.pxi)
	for source in $(filter-out %/_core.c,$(filter %.c %.h,$(NATIVE))); do \
	    $(CC) -std=gnu11 -Wall -Wextra -Wconversion -Werror -fsyntax-only -x c $$source || exit 1; \
	done

format: $(VENV)/.lint-tools
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	rm -f shmbroker/_native/_core.c shmbroker/_native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	if [ -f tests/native/Makefile ]; then $(MAKE) --no-print-directory -C tests/native clean; fi

# --- the virtual environment: one stamp per step ---------------------------------------------------------------------
# The build tools live in it, so that a rebuild of the native core needs no network and Debian's venv, which comes
# without setuptools, is enough. pip is renewed first: Debian 12's does not know dependency groups.
$(VENV)/.created: pyproject.toml
	@PYTHON="$(PYTHON)" sh tools/preflight.sh
	@echo "shmbroker: setting up $(VENV), which is done once and takes about a minute"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "shmbroker: installing a current pip and the build tools: cython, setuptools"
	@$(PIP) install --upgrade "pip>=25.1"
	@$(PIP) install --group build
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(NATIVE)
	@echo "shmbroker: compiling the native core, installing what it uses: click, lark, lmdb, posix_ipc, psutil, rich"
	@PYTHONWARNINGS=ignore $(PIP) install --no-build-isolation --editable .
	@touch $@

$(VENV)/.test-tools: $(VENV)/.created
	@echo "shmbroker: installing the tools of the tests"
	@$(PIP) install --group test
	@touch $@

$(VENV)/.lint-tools: $(VENV)/.created
	@echo "shmbroker: installing the tools of lint"
	@$(PIP) install --group lint
	@touch $@
