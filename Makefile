# Everything a checkout needs, done once in .venv: uv does it where there is one, venv and pip where not.
#
#   make demo    digits read, found and followed by the tiny model in the package; a photograph and a video shown to it
#   make tiny    that model trained from scratch in about ten minutes on two cores
#   make rl      that model taught by reward what it was never taught, beside controls that must not; six CPU minutes
#   make eval    scores of the tiny model on digits it has not seen; a report in eval-out
#   make test    all tests, against the reference implementation
#   make test-quick   those of one process that compile little; under three minutes on two cores
#   make coverage     lines and branches that the tests run, and those that they do not
#   make lint types
#   make docs    the pages of docs/ in build/docs; a warning is an error
#   make aot     the 9B and GLM-OCR compiled for TPU slices that are not here, in an environment of its own (.venv-aot)
#   make aot-vllm     the vLLM plug-in's programs compiled for them, with tpu-inference's attention (.venv-vllm, 10 GB)
#   make serve-vllm   the plug-in in vLLM's engine and server on a CPU, with the tiny model; about 10 minutes (.venv-vllm)
#   make device-wheels   what bench.device needs beside JAX, Flax, Optax and Orbax where there is no network, in wheels/
#   make family-goldens   what tests of the sibling models compare with, from transformers 5.24 in .venv-5x
#
# PYTHON=... chooses the interpreter, ARGS=... goes to the demo, `eval`, `tiny`, `rl`, `aot` and `aot-vllm`, PYTEST_ARGS=...
# to pytest (two processes by default, as compiling, most of the time, uses one core each; the tests of a file stay
# together, so that what they share is made once). PIP_FIND_LINKS, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_CERT are
# honoured by uv as well as by pip.

MODERN := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(MODERN)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist worksteal
ENV_PYTHON := $(VENV)/bin/python
UV := $(shell command -v uv 2>/dev/null)

ifdef UV
CREATE = $(UV) venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV)
# uv does not read pip's variables. Without the links a torch for GPUs, gigabytes of it, takes the place of a CPU one.
INSTALL = $(if $(PIP_CERT),SSL_CERT_FILE="$(PIP_CERT)") $(UV) pip install --quiet --python $(ENV_PYTHON) \
	$(foreach place,$(PIP_FIND_LINKS),--find-links "$(place)") \
	$(if $(PIP_INDEX_URL),--default-index "$(PIP_INDEX_URL)") \
	$(foreach url,$(PIP_EXTRA_INDEX_URL),--index "$(url)")
else
CREATE = $(PYTHON) -m venv $(VENV)
INSTALL = $(ENV_PYTHON) -m pip install --quiet --disable-pip-version-check
endif

.NOTPARALLEL:
.PHONY: help setup demo eval test test-quick coverage lint types docs tiny rl aot aot-vllm serve-vllm device-wheels family-goldens clean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

