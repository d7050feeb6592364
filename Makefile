PYTHON ?= python3
BIN := .venv/bin
OUT ?= outputs/digits

.PHONY: install quickstart test test-fast lint

# Reinstalls only when the dependencies change.
install: .venv/.installed
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@

# Trains a small diffusion language model with two Ray Train workers, shows how it writes, evaluates it; no GPU needed.
quickstart: install
	$(BIN)/python jobs/sft.py --output_dir $(OUT)
	$(BIN)/python jobs/sample.py --model.path $(OUT)/final --output_dir $(OUT)/samples --prompt "shuffle 40962" --show \
	  --sampler.max_new_tokens 8 --sampler.block_size 8 --sampler.steps 8
	$(BIN)/python jobs/evaluate.py --config configs/evaluate/digits.yaml --model.path $(OUT)/final \
	  --output_dir $(OUT)/evaluate

# One torch thread for each process: several processes with as many threads as there are cores wait for each other.
test test-fast: export OMP_NUM_THREADS = 1

test: install
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Without the tests that start Ray or train.
test-fast: install
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
