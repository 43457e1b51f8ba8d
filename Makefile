PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Paths in the repository only: tools must not wander into .venv or build.
CODE := setup.py csrc pyext tfops tests benchmarks examples
# Their blocks of Python are formatted, too.
TEXT := README.md CONTRIBUTING.md docs
CXX_CODE = $(shell find csrc pyext tfops tests benchmarks -name '*.cc' -o -name '*.[ch]' -o -name '*.cu')
BUILD_INPUTS = setup.py pyext/twinfuse/_build.py pyext/twinfuse/_version.py $(CXX_CODE) \
  csrc/embed.py csrc/exports.map $(wildcard csrc/gpu/choices/*.json build/kernels/kernels.json) \
  $(wildcard build/kernels/cuda.json)
# Processes that run the tests; some tests need a few gigabytes and two cores.
export WORKERS ?= 2
# Warnings stop a development build. A user's compiler may know warnings that ours does not.
export CXXFLAGS ?= -Werror
# Cases that are run of each test: together they are tens of thousands. 0: all. Those of GPU kernels
# are always all run: where there is no GPU, nothing else checks them.
export SAMPLE ?= 16
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --durations 40 --durations-min 5

.PHONY: setup demo test test-all bench kernels lint format sanitize clean

setup: $(VENV)/built

$(VENV)/dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --group dev
	touch $@

# One install makes the package importable; later changes need only the compiler.
$(VENV)/installed: $(VENV)/dependencies
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/built: $(VENV)/installed $(BUILD_INPUTS)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# Threads that wait for each other make networks as small as these crawl on a busy machine.
demo: export OMP_NUM_THREADS ?= 1
demo: setup
	$(BIN)/python -m examples.digits
	$(BIN)/python -m examples.sequences

test: setup
	$(PYTEST) --sample $(SAMPLE) --dist loadfile
	TRITON_INTERPRET=1 $(PYTEST) tests/gpu

test-all: SAMPLE = 0
test-all: sanitize test
	$(BIN)/python -m tests.install_matrix --full

bench: setup
	$(BIN)/python -m benchmarks

# Compiles the GPU kernels and checks their machine code; needs no GPU. TORCH_CUDA_ARCH_LIST narrows.
# Those of CUDA C++ need nvcc, and are left out without it.
# The next build of the core takes them in.
kernels: $(VENV)/dependencies
	$(BIN)/python csrc/aot.py build/kernels
	$(BIN)/python csrc/cuda_build.py build/kernels

lint: $(VENV)/dependencies
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE) $(TEXT)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_CODE)

format: $(VENV)/dependencies
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE) $(TEXT)
	$(BIN)/clang-format -i $(CXX_CODE)

sanitize: setup
	tests/sanitize.sh $(BIN)/python

clean:
	rm -rf build dist $(VENV)
	find pyext tfops tests -name '*.so' -delete
