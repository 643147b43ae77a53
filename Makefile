# make demo    generate a clip with the embedded model
# make test    run the tests
# make help    list the rest
#
# The first run installs into .venv; later runs start at once. PYTHON=python3.12 picks another
# interpreter (3.11 or newer).

PYTHON ?= python3
PROMPT ?= a red circle moving right
ARGS ?=

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
BUILD_INPUTS := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

# A prompt may hold quotes, $ or ; so it travels unexpanded, in the environment, and no shell or
# make ever reads it as text of its own.
export DEMO_PROMPT := $(value PROMPT)
unexport PROMPT

.PHONY: demo test lint bench benchmark static counted sanitize gpu training clean help

demo: .venv/.demo
	@$(PY) -m opensora generate --prompt="$$DEMO_PROMPT" $(ARGS)

test: .venv/.test
	@$(PY) -m pytest $(ARGS)

lint: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.c*')

bench: .venv/.test
	@$(PY) -m bench.cpu

benchmark: .venv/.test
	@$(PY) -m pytest bench -s --benchmark-columns=median,rounds --benchmark-max-time=0.2 $(ARGS)

static: .venv/.test
	@$(PY) -m bench.static $(ARGS)
	@$(PY) -m bench.static_cuda $(ARGS)

counted: .venv/.test
	@$(PY) -m bench.counted

# The tests of the C++ kernels on a build that checks every access; the interpreter's own leaks and
# Python's tests of Triton are left out.
sanitize: .venv/.test
	@cmake=$$(command -v cmake || echo .venv/bin/cmake) && \
	  $$cmake -S . -B build/sanitize -DOPENSORA_SANITIZE=ON \
	    -DTORCH_ROOT=$$($(PY) -c 'import torch; print(torch.__path__[0])') > /dev/null && \
	  $$cmake --build build/sanitize --parallel > /dev/null
	@libraries=$$(for l in asan ubsan stdc++; do $${CXX:-c++} -print-file-name=lib$$l.so; done) && \
	  LD_PRELOAD="$$(echo $$libraries)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  OPENSORA_LIBRARY=build/sanitize/_C.abi3.so OMP_NUM_THREADS=2 \
	  $(PY) -m pytest -q tests/ops -p no:cacheprovider -k "C++ and not compiles" $(ARGS)
	@echo 'CUDA kernels, emulated (a warning about stacks is about the emulator, which changes them)'
	@for harness in csrc/cuda/harness/*.cu; do \
	  $${CXX:-c++} -std=c++17 -O2 -g1 -U_FORTIFY_SOURCE -fsanitize=address,undefined \
	    -fno-sanitize-recover=undefined -xc++ $$harness -o build/sanitize/harness && \
	  ASAN_OPTIONS=detect_leaks=0 build/sanitize/harness || exit 1; done

# The GPU machine's own Python, which has torch and Triton: nothing is installed.
gpu:
	@$(PYTHON) -m bench.gpu $(ARGS)

# Training steps of STDiT3-XL/2 by recomputation policy, on this machine's own torch.
training:
	@$(PYTHON) -m bench.training $(ARGS)

clean:
	rm -rf .venv build dist samples opensora.egg-info opensora/_C*.abi3.so opensora/_build.json

help:
	@echo 'make demo [PROMPT="a blue star falling"] [ARGS="--seed 1"]   clip under samples/'
	@echo 'make test [ARGS="-k rope"]     tests'
	@echo 'make lint                      ruff, mypy, clang-format'
	@echo 'make bench                     CPU kernels beside copies and peers, against the record'
	@echo 'make benchmark [ARGS="-k rms"] every kernel under pytest-benchmark'
	@echo 'make static                    gate the resources of every Triton and CUDA kernel, compiled'
	@echo 'make training                  tokens/s, MFU and memory of training STDiT3-XL/2, on a GPU'
	@echo 'make counted                   launches, bytes and graphs of a transformer block'
	@echo 'make sanitize                  C++ kernels, and emulated CUDA, with address and undefined-behaviour checks'
	@echo 'make gpu                       check, then time every kernel on this GPU; installs nothing'
	@echo 'make clean                     remove .venv and everything built'
	@echo 'PYTHON=python3.12              another interpreter; OPENSORA_BUILD: see setup.py'

# torch first: the kernels are built against its headers, so the build must not fetch another.
.venv/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'opensora needs Python 3.11 or newer: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo 'Installing into .venv (once; some minutes, most of it downloading torch)'
	@$(PYTHON) -m venv .venv || \
	  { echo 'no venv module: install it (Debian: apt-get install python3-venv)' >&2; exit 1; }
	@$(PIP) torch numpy 'setuptools>=77' cmake ninja
	@touch $@

.venv/.demo: .venv/.base $(BUILD_INPUTS)
	@echo 'Building and installing opensora'
	@$(PIP) --no-build-isolation --editable .
	@touch $@

# A CUDA compiler, which needs no GPU: tests compile the CUDA kernels and count what they use.
.venv/.nvcc: .venv/.base
	@if [ "$$(uname -s)" = Linux ]; then $(PIP) \
	  nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt 'nvidia-cuda-runtime==13.0.*' \
	  'nvidia-cuda-cccl==13.0.*'; fi
	@touch $@

.venv/.test: .venv/.nvcc $(BUILD_INPUTS)
	@echo 'Building and installing opensora and what its tests need'
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@ .venv/.demo

.venv/.dev: .venv/.nvcc $(BUILD_INPUTS)
	@echo 'Building and installing opensora and what its tests and checks need'
	@$(PIP) --no-build-isolation --editable '.[test,dev]'
	@touch $@ .venv/.test .venv/.demo
