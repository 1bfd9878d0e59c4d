# What is run on a checkout. Every command stands here once; `make` lists the targets.

PYTHON ?= python
PYTEST = $(PYTHON) -m pytest
# Tests run in so many processes.
JOBS ?= auto
# `make gate ARCH=sm_90` compiles Triton's kernels for that one alone.
ARCH ?=

TRITON_GATE = $(PYTHON) -m fusedmlp.bench.gate.kernels --brief $(if $(ARCH),--arch $(ARCH))
CSRC_BUILD = FUSEDMLP_CUDA=1 $(PYTHON) -m pip install --quiet --no-deps --editable .
CSRC_GATE = $(PYTHON) -m fusedmlp.bench.gate.csrc
BENCH = $(PYTHON) -m fusedmlp bench
SITE = NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

# Each op once, and the rules that every file, row, page and docstring obeys.
QUICK = tests/ops/test_each_op.py tests/kernels tests/backends/test_backend.py tests/house \
	-m "not slow and not long and not nightly"

# `make floors ENVIRONMENTS=oldest` runs that one alone.
ENVIRONMENTS ?=

# `make mutants ROOM="ops layers" COUNT=5 SEED=1`: fewer rooms, fewer faults, those of before.
# `make mutants FILE="patching/route*.py gates.py"`: these files alone, by globs.
ROOM ?=
FILE ?=
COUNT ?=
SEED ?=

# `make prove TOOL=values KERNEL="moe_up moe_down" LIMIT=60`: another tool, fewer kernels, less time.
TOOL ?=
KERNEL ?=
LIMIT ?=

.DEFAULT_GOAL := help
.PHONY: help test long nightly invariance quick lint execute gate gate-triton gate-csrc bound docs floors mutants prove families patch-sweep bench

# $(call needs,MODULE,EXTRA): one error where a Python module is not there.
needs = @$(PYTHON) -c 'import importlib.util, sys; importlib.util.find_spec("$(1)") or \
	sys.exit("make $@: needs the Python package $(1), which is not there: \
	$(PYTHON) -m pip install -e \".[$(2)]\"")'

# As setup.py looks for it.
NVCC = $${CUDACXX:-$${CUDA_HOME:+$$CUDA_HOME/bin/}nvcc}
needs_nvcc = @command -v "$(NVCC)" > /dev/null || { echo "make $@: needs nvcc, which is not there:" \
	"install the CUDA toolkit (12.8 or newer) and put its bin folder on PATH, or set CUDA_HOME;" \
	"'make gate-triton' needs none" >&2; exit 1; }

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: ## the suite, but for what is long, nightly (tests/*.txt) or slow
	$(call needs,pytest,test)
	$(PYTEST) -n $(JOBS)

long: ## what tests/long.txt lists: whole commands, torch.compile, whole models
	$(call needs,pytest,test)
	$(PYTEST) -n $(JOBS) -m "long and not slow"

nightly: ## what .ci/run leaves out: large grids, all that is slow, every kernel executed; hours
	$(call needs,pytest,test)
	$(PYTEST) -n $(JOBS) -m "nightly or slow"
	$(BENCH) gate execute

invariance: ## the grid of batch invariance: every case, and five blocks as compiled for each GPU
	$(call needs,pytest,test)
	$(PYTEST) -n $(JOBS) -m slow tests/ops/test_batch_invariance.py

quick: ## each op once and the rules of the house, in two minutes on two cores
	$(call needs,pytest,test)
	$(PYTEST) -n $(JOBS) $(QUICK)

lint: ## ruff, its formatter, mypy
	$(call needs,ruff,test)
	$(call needs,mypy,test)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

execute: ## run every compiled Triton kernel on the PTX machine, no GPU: one job of each kind
	$(call needs,triton,test)
	$(BENCH) gate execute --brief

gate: ## compile every kernel ahead of time and look into the machine code; needs nvcc, no GPU
	$(needs_nvcc)
	@$(MAKE) --no-print-directory gate-csrc gate-triton

gate-triton: ## the half of it that is Triton's: one job of each kind of launch
	$(call needs,triton,test)
	$(TRITON_GATE)

gate-csrc: ## the half of it that is csrc/'s: build the extension, then look into it
	$(needs_nvcc)
	$(CSRC_BUILD)
	$(CSRC_GATE)

bound: ## upper bounds of every kernel's speed by its machine code, against the committed table
	$(call needs,triton,test)
	$(BENCH) gate bound $(if $(ARCH),--arch $(ARCH))

docs: ## the documentation site, into build/site
	$(call needs,mkdocs,docs)
	$(call needs,mkdocstrings,docs)
	$(SITE)

floors: ## a part of the suite on the oldest and newest releases promised; installs gigabytes
	JOBS=$(JOBS) $(PYTHON) tests/floors.py $(ENVIRONMENTS)

mutants: ## single faults put into the code: which of them the tests miss, by room
	$(call needs,pytest,test)
	$(PYTHON) tests/mutants $(if $(ROOM),--room $(ROOM)) $(if $(FILE),--file $(FILE:%='%')) \
		$(if $(COUNT),--count $(COUNT)) $(if $(SEED),--seed $(SEED))

prove: ## two provers that others wrote look at the kernels of sm_80; installs them, no GPU
	$(call needs,triton,test)
	$(PYTHON) tests/prove $(TOOL) $(if $(LIMIT),--limit $(LIMIT)) $(if $(KERNEL),--kernel $(KERNEL))

families: ## docs/models.md: the experts of each family of transformers, their gates and routers
	$(call needs,transformers,test)
	$(PYTHON) tests/families

patch-sweep: ## docs/patch_sweep.md: what patch() does to every model type; half an hour, resumable
	$(call needs,transformers,test)
	$(BENCH) patch-sweep

bench: ## errors against float64, and times or, without a GPU, computed times
	$(call needs,torch,bench)
	$(BENCH)
