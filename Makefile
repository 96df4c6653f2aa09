# Each target does all of its own set-up, in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all test-llama notebooks lint clean

demo: .venv/installed            ## train on the first stories for four minutes at most, then continue a sentence
	$(BIN)/python train.py --data training_data/first_stories --out runs/demo --resume --max-minutes 4 --max-steps 1200 \
		--preset tiny --n-layer 2 --d-model 192 --dropout 0 --ema-decay 0.99 --optimizer muon --lr 1e-2 --weight-decay 0.5 \
		--vocab-size 1800 --min-count 3 --eval-every 200 --patience 0
	$(BIN)/python run.py --model runs/demo --prompt "Tom had a" --max-tokens 120 --seed 1 \
		--temperature 0.6 --repeat-penalty 1.1

test: .venv/installed-dev        ## lint and the default tests: under six minutes on two cores
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy mamba2_min
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: .venv/installed-dev    ## the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

test-llama: .venv/installed-dev  ## llama.cpp runs exported models: needs npm, on Linux for x86-64
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && command -v npm >/dev/null; then \
		npm ci --prefix tests/llama --omit=optional --ignore-scripts && \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m llama tests/test_llama_cpp.py; \
	else \
		echo "test-llama: skipped, since it needs npm on Linux for x86-64"; \
	fi

notebooks: .venv/installed-notebooks  ## run every notebook from scratch; a failing cell or assert fails it
	$(BIN)/python notebooks/run_all.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) --editable ".[dev,eval]"
	@touch $@

.venv/installed-notebooks: .venv/installed
	$(INSTALL) --editable ".[notebooks,eval]"
	@touch $@

clean:                           ## everything that can be made again, except your runs
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis tests/llama/node_modules
	find . -name __pycache__ -prune -exec rm -rf {} +
