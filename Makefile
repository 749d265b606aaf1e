# Every target sets up what it needs. `make help` lists them.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO := runs/demo
PYTEST_ARGS ?=
# Processes for the tests that start no cluster; one thread each.
TEST_JOBS ?= auto
# Processes for the tests that start a cluster, each with clusters of its own. A file stays in one
# process, because its tests share a cluster and runs.
RAY_JOBS ?= 2

NO_CLUSTER = OMP_NUM_THREADS=1 $(PY) -m pytest -m "not ray and not gpu and not slow" -n $(TEST_JOBS) $(PYTEST_ARGS)
CLUSTER = OMP_NUM_THREADS=1 $(PY) -m pytest -m "ray and not gpu and not slow" -n $(RAY_JOBS) \
	--dist loadfile $(PYTEST_ARGS)

export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help setup demo ablation methods test lint types walls structure docs faults golden chaos scaling unit ray format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install the pinned packages; does nothing when they are installed

# torch goes first and alone, so that a wheel that is already on this machine (CPU or CUDA) is kept.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rl-edit needs Python 3.11 or newer, got $$($(PYTHON) --version): run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## train the built-in editor, evaluate it, write the report: runs/demo
	@if [ -e $(DEMO) ]; then n=1; while [ -e $(DEMO)-previous-$$n ]; do n=$$((n + 1)); done; \
		mv $(DEMO) $(DEMO)-previous-$$n; echo "The demo of before is now $(DEMO)-previous-$$n"; fi
	$(VENV)/bin/rl-edit train --preset tiny-rc-grpo --run-dir $(DEMO)
	$(VENV)/bin/rl-edit evaluate $(DEMO)
	$(VENV)/bin/rl-edit report $(DEMO)
	@echo
	@echo "Look at   $(DEMO)/report.html      curves, numbers and before/after images in one page"
	@echo "Numbers   $(DEMO)/evaluation.json  base, trained and delta with 95 % intervals"
	@echo "Weights   $(DEMO)/adapter          the LoRA, for rl-edit edit or stock diffusers"

ablation: $(STAMP)  ## what each part of RC-GRPO does, equal budgets, 3 seeds each; stop and rerun to resume
	$(PY) benchmarks/ablation.py

methods: $(STAMP)  ## every method at equal model evaluations, 3 seeds each, under 3 hours; stop and rerun to resume
	$(PY) benchmarks/methods.py

# Both parts run, so that one call shows every failure. pytest ends with 5 when PYTEST_ARGS selects
# no test of a part, which is an error only when it is so in both.
test: lint types  ## everything CI checks: lint, types, then tests in parallel, then Ray tests
	@$(NO_CLUSTER); first=$$?; $(CLUSTER); second=$$?; \
		if [ $$first -eq 5 ]; then exit $$second; elif [ $$second -eq 5 ]; then exit $$first; \
		elif [ $$first -ne 0 ]; then exit $$first; else exit $$second; fi

docs: $(STAMP)  ## write the generated pages again: docs/config.md
	$(VENV)/bin/rl-edit show-config --reference > docs/config.md

lint: $(STAMP)  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)  ## mypy over rl_edit, actors and learner
	$(PY) -m mypy

walls: $(STAMP)  ## only the import walls between the rooms
	$(PY) -m pytest tests/test_walls.py $(PYTEST_ARGS)

structure: $(STAMP)  ## draw the imports between the rooms: docs/images/structure.svg
	$(VENV)/bin/rl-edit structure --out docs/images/structure.svg

faults: $(STAMP)  ## the fault matrix: everything that kills, corrupts or withholds something (docs/reliability.md)
	$(PY) -m pytest -m "faults and not gpu" $(PYTEST_ARGS)

golden: $(STAMP)  ## 8 crash points x 3 ways on real Ray against the undisturbed run, minutes; stop and rerun to resume
	$(PY) benchmarks/golden.py

chaos: $(STAMP)  ## an hour of random faults on real runs, seed 0: benchmarks/results/chaos.md; stop and rerun to resume
	$(PY) benchmarks/chaos.py --hours 1 --seed 0

scaling: $(STAMP)  ## the controller against the cost model, and Ray against one bare process
	$(PY) benchmarks/scaling.py
	$(PY) benchmarks/overhead.py

unit: $(STAMP)  ## only the tests that start no Ray cluster, in parallel
	$(NO_CLUSTER)

ray: $(STAMP)  ## only the tests that start a Ray cluster, two files at a time
	$(CLUSTER)

format: $(STAMP)  ## rewrite the sources in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove caches and build products; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find rl_edit actors learner tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
