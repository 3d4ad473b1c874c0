# make demo    train, pack, decode and score the demo recipe
# make test    linter and quick tests
# make prove   the long proofs; those of kernels that are as tests/proved.json says are left out
# make gpu     on a GPU: tests, times, compute-sanitizer, in 9 minutes; no set-up if PYTHON has torch
# make docs    pages of the Python interface, from its docstrings, in build/api
# make matrix  what runs with the oldest to the newest torch; downloads each: 15 GB
# make clean   delete what was built, but not .venv
#
# All share one .venv, made by .ci/setup when pyproject.toml or setup.py is newer; .ci/build compiles
# what a change in csrc/ touches.
#
# PROVE=all                 leave no proof out
# PYTHON=python3.12         the interpreter that .venv is made from
# PGOLF_TORCH=cpu           torch without CUDA: 1 GB instead of 5.7
# PGOLF_BUILD=cpu|cuda      what to compile; otherwise CUDA kernels only where there is a GPU

python := .venv/bin/python

# Threads that wait must not spin: on few cores they take the time of those that work.
export OMP_WAIT_POLICY = PASSIVE

# A process for each core, which tests/conftest.py holds to one thread.
parallel := -n auto

.PHONY: help setup demo test prove gpu docs matrix clean

help:
	@sed -n 's/^# \(make\|PROVE\|PYTHON\|PGOLF\)/\1/p' Makefile

setup: .venv/ready
	@sh .ci/build

.venv/ready: pyproject.toml setup.py .ci/setup
	@sh .ci/setup
	@touch $@

demo: setup
	@$(python) -m pgolf train demo

# Compiled modules are kept, whatever the environment says: hundreds of processes read them.
test: export PYTHONDONTWRITEBYTECODE =
test: setup
	@$(python) -m ruff check .
	@$(python) -m pytest $(parallel) --dist worksteal -m "not slow and not gpu"

# Tests of one file share what they build. pytest exits with 5 where it selected no test.
prove: PROVE ?= changed
prove: setup
	@$(python) -m pytest $(parallel) --dist loadfile -m slow --prove $(PROVE) || { code=$$?; [ $$code -eq 5 ] && echo "no test is marked slow"; }

# It compiles what it needs by itself.
gpu: export PGOLF_BUILD = cuda
gpu:
	@if $${PYTHON:-python3} -c 'import torch' 2> /dev/null; then $${PYTHON:-python3} -m bench gpu; \
	else $(MAKE) setup && $(python) -m bench gpu; fi

docs: setup
	@$(python) docs/api.py

matrix: setup
	@$(python) -m bench matrix --changed

clean:
	rm -rf build dist pgolf.egg-info pgolf/_C.*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
