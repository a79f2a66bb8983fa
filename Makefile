# Six chores. Each sets up what it needs: a virtual environment in .venv from the hashed lock, and Delta's jars.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
UV := 0.13.9
BIN := .venv/bin

.PHONY: demo test faults soak check lock clean
demo: .venv/ready
	$(BIN)/vql demo

test: .venv/ready
	$(BIN)/python -m pytest -m "not faults and not soak" -n 2 --dist worksteal

faults: .venv/ready
	$(BIN)/python -m pytest -m faults tests/faults

soak: .venv/ready
	VQL_SOAK_REQUESTS=$(or $(VQL_SOAK_REQUESTS),100000) $(BIN)/python -m pytest -m soak tests/soak

check: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q -p no:randomly tests/test_imports.py tests/test_docs.py
	$(BIN)/python -m pytest -q -p no:randomly --jaxtyping-packages=models,beartype.beartype tests/models

# The lock holds hashes for every platform and no addresses.
lock: .venv/bin/uv
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --generate-hashes --no-emit-index-url \
		--python-version 3.11 --custom-compile-command "make lock" -q -o requirements.lock

clean:
	rm -rf .venv build

.venv/bin/uv:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "Python 3.11 is needed, as python3.11 on PATH or: make PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)

.venv/ready: .venv/bin/uv requirements.lock pyproject.toml
# Compiled: where Python may not write bytecode itself, each of the many processes would compile torch and Spark anew.
	@echo "installing into .venv (about 6 GB; one to a few minutes)"
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	$(BIN)/vql setup
	@touch $@
