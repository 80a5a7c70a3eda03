# Every target sets itself up in .venv, from python3 with venv and pip alone. `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.slime-lora-ready
READY_ALL := $(VENV)/.slime-lora-ready-all
READY_DOCS := $(VENV)/.slime-lora-ready-docs
# CPU pins only where there is no CUDA device: on a GPU machine the torch that is there must stay.
CONSTRAINTS := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' || echo '-c constraints-cpu.txt')
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq $(CONSTRAINTS)
REHEARSE_ARGS ?=
PYTEST_ARGS ?=
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_TESTS := tests/layers/test_bf16.py tests/layers/test_te.py tests/cost/test_gpu.py
GPU_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help rehearse test test-all contracts lint docs bench gpu clean

help:
	@echo "make rehearse   LoRA RL on a small tensor-parallel model; ends in a PEFT adapter under runs/rehearsal"
	@echo "                (flags for it: make rehearse REHEARSE_ARGS='--tp 2 --sp')"
	@echo "make test       the tests that take minutes (flags for pytest: PYTEST_ARGS='-k layout')"
	@echo "make test-all   all of them, the slow ones too"
	@echo "make contracts  the plugin against SGLang's and TransformerEngine's own code: 54 MB of wheels, once, into"
	@echo "                ~/.cache/slime-lora/wheels, without their dependencies (with vLLM's 336 MB: FETCH_ARGS=--vllm)"
	@echo "make lint       ruff, mypy, import-linter, shellcheck"
	@echo "make docs       the pages and an API page as a site, build/site; a warning is an error"
	@echo "make bench      step time, communicated bytes, checkpoint size; JSON in bench/out"
	@echo "make gpu        on a machine with a CUDA device, in ten minutes: the tests that need one, then time, memory and"
	@echo "                kernels of LoRA, frozen, full and PEFT; bench/out/gpu.json and gpu.txt. Installs nothing"
	@echo "make clean      remove .venv, caches and bench/out (runs/ stays)"

$(READY): pyproject.toml constraints-cpu.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "error: $(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) (once; a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[rehearsal,test,quant]'
	@touch $@

# DeepSpeed is an sdist; without its compiled ops it is pure Python.
$(READY_ALL): $(READY)
	@echo "adding DeepSpeed, with which only slow tests compare ..."
	@DS_BUILD_OPS=0 $(PIP) -e '.[rehearsal,test,quant,deepspeed]'
	@touch $@

$(READY_DOCS): $(READY)
	@$(PIP) -e '.[docs]'
	@touch $@

rehearse: $(READY)
	@$(BIN)/slime-lora rehearse $(REHEARSE_ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(READY_ALL)
	@$(BIN)/python -m pytest -m "" $(PYTEST_ARGS)

contracts: $(READY)
	@$(BIN)/python tests/contracts/fetch.py $(FETCH_ARGS)
	@SLIME_LORA_CONTRACTS=1 $(BIN)/python -m pytest -m "contracts and not slow" tests/contracts $(PYTEST_ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/shellcheck --exclude SC1091 .ci/run examples/lora/*.sh  # 1091: slime's own scripts are not here

docs: $(READY_DOCS)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml
	@echo build/site/index.html

bench: $(READY)
	@for script in $(filter-out bench/gpu.py,$(wildcard bench/[a-z]*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# With whatever torch is there: no set-up, which would need a network. Both are run, whatever becomes of the first.
gpu:
	@status=0; \
	$(GPU_PYTHON) -m pytest -m gpu $(GPU_TESTS) $(PYTEST_ARGS) || status=$$?; \
	$(GPU_PYTHON) bench/gpu.py $(GPU_ARGS) || status=$$?; \
	exit $$status

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
