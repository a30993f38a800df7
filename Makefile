# Every target does its own set-up in .venv; a set-up that is already there is not repeated.
# TORCH and AUTO_LIRPA choose what is installed: see tools/setup_env.sh.
# MEGATRON=0.19.2 uses that release of megatron-core, in an environment of its own.
# ARGS is passed on: make test ARGS='-k column -x'

PY := .venv$(addprefix -megatron-,$(MEGATRON))/bin/python
# Several ranks share the cores: one thread each, unless the caller says otherwise.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo demo-digits demo-gpt2 test test-all test-newest lint bench docs clean

help:
	@echo 'make setup     .venv with torch, lirpa_megatron and auto_LiRPA'
	@echo 'make demo      certify sentences from a Megatron checkpoint, with two processes and with one'
	@echo 'make demo-digits  the same for a network of digits from an ONNX file'
	@echo 'make demo-gpt2 HF=FOLDER  what GPT-2 says next, from your Hugging Face folder'
	@echo 'make test      the tests; make test-all adds the slow ones'
	@echo 'make test-newest  imports, adapters and checkpoints with the newest megatron-core, 0.19.2'
	@echo 'make lint      ruff'
	@echo 'make bench     memory and time against plain auto_LiRPA and the number of ranks; figures'
	@echo 'make docs      the documentation, in build/docs'
	@echo 'make clean     remove .venv and everything made'

setup:
	@tools/setup_env.sh
	@$(addprefix tools/setup_megatron.sh ,$(MEGATRON))

demo: setup
	$(PY) examples/sst/demo.py $(ARGS)

demo-digits: setup
	$(PY) examples/digits/demo.py $(ARGS)

demo-gpt2: setup
	@test -n "$(HF)" || { echo 'say which folder holds GPT-2: make demo-gpt2 HF=FOLDER'; exit 2; }
	$(PY) -W ignore examples/gpt2/demo.py $(HF) $(ARGS)

test: setup
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-all: setup
	$(PY) -m pytest -m '' $(ARGS)

# Half a minute, and as much for the environment; `make test MEGATRON=0.19.2` runs all tests.
NEWEST_IMPORTS := test_importing_changes_and_prints_nothing_and_needs_no_optional_package
test-newest:
	@$(MAKE) --no-print-directory test MEGATRON=0.19.2 ARGS='tests/test_adapters.py \
		tests/test_checkpoint.py tests/test_packaging.py::$(NEWEST_IMPORTS) $(ARGS)'

lint: setup
	$(PY) -m ruff check .

BENCH := build/bench

bench: setup
	mkdir -p $(BENCH)
	$(PY) benchmarks/run.py --models mnist-256x6 --batch 1 8 --rounds 2 --json $(BENCH)/256x6.json
	$(PY) benchmarks/run.py --models deep --rounds 1 --json $(BENCH)/deep.json
	$(PY) benchmarks/transformers.py --layers 1 3 --sequence 16 --modes tp1 tp2 tp4 \
		--json $(BENCH)/shallow.json
	$(PY) benchmarks/transformers.py --layers 6 --sequence 16 --modes tp1 tp2 \
		--json $(BENCH)/deep-transformer.json
	$(PY) benchmarks/plot.py --mlp $(BENCH)/256x6.json $(BENCH)/deep.json \
		--transformers $(BENCH)/shallow.json $(BENCH)/deep-transformer.json --out $(BENCH)

docs: setup
	$(PY) -c 'import mkdocs, mkdocstrings_handlers.python' 2>/dev/null \
		|| $(PY) -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(PY) -m mkdocs build --strict --quiet
	@echo 'open build/docs/index.html'

clean:
	rm -rf .venv .venv-megatron-* build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
