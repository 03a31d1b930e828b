# Every target sets up .venv when it is missing; PYTHON=/path/to/python uses that interpreter instead.
# Variables: SEED=1 ARGS='key=value ...' (quotes inside it hold together what has spaces); those of jobs stand at `jobs` below.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup test test-all lint train seeds folds sweep bench audit status cancel data demo twin prove prove-audit runs handover
.PHONY: assignment champion check checklist evaluate journal demo-journal clean audit-model prove-model prove-gpu

# Recipes get these variables by the environment, as they were given: neither make nor a shell carries out anything in them, and
# jobs/submit.py checks them. Only make's command line sets them, for a shell may have a DATA or TIME of its own.
variables := PYTHON ARGS SEED SEEDS K DATA OUT DEST RUN SPACE SEARCH PROCESSES NUM_RANKS PARTITION TIME CPUS MEM AFTER JOB STAGE_DATA
variables += CHECK
known := $(variables) TORCH BASE_PYTHON DEMO_DATA DEMO_TRAINING
unknown := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(filter-out $(known),$(name))))
$(if $(strip $(unknown)),$(error unknown variable $(strip $(unknown)); there are: $(known)))
inherited := $(strip $(foreach name,$(variables),$(if $(filter environment%,$(origin $(name))),$(name))))
IGNORED := $(strip $(foreach name,$(inherited),$(if $(value $(name)),$(name))))
$(foreach name,$(inherited),$(eval override undefine $(name)))
SEED ?= 1
SPACE ?= assets/space.yaml

ifdef PYTHON
setup_done :=
test_setup_done :=
else
PYTHON := .venv/bin/python
setup_done := .venv/.installed
test_setup_done := .venv/.installed-test
endif
BASE_PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
INSTALL := $(PIP) -c requirements-lock.txt
# of the same version, torch's CPU build, a tenth of the size; uv knows where it lies
ifeq ($(TORCH),cpu)
UV := .venv/bin/uv pip install --quiet --python .venv/bin/python
INSTALL := $(PIP) uv && $(UV) --torch-backend cpu -c requirements-lock.txt
endif
DEMO_DATA := --train 4000 --valid 1000 --test 1000
DEMO_TRAINING := epochs=5 crop_epochs=3 warmup_epochs=1

$(foreach name,$(variables),$(eval override $(name) := $$(value $(name))))
export $(variables) IGNORED
run := "$$PYTHON" jobs/submit.py

help:  ## this list
	@awk -F ':.*## ' '/^#@ /{print "\n" substr($$0, 4)} /^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

#@ Begin

setup: $(setup_done)  ## make .venv with the pinned packages; without a GPU: make setup TORCH=cpu

