# Short commands for nox, which runs from a small environment of its own.

# The first Python from 3.10 up that starts and has venv: a shim may exist and fail, and Debian packages venv separately.
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && break; done)
NOX := .venv/bin/nox
# Named after the lock's content, not its time: a checkout that only touches the file installs nothing.
TOOLS := .venv/.lock-$(shell cksum < requirements/tools.txt | tr ' ' '-')

# Test sessions that run side by side; two need about 6 GB of memory.
JOBS := 2

.PHONY: help tools e2e smollm2 test matrix lint format lock bench clean distclean

help:
	@echo "make e2e      the whole build, from dataset to verified package (ARGS=\"--force\" for more)"
	@echo "make smollm2  the same for an existing model, SmolLM2-135M-Instruct, imported instead of trained"
	@echo "make test     all tests, each package's in the environment that it runs in (JOBS=1: one session at a time)"
	@echo "make matrix   export, convert and verify with every torch version, and compare them"
	@echo "make lint     style, types, import contracts, workflows"
	@echo "make format   apply the style"
	@echo "make lock     compile the hashed locks again"
	@echo "make tools    .venv alone, which has nox, uv and the coremill command"
	@echo "make bench    measurements (ARGS=\"training\" or \"conversion\")"
	@echo "make clean    remove build/; distclean removes the environments too"

tools: $(TOOLS)

e2e: $(TOOLS)
	$(NOX) -s pipeline -- $(ARGS)

smollm2: $(TOOLS)
	$(NOX) -s pipeline -- --config configs/smollm2-135m.toml $(ARGS)

test: $(TOOLS)
	$(NOX) -j $(JOBS) -s tests -- $(ARGS)

matrix: $(TOOLS)
	$(NOX) -s matrix -- $(ARGS)

lint: $(TOOLS)
	$(NOX) -s lint

format: $(TOOLS)
	$(NOX) -s format

lock: $(TOOLS)
	$(NOX) -s lock -- $(ARGS)

bench: $(TOOLS)
	$(NOX) -s bench -- $(ARGS)

clean:
	rm -rf build

distclean: clean
	rm -rf .venv .nox

$(TOOLS):
	@test -n "$(PYTHON)" || { echo "no Python from 3.10 up with venv was found on PATH: install one (on Debian, python3-venv too), then run make again" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --require-hashes -r requirements/tools.txt
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
