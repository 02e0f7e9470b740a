# make demo | test | test-cluster | test-faults | test-swift | test-recipes | bench | check | lock. The first one sets everything up, in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-cluster test-faults test-swift test-recipes bench check format lock clean
.DELETE_ON_ERROR:

setup: .venv/installed

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmray needs Python 3.11 or later: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python jobs/demo.py --output build/demo

# In two processes, since tests wait for Ray's processes to start; a file's tests share what is costly to make.
# In order: the many small tests come last, and fill what the long ones leave.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Jobs on two real nodes, and the manifests; a part of `make test`.
test-cluster: setup
	$(BIN)/python -m pytest tests/cluster

# The tests of object storage against OpenStack Swift, where Debian's packages of it are installed.
test-swift: setup
	$(BIN)/python tests/s3/swift.py $(BIN)/python -m pytest tests/s3

# Says from which seed on it drew; MMRAY_FAULT_SEED=N draws the same kills again.
test-faults: setup
	$(BIN)/python -m pytest tests/faults tests/s3/test_kills.py -m 'faults or not faults' \
		--numprocesses 2 --dist worksteal

test-recipes: setup
	$(BIN)/python -m pytest -m recipe -s

# Labeling beside other engines, in turns. Prints tables and writes build/bench.json.
bench: setup build/peers/installed
	$(BIN)/python tests/peers/bench.py

build/peers/installed: tests/peers/requirements.txt | setup
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --target $(@D) --requirement $<
	touch $@

check: setup
	$(BIN)/ruff format --check mmray jobs tests
	$(BIN)/ruff check mmray jobs tests
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format mmray jobs tests
	$(BIN)/ruff check --fix mmray jobs tests

# Needs uv; every package that any supported Python and platform needs, by version.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --quiet \
		--custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf .venv build