$(ENV_PYTHON):
	@test -n "$(PYTHON)" || { echo "glm4v_jax needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 1; }
	$(CREATE)

$(VENV)/demo.stamp: pyproject.toml | $(ENV_PYTHON)
	@echo "installing into $(VENV), once: a few minutes"
	$(INSTALL) --editable '.[demo]'
	@touch $@

# torchvision asks for a torch of its own kind, and the reference wants only parts of it that need no torch extension.
$(VENV)/test.stamp: pyproject.toml | $(ENV_PYTHON)
	@echo "installing into $(VENV), once: a few minutes"
	$(INSTALL) --editable '.[test]'
	$(INSTALL) --no-deps torchvision==0.28.0
	@touch $@ $(VENV)/demo.stamp $(VENV)/eval.stamp

setup: $(VENV)/test.stamp

$(VENV)/eval.stamp: pyproject.toml | $(ENV_PYTHON)
	$(INSTALL) --editable '.[eval]'
	@touch $@

demo: $(VENV)/demo.stamp
	$(ENV_PYTHON) -m examples.demo $(ARGS)

eval: $(VENV)/eval.stamp
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(ENV_PYTHON) -m eval $(ARGS)

TESTS = JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(ENV_PYTHON) -m pytest

test: $(VENV)/test.stamp
	$(TESTS) $(PYTEST_ARGS)

test-quick: $(VENV)/test.stamp
	$(TESTS) $(PYTEST_ARGS) -m "not slow and not multiprocess and not tpu_compile"

coverage: $(VENV)/test.stamp
	mkdir -p .cache
	$(subst -m pytest,-m coverage run -m pytest,$(TESTS)) $(PYTEST_ARGS); status=$$?; \
	$(ENV_PYTHON) -m coverage combine --quiet && $(ENV_PYTHON) -m coverage report && exit $$status

lint: $(VENV)/test.stamp
	$(ENV_PYTHON) -m ruff check .
	$(ENV_PYTHON) -m ruff format --check .

types: $(VENV)/test.stamp
	$(ENV_PYTHON) -m mypy

$(VENV)/docs.stamp: pyproject.toml | $(ENV_PYTHON)
	$(INSTALL) --editable '.[docs]'
	@touch $@

docs: $(VENV)/docs.stamp
	JAX_PLATFORMS=cpu $(ENV_PYTHON) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

# Trains the packaged checkpoint from scratch, prints what it can do, and packages it if that is what is aimed at.
tiny: $(VENV)/test.stamp
	JAX_PLATFORMS=cpu $(ENV_PYTHON) -m tools.train_tiny $(ARGS)

# Learning by reward through `glm4v train`; ARGS=--all also compares curricula, and writes docs/leftmost.md.
rl: $(VENV)/test.stamp
	JAX_PLATFORMS=cpu $(ENV_PYTHON) -m tools.reward_study $(ARGS)

# libtpu must not sit where other JAX programs run on a CPU.
.venv-aot/aot.stamp: pyproject.toml
	"$$(command -v $(PYTHON))" -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[tpu]'
	@touch $@

aot: .venv-aot/aot.stamp
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m bench.aot $(ARGS)

# vLLM and tpu-inference pin a jax that Python 3.12 is the first to have.
.venv-vllm/stamp: pyproject.toml
	@echo "installing into .venv-vllm, once: a few minutes, about 10 GB"
	python3.12 -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[vllm-tpu,demo,video]' 'pytest>=9' 'hypothesis>=6.150' 'openai>=3.57'
	@touch $@

aot-vllm: .venv-vllm/stamp
	JAX_PLATFORMS=cpu .venv-vllm/bin/python -m bench.aot_vllm $(ARGS)

# A process for each file: in one, vLLM changes PyTorch and JAX for all that follows.
serve-vllm: .venv-vllm/stamp
	for name in reference llm serve guide; do \
		.venv-vllm/bin/python -m pytest -q tests/serve/vllm_engine/check_$$name.py || exit 1; \
	done

# What a machine lacks that has Python 3.12, jax, flax, optax, orbax-checkpoint, safetensors, tokenizers and what these
# depend on. tests/bench/test_device.py checks that nothing else is imported.
DEVICE_WHEELS = einops jaxtyping jinja2 markupsafe msgspec pillow platformdirs

device-wheels:
	rm -rf wheels
	"$$(command -v $(PYTHON))" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
		--platform manylinux2014_x86_64 --dest wheels $(DEVICE_WHEELS)
	@du -sh wheels

# The judge of the sibling models wants other versions of its dependencies than that of GLM-4.1V.
.venv-5x/stamp: Makefile
	"$$(command -v $(PYTHON))" -m venv .venv-5x
	.venv-5x/bin/python -m pip install --quiet --disable-pip-version-check \
		transformers==5.24.0 torch==2.13.0 pillow jinja2 safetensors av
	.venv-5x/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0
	@touch $@

.PHONY: .venv-5x
.venv-5x: .venv-5x/stamp

family-goldens: .venv-5x/stamp
	PYTHONPATH=.:tests .venv-5x/bin/python -m tests.golden.make_family_goldens
	PYTHONPATH=.:tests .venv-5x/bin/python -m tests.golden.make_frame_goldens

clean:
	rm -rf $(VENV) .venv-aot .venv-5x .venv-vllm .cache build dist wheels *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
