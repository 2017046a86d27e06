# make demo | test | check | fix | bench | install      (POSIX sh; needs Python 3.11, 3.12 or 3.13, nothing else)
#
# Everything lives in .venv beside this file. It is made when missing, and installed again only when pyproject.toml or
# constraints.txt changed, so the second time needs no network.

SHELL = /bin/sh
HERE := $(shell dirname "$$(echo '$(MAKEFILE_LIST)' | sed 's/^ //')")
ENTER = cd "$(HERE)" &&
PYTHON = .venv/bin/python

# PyTorch for machines without an NVIDIA GPU: 0.2 GB instead of 3. Used where it can be reached; the usual index otherwise.
CPU_TORCH ?= https://download.pytorch.org/whl/cpu

.PHONY: install demo test check fix bench
.DEFAULT_GOAL := install

demo:
	@$(ENTER) sh .ci/install demo report "$(CPU_TORCH)"
	@$(ENTER) $(PYTHON) -m glasshouse demo

install:
	@$(ENTER) sh .ci/install dev corpus,evaluation,export,hub,report,serve,tensorboard,dev "$(CPU_TORCH)"

test: install
	@$(ENTER) $(PYTHON) -m pytest -n 2 --dist loadfile $(ARGS)

check: install
	@$(ENTER) $(PYTHON) -m ruff check .
	@$(ENTER) $(PYTHON) -m ruff format --check .
	@$(ENTER) $(PYTHON) -m pyright --pythonpath $(PYTHON) src

fix: install
	@$(ENTER) $(PYTHON) -m ruff check --fix .
	@$(ENTER) $(PYTHON) -m ruff format .

bench: install
	@$(ENTER) for program in benchmarks/*.py; do echo "$$program"; $(PYTHON) "$$program" || exit 1; done
