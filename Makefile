# `make demo` and `make test` do all the set-up they need, once; see `make help`.
PYTHON ?= python3
VENV ?= .venv
# Without triton where an older torch brings its own: EXTRAS=dev.
EXTRAS ?= dev,triton
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The one place that the sanitized package is built to, apart from the tree and the virtual environment.
SANITIZED := build/sanitize
OP_TESTS := tests/test_layer_norm.py tests/test_gelu.py tests/test_causal_attention.py tests/test_embedding.py \
            tests/test_linear.py tests/test_linear_cross_entropy.py tests/test_transformer_block.py tests/test_forward.py \
            tests/test_cpu.py tests/test_precisions.py tests/test_quantization.py::test_whole_pass \
            tests/test_sharing_work.py::test_forward tests/test_sharing_work.py::test_training_step
MORE_TESTS := tests/test_packed_pass.py tests/test_quantized_linear.py tests/test_quantized_training.py \
              tests/test_dropout.py tests/test_cache.py tests/test_scoring.py tests/fuzz/test_operations.py \
              tests/fuzz/test_passes.py

# The extension as a Mac gets it, but for its processor: threads of our own, and a BLAS for products of many rows.
AS_ON_A_MAC := build/as-on-a-mac
MAC_TESTS := $(OP_TESTS) $(MORE_TESTS) tests/test_threads.py tests/test_batch_generation.py tests/fuzz/test_threads.py

# A root folder of arm64 packages, and the package built for it. arm-short runs what takes seconds there.
ARM := build/arm
ARM_PYTHON := $(ARM)/root/usr/bin/python
# torch's OpenMP runtime has a name of its own there.
ARM_RUN := import sys, fastgpt.cpu, pytest; assert fastgpt.cpu._C.has_openmp(); sys.exit(pytest.main(sys.argv[1:]))
ARM_TESTS = $(OP_TESTS)
arm-short: ARM_TESTS = tests/test_layer_norm.py tests/test_gelu.py tests/test_embedding.py tests/test_linear.py \
    tests/test_transformer_block.py tests/test_causal_attention.py::test_head_dims tests/test_forward.py::test_rows \
    tests/test_forward.py::test_threads_give_the_same_bits

.PHONY: help setup venv demo test fuzz faults archs bench scaling figures sanitize sanitize-threads as-on-a-mac arm \
        arm-short lint format dist clean
help:  ## list the targets
	@sed -nE 's/^([a-z-]+)[a-z -]*:.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup venv: $(VENV)/.extension  ## the virtual environment, the dependencies and the extension

# The book's package is the tests' second oracle. It declares tensorflow and jupyterlab, which its
# model doesn't use, and shuts out Python releases on which it works: hence the two flags.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	FASTGPT_NO_EXT=1 $(PIP) install -q -c constraints.txt -e '.[$(EXTRAS)]'
	$(PIP) install -q -c constraints.txt --no-deps --ignore-requires-python llms-from-scratch
	@touch $@

