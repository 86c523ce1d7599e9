# What is done with a checkout. `make demo` is the place to begin.
#
# VENV says where the environment is (.venv), PYTHON which interpreter makes it.

VENV ?= .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard protos/*.proto)
SEED ?= 0

# Made again when what they depend on has changed.
RUNTIME := $(VENV)/.stagemesh-runtime
DEV := $(VENV)/.stagemesh-dev

.DEFAULT_GOAL := help
.PHONY: help demo up test test-all check format protos sim product bench clean

help:
	@echo "make demo        a mesh of two stages tells a story, and ends"
	@echo "make up          a mesh until Ctrl-C; ARGS='--stages 3' adds options"
	@echo "make test        the tests; ARGS='-k sampling' chooses"
	@echo "make test-all    and more of the same: seeds, cuts, layouts"
	@echo "make check       ruff, mypy, import-linter"
	@echo "make format      ruff format, and what ruff can fix"
	@echo "make sim SEED=7  one seed of the simulator; ARGS='--num-seeds 1000 --quiet': more"
	@echo "make product     every family by stages, ranks, replicas: two hours; ARGS=--plan: minutes"
	@echo "make bench       how fast; ARGS='--stages 1,2 --batch 1,8 --out found' says what"
	@echo "make protos      the stubs from the .proto files"
	@echo "make clean       removes the environment and what was built"

$(DEV): pyproject.toml constraints.txt scripts/make_venv.sh
	@scripts/make_venv.sh $(VENV) dev
	@touch $@ $(RUNTIME)

# An environment for development is one for running as well.
$(RUNTIME): pyproject.toml constraints.txt scripts/make_venv.sh
	@scripts/make_venv.sh $(VENV) worker
	@touch $@

demo: $(RUNTIME)
	@$(BIN)/stagemesh demo $(ARGS)

up: $(RUNTIME)
	@$(BIN)/stagemesh up $(ARGS)

test: $(DEV)
ifeq ($(ARGS),)
	@scripts/run_tests.sh $(BIN)/python
else
	$(BIN)/python -m pytest $(ARGS)
endif

test-all: export STAGEMESH_THOROUGH := 1
test-all: test

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# grpc's part only for the files that have services.
protos: $(DEV)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I. --grpc_python_out=. $(shell grep -l '^service ' $(PROTOS))

sim: $(DEV)
	$(BIN)/python tests/simulation/run.py $(SEED) $(ARGS)

product: $(DEV)
	$(BIN)/python tests/product/run.py $(ARGS)

bench: $(DEV)
	$(BIN)/stagemesh bench $(ARGS)

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
