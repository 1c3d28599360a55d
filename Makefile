# Everything runs in .venv, made on first use from pyproject.toml and the tested versions in constraints.txt.
# On a laptop where a bare torch would pull CUDA packages: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest -q

.PHONY: demo demo-finetune test test-slow test-gpu lint bench setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev,tensorboard]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python scripts/demo_corpus.py --out data/demo
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node=2 train.py yaml/mpt-tiny.yaml
	$(BIN)/python scripts/check_run.py runs/mpt-tiny

# Fine-tunes what the first demo leaves: answers to questions, then long texts, then conversations.
demo-finetune: demo
	$(BIN)/python scripts/demo_instructions.py --corpus data/demo --out data/demo-instructions
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node=2 train.py yaml/mpt-tiny-instruct.yaml
	$(BIN)/python scripts/check_run.py runs/mpt-tiny-instruct
	$(BIN)/python scripts/prepare_data.py data/demo/corpus.jsonl --val data/demo/validation.jsonl --out data/demo-books --tokenizer data/demo --excerpt-tokens 2048
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node=2 train.py yaml/mpt-tiny-storywriter.yaml
	$(BIN)/python scripts/check_run.py runs/mpt-tiny-storywriter --margin 0.05
	$(BIN)/python scripts/plot_extrapolation.py runs/mpt-tiny/export runs/mpt-tiny-storywriter/export --data data/demo-books --length 2048 --out runs/mpt-tiny-storywriter/by-position
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node=2 train.py yaml/mpt-tiny-chat.yaml
	$(BIN)/python scripts/check_run.py runs/mpt-tiny-chat
	$(BIN)/python scripts/generate.py runs/mpt-tiny-instruct/export --instruct --max-new-tokens 40 --prompt 'What does the function close do?'

test: $(READY)
	$(PYTEST) -m "not slow" --durations=15

test-slow: $(READY)
	$(PYTEST) -m "slow" --durations=15

# The tests of kernels, compiled on this machine's GPU instead of interpreted, and what else needs one.
test-gpu: $(READY)
	MPT_TEST_DEVICE=cuda $(PYTEST) tests/test_kernels_*.py --durations=15
	MPT_TEST_DEVICE=cuda $(PYTEST) -m gpu tests/test_mpt_*.py tests/test_trainer_*.py --durations=5

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python scripts/bench_kernels.py
	$(BIN)/python scripts/bench_train.py
	$(BIN)/python scripts/bench_data.py
	$(BIN)/python scripts/bench_checkpoint.py
	$(BIN)/python scripts/bench_load.py
	$(BIN)/python scripts/demo_corpus.py --out data/demo
	$(BIN)/python scripts/bench_overhead.py

clean:
	rm -rf .venv runs data/demo data/demo-books data/demo-instructions
