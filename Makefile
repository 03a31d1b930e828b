# Every target sets up .venv when it is missing; PYTHON=/path/to/python uses that interpreter instead.
# Variables: SEED=1 ARGS="key=value ..." DEST=DIR RUN=RUN

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup test lint train data demo twin prove runs handover checklist clean

SEED ?= 1
ARGS ?=

ifdef PYTHON
setup_done :=
test_setup_done :=
else
PYTHON := .venv/bin/python
setup_done := .venv/.installed
test_setup_done := .venv/.installed-test
endif
BASE_PYTHON ?= python3
DEMO_DATA := --train 4000 --valid 1000 --test 1000
DEMO_TRAINING := epochs=5 crop_epochs=3 warmup_epochs=1

# a seed reaches a command line: nothing but a number may pass
digits := 0 1 2 3 4 5 6 7 8 9
without_digits = $(if $(2),$(call without_digits,$(subst $(firstword $(2)),,$(1)),$(wordlist 2,10,$(2))),$(1))
ifneq ($(if $(value SEED),$(call without_digits,$(value SEED),$(digits)),empty),)
$(error SEED must be a number such as 1, it is: $(value SEED))
endif

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(setup_done)  ## make .venv with the pinned packages

.venv/.installed: requirements.txt
	$(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-test: .venv/.installed requirements-test.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

test: $(test_setup_done)  ## run all tests
	$(PYTHON) -m pytest $(ARGS)

lint: $(test_setup_done)  ## check style and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

train: $(setup_done)  ## train one run: make train SEED=1 ARGS="data_dir=data/sample epochs=5"
	$(PYTHON) train.py seed=$(SEED) $(ARGS)

data: $(setup_done)  ## the official PCam into data/pcam (7.8 GB): resumable, checksummed
	$(PYTHON) prepare.py download --to data/pcam

demo: $(setup_done)  ## from nothing to a trained model and its page: synthetic slides, a short training, evaluation
	test -f data/demo/camelyonpatch_level_2_split_train_x.h5 || $(PYTHON) prepare.py synthetic --to data/demo $(DEMO_DATA)
	$(PYTHON) train.py data_dir=data/demo name=demo seed=$(SEED) $(DEMO_TRAINING) $(ARGS) > data/demo/run.json
	run=$$($(PYTHON) -c 'import json; print(json.loads(open("data/demo/run.json").readlines()[-1])["run"])'); \
	$(PYTHON) inference.py --ckpt "$$run" data/demo --split test --out "$$run/predictions.csv" > /dev/null; \
	$(PYTHON) report.py run "$$run" --predictions "$$run/predictions.csv" \
	  --remark "Synthetic patches, drawn by prepare.py: the scores say nothing about real tissue." > /dev/null

twin: $(setup_done)  ## is a short training reproducible to the bit: make twin ARGS="data_dir=data/sample"
	$(PYTHON) audit.py twin $(ARGS)

prove: $(test_setup_done)  ## the figures of reproducibility, at length: make prove ARGS="kills --count 100 --data data/sample"
	$(PYTHON) tests/prove_reproducibility.py $(ARGS)

runs: $(setup_done)  ## all runs in a table: make runs ARGS="--where 'val_auc>0.9' --sort val_auc --html runs.html"
	$(PYTHON) report.py runs $(ARGS)

handover: $(setup_done)  ## a folder for a USB stick that predicts without a network: make handover DEST=DIR [RUN=runs/RUN]
	@test -n "$${DEST:-}" || { echo 'error: make handover needs DEST=DIR, a new or an empty folder' >&2; exit 2; }
	$(PYTHON) report.py handover --to "$$DEST" $(ARGS) "$${RUN:-assets/champion}"

checklist: $(setup_done)  ## the submission checklist, item by item, with evidence
	$(PYTHON) audit.py handover . $(ARGS)

clean:  ## remove what tools cache; data/ and runs/ stay
	rm -rf .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