# Built in place, once more when a source changes. The old build goes first: the extension is optional,
# so a failed build would leave it behind. No extension, no stamp: the next call tries again.
$(VENV)/.extension: $(VENV)/.installed setup.py $(wildcard csrc/*)
	@rm -f fastgpt/_C.*.so
	$(BIN)/python setup.py -q build_ext --inplace
	@if ls fastgpt/_C.*.so >/dev/null 2>&1; then touch $@; \
	 else echo 'fastgpt: no C++ extension (see above), everything runs on the reference'; fi

demo: setup  ## the book's model and ours on GPT-2 124M, side by side
	$(BIN)/python -m fastgpt compare

# In two processes, because most tests keep one thread busy. Threads that wait without sleeping would take the other
# process's time.
test: setup  ## the tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

# A run is repeated by its FUZZ_SEED, which it prints.
MINUTES ?= 10
fuzz: setup  ## new random examples of the tests in tests/fuzz, for MINUTES in all
	FUZZ_MINUTES=$(MINUTES) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest tests/fuzz

faults: setup  ## kills and failing disks at every call of every command that changes the disk: an hour
	FAULTS=all $(BIN)/python -m pytest -s tests/test_faults.py

# What was compiled is kept in build/triton-cache, by source, settings and triton's version.
archs: setup  ## every Triton kernel in every setting for every architecture, compiled
	ARCHS=all $(BIN)/python -m pytest tests/on_triton/test_compiled.py

# The peers: other libraries that run GPT-2. Nothing else needs them. llama.cpp is compiled, which takes
# some ten minutes; where that fails, the benchmarks run without it.
$(VENV)/.bench: $(VENV)/.installed
	FASTGPT_NO_EXT=1 $(PIP) install -q -c constraints.txt -e '.[bench]'
	FASTGPT_NO_EXT=1 $(PIP) install -q -c constraints.txt -e '.[llama]' || echo 'without llama.cpp (see above)'
	@touch $@

bench: setup $(VENV)/.bench  ## each operation, forward passes and generation against their peers
	$(BIN)/python -m benchmarks

scaling: setup $(VENV)/.bench  ## draw time against tokens, batch, layers and threads
	$(BIN)/python -m benchmarks.scaling --out docs/scaling.svg

# Takes half an hour on an idle machine.
figures: scaling  ## measure what the README and docs show, and write it there
	$(BIN)/python -m fastgpt bench --out docs/figures/bench.html --svg docs/figures
	$(BIN)/python -m benchmarks.figures docs/figures/bench.json README.md docs/benchmarks.md docs/readers.md

# GCC's, because the runtime that is loaded first must be that of the compiler used. libstdc++ comes
# with it: AddressSanitizer has to find __cxa_throw when the process starts. ThreadSanitizer sees none
# of the locks of torch and Python, which aren't built for it, so it watches the extension alone.
sanitize: SANITIZERS := address,undefined
sanitize: RUNTIME := libasan.so
sanitize: TESTS := $(OP_TESTS) $(MORE_TESTS)
sanitize-threads: SANITIZERS := thread
sanitize-threads: RUNTIME := libtsan.so
sanitize-threads: TESTS := tests/test_threads.py tests/test_sharing_work.py::test_operations
sanitize sanitize-threads: setup  ## the operations' tests under sanitizers; sanitize-threads: of races
	@rm -rf $(SANITIZED)
	FASTGPT_SANITIZE=$(SANITIZERS) CC=gcc CXX=g++ $(BIN)/python setup.py -q build \
	    --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(gcc -print-file-name=$(RUNTIME)) $$(gcc -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 \
	    $(BIN)/python tests/another_build.py $(SANITIZED)/lib $(SANITIZERS) $(TESTS)

# OpenBLAS's kernels for AVX2 sum up rows in two ways, so they would not be taken (csrc/gemm_blas.h).
as-on-a-mac: setup  ## the operations' tests with our own threads, and OpenBLAS in Accelerate's place
	@rm -rf $(AS_ON_A_MAC)
	FASTGPT_OPENMP=0 FASTGPT_BLAS=OpenBLAS $(BIN)/python setup.py -q build \
	    --build-base $(AS_ON_A_MAC) --build-lib $(AS_ON_A_MAC)/lib
	OPENBLAS_CORETYPE=Sandybridge $(BIN)/python tests/another_build.py $(AS_ON_A_MAC)/lib own-threads,OpenBLAS $(MAC_TESTS)

$(ARM)/.installed: tests/arm/install tests/arm/python tests/arm/requirements.txt | $(VENV)/.installed
	tests/arm/install $(ARM)/root $(PIP)
	@touch $@

# The emulated Python starts the cross compiler, which runs as a program of this machine.
arm arm-short: $(ARM)/.installed  ## the operations' tests on emulated aarch64; arm-short: some of them
	@rm -rf $(ARM)/lib
	CPPFLAGS="$$(echo -I$(ARM)/root/usr/include/python3.*) -idirafter $(ARM)/root/usr/include" \
	    $(ARM_PYTHON) setup.py -q build --build-base $(ARM) --build-lib $(ARM)/lib
	PYTHONPATH=$(CURDIR)/$(ARM)/lib PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 \
	    $(ARM_PYTHON) -c '$(ARM_RUN)' $(ARM_TESTS)

lint: setup  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.h csrc/*.cpp
	$(BIN)/mypy

format: setup  ## put the sources into the form that `make lint` checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp

dist: setup  ## the source distribution, and the wheel built from it
	rm -rf dist
	$(BIN)/python -m build

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info fastgpt/_C.*.so .mypy_cache .pytest_cache .ruff_cache
