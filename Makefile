# make ex1     set up .venv if needed and run the main job: train under PP2, convert, resume on one rank, prove it
# make test    set up and run the tests          make lint    ruff, mypy, codespell
# make test-fast   those that start no other process, for the edit loop
# make fig7    one Source, eleven Targets and eight Sources, one Target: the paper's Figure 7 on CPU, into gallery/
# make fig9    LLaMA, BLOOM and a mixture of experts under another topology: the paper's Figure 9, into gallery/
# make elastic  a job that loses a machine and gets it back: one curve    (examples/elastic)
# make finetune_smollm2  SmolLM2-135M in, fine-tuned under two topologies, and out again
# make hf_trainer  a Hugging Face Trainer script with one line more: killed on 2 ranks, resumed on 1 and on 3
# make bench   side-by-side measurements         make install only set up
# make gpu     on a machine with a GPU: everything that only a GPU can tell, in one table (tools/gpu_check.py)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install ex1 ex2 ex3 ex4 fig7 fig9 hf_trainer elastic finetune_smollm2 test test-fast lint bench gpu clean
.DELETE_ON_ERROR:

install: $(STAMP)

# Re-run when the dependencies or the C++ sources change.
$(STAMP): setup.py pyproject.toml megatron/data/index_helpers.cpp megatron/ucp/kernel.cpp
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11: set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23.2"
	$(BIN)/python -m pip install --quiet torch==2.13.0
	# By a path, not by setuptools' finder: after that one an installed megatron-core would hide this package.
	$(BIN)/python -m pip install --quiet -e '.[train,dev]' --config-settings editable_mode=compat
	@touch $(STAMP)

ex1 ex2 ex3 ex4: $(STAMP)
	bash examples/$@/run.sh

hf_trainer elastic finetune_smollm2: $(STAMP)
	bash examples/$@/run.sh

fig7 fig9: $(STAMP)
	GALLERY_DIR=gallery bash examples/$@/run.sh

# Two test modules at a time, each with up to eight ranks of its own; WORKERS=0 for one after the other. In the order of
# tests/conftest.py, not by the number of tests.
WORKERS ?= 2
PYTEST  := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) --durations=25

test-fast: $(STAMP)
	$(PYTEST) -m "not processes and not gpu"

$(VENV)/.lint: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[train,lint]' --config-settings editable_mode=compat
	@touch $@

lint: $(STAMP) $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: $(STAMP)
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/save.py
	$(BIN)/python benchmarks/async_save.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/predict.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/kernels.py

gpu: $(STAMP)
	$(BIN)/python tools/gpu_check.py

clean:
	rm -rf runs build *.egg-info .pytest_cache .ruff_cache