.venv/.installed: requirements.txt requirements-lock.txt
	@echo 'installing the packages of requirements.txt into .venv' >&2
	$(BASE_PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	touch $@

.venv/.installed-test: .venv/.installed requirements-test.txt
	@echo 'installing the packages of requirements-test.txt into .venv' >&2
	$(INSTALL) -r requirements-test.txt
	touch $@

demo: $(setup_done)  ## from nothing to a trained model and its page: synthetic slides, a short training, evaluation
	test -f data/demo/camelyonpatch_level_2_split_train_x.h5 || "$$PYTHON" prepare.py synthetic --to data/demo $(DEMO_DATA)
	$(run) here train.py data_dir=data/demo name=demo "seed=$$SEED" $(DEMO_TRAINING) > data/demo/run.json
	run=$$("$$PYTHON" -c 'import json; print(json.loads(open("data/demo/run.json").readlines()[-1])["run"])'); \
	"$$PYTHON" inference.py --ckpt "$$run" data/demo --split test --out "$$run/predictions.csv" > /dev/null; \
	"$$PYTHON" report.py run "$$run" --predictions "$$run/predictions.csv" \
	  --remark "Synthetic patches, drawn by prepare.py: the scores say nothing about real tissue." > /dev/null

data: $(setup_done)  ## the official PCam into data/pcam (7.8 GB): resumable, checksummed
	"$$PYTHON" prepare.py download --to data/pcam

#@ Jobs: on a Slurm cluster these submit, elsewhere they run here
# PARTITION=, TIME=, CPUS=, MEM=: what to ask for (default: what
# fits the partition); AFTER=ID,...: start when those jobs have ended; NUM_RANKS=2: train with two processes; STAGE_DATA=1: copy
# the data to the node first.

check: $(setup_done)  ## can that work, in half a minute: environment, keys, data, memory, time: make check ARGS="data_dir=data/sample"
	$(run) check

train: $(setup_done)  ## train one run: make train SEED=1 ARGS="data_dir=data/sample epochs=5"
	$(run) train

seeds: $(setup_done)  ## the same with several seeds: make seeds SEEDS=1,2,3
	$(run) seeds

folds: $(setup_done)  ## cross-validation inside train: make folds K=5
	$(run) folds

sweep: $(setup_done)  ## search hyper-parameters: make sweep SPACE=assets/space.yaml ARGS="data_dir=data/sample" PROCESSES=2
	$(run) sweep

bench: $(setup_done)  ## throughput and what limits it: make bench PARTITION=thin_course DATA=data/pcam [OUT=DIR]
	$(run) bench

audit: $(setup_done)  ## what is in the data, and can they be trusted: make audit DATA=data/sample ARGS=--plant
	$(run) audit

status: $(setup_done)  ## jobs of this project: state, run folder, and the last lines of each log: progress or error
	$(run) status

cancel: $(setup_done)  ## end them, or one of them: make cancel JOB=123
	$(run) cancel

#@ Results

twin: $(setup_done)  ## is a short training reproducible to the bit: make twin DATA=data/sample
	$(run) here audit.py twin $${DATA:+"data_dir=$$DATA"}

audit-model: $(setup_done)  ## where a model fails, and what a threshold costs: make audit-model RUN=runs/RUN DATA=data/sample
	@test -n "$${DATA:-}" || { echo 'error: make audit-model needs DATA=DIR, a PCam folder with labels' >&2; exit 2; }
	$(run) here audit.py model --ckpt "$${RUN:-assets/champion}" "$$DATA" $${OUT:+--out "$$OUT"}

evaluate: $(setup_done)  ## the test split, raw and without copies, beside published results: make evaluate RUN=runs/RUN DATA=data/pcam
	@test -n "$${DATA:-}" || { echo 'error: make evaluate needs DATA=DIR, a PCam folder with a test split' >&2; exit 2; }
	run="$${RUN:-assets/champion}"; $(run) here audit.py model --ckpt "$$run" "$$DATA" --split test --parts scores \
	  --out "$${OUT:-evaluation-$$(basename "$$run")}"

champion: $(setup_done)  ## a run, or a search's winner, as assets/champion, calibrated and audited: make champion RUN=runs/RUN or RUN=sweeps/NAME
	@test -n "$${RUN:-}" || { echo 'error: make champion needs RUN=runs/RUN or RUN=sweeps/NAME' >&2; exit 2; }
	$(run) here jobs/champion.py "$$RUN" $${DATA:+--data "$$DATA"}

runs: $(setup_done)  ## all runs in a table: make runs ARGS="--where 'val_auc>0.9' --sort val_auc --html runs.html"
	$(run) here report.py runs

handover: $(setup_done)  ## a folder for a USB stick that predicts without a network: make handover DEST=DIR [RUN=runs/RUN]
	@test -n "$${DEST:-}" || { echo 'error: make handover needs DEST=DIR, a new or an empty folder' >&2; exit 2; }
	$(run) here report.py handover --to "$$DEST" "$${RUN:-assets/champion}"

#@ Hand in

assignment: $(setup_done)  ## what of the journal's evidence is there, what is missing, and the next command
	$(run) here report.py assignment

journal: $(setup_done)  ## start JOURNAL.md, fill in its tables and figures, say what is missing: make journal [CHECK=1]
	$(run) here report.py journal $(if $(filter 1,$(CHECK)),--check)

demo-journal: $(setup_done)  ## a journal from nothing, filled in, on synthetic slides: data/demo-journal/journal.html
	$(run) here -m jobs.demo_journal data/demo-journal

checklist: $(setup_done)  ## the submission checklist, item by item, with evidence
	$(run) here audit.py handover .

#@ Develop

test: $(test_setup_done)  ## run the fast tests
	$(run) here -m pytest -n 3 --dist loadfile -m "not (slow or slurm or browser or cuda)"

test-all: $(test_setup_done)  ## run all tests, those on a real Slurm and in a browser too
	$(run) here -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(test_setup_done)  ## check style, format and the CI workflow
	"$$PYTHON" -m ruff check .
	"$$PYTHON" -m ruff format --check .
	"$$("$$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/zizmor" --offline --quiet .github

clean:  ## remove what tools cache; data/ and runs/ stay
	rm -rf .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

#@ Proofs: long measurements, whose results are in assets/

prove: $(test_setup_done)  ## the figures of reproducibility, at length: make prove ARGS="kills --count 100 --data data/sample"
	$(run) here tests/proofs/reproducibility.py

prove-audit: $(test_setup_done)  ## the figures of the data audit, at length: make prove-audit ARGS="planted --data data/sample"
	$(run) here tests/proofs/audit.py

prove-model: $(test_setup_done)  ## the figures of the model audit, at length
	$(run) here tests/proofs/model.py

prove-gpu: $(test_setup_done)  ## the figures of one GPU, in minutes; without one in small: make prove-gpu ARGS="--out assets/gpu"
	$(run) here tests/proofs/gpu.py
