# `make pretrain` and `make test` need nothing but Python 3.11+ and git.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin/python -m
ARGS ?=

.PHONY: help setup first pretrain compare lstm finetune sharp-minima test coverage test-peers test-slow test-distributed \
	test-deepspeed sharding-report kill-test bench gpu-proof lint format types docs release check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed  ## create the virtual environment and install the tested set

# The marker is newer than every file that decides what is installed.
$(VENV)/.installed: pyproject.toml setup.cfg $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --constraint $(CONSTRAINTS) --editable '.[recipes,dev]'
	@touch $@

# On one thread: a model this small gains nothing from two.
first: setup  ## a first result: pretrain a very small BERT with LAMB on the embedded corpus (less than a minute)
	@OMP_NUM_THREADS=1 exec $(RUN) recipes.pretrain_bert --size smoke --resume_from_checkpoint auto $(ARGS)

# In the shell's place, so that a signal to make ends the training; started again, it goes on.
pretrain: setup  ## the same with a small BERT (minutes; ARGS="--size mini" for more)
	@OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) exec $(RUN) recipes.pretrain_bert --resume_from_checkpoint auto $(ARGS)

# As many processes as cores, a thread each; on GPUs, see docs/several_gpus.md.
EVERY_CORE := OMP_NUM_THREADS=1 $(RUN) torch.distributed.run --standalone --nproc_per_node $$(getconf _NPROCESSORS_ONLN)

compare: setup  ## LAMB against AdamW and SGD over batch sizes, on the CPU (minutes): tables, plots, a page
	$(EVERY_CORE) -m recipes.compare_optimizers --use_cpu True $(ARGS)

lstm: setup  ## an LSTM on images by rows, small and large batches, on the CPU (minutes)
	$(EVERY_CORE) -m recipes.lstm_mnist --use_cpu True $(ARGS)

finetune: setup  ## fine-tune what `make pretrain` made, against the same from scratch, on the CPU; installs [wiki]
	$(RUN) pip install --quiet --constraint $(CONSTRAINTS) --editable '.[wiki]'
	test -e runs/pretrain_bert/tiny-lamb/model.safetensors || $(MAKE) pretrain ARGS=
	$(EVERY_CORE) -m recipes.finetune --use_cpu True $(ARGS)

sharp-minima: setup  ## small batch against large batch: sharpness of the minima, with a report (minutes)
	$(RUN) recipes.sharp_minima $(ARGS)

# Several processes, because most tests use one core; a file's tests stay together and share what they train.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile

test: setup  ## run the tests
	$(RUN) pytest $(PARALLEL) $(ARGS)

coverage: setup  ## run the tests and print the share of hf_lamb's and the recipes' lines that they run
	$(RUN) pytest $(PARALLEL) --cov --cov-report term $(ARGS)

# timm without its dependencies: its Lamb needs torch alone, and a torchvision that does not fit torch stops transformers.
test-peers: setup  ## compare with the LAMBs of optax and timm; installs them
	$(RUN) pip install --quiet --constraint $(CONSTRAINTS) jax optax
	$(RUN) pip install --quiet --constraint $(CONSTRAINTS) --no-deps timm
	HF_LAMB_PEERS=required $(RUN) pytest tests/test_oracles.py $(ARGS)

test-slow: setup  ## run the tests that take long
	$(RUN) pytest $(PARALLEL) -m slow $(ARGS)

test-distributed: setup  ## run the tests on two and four processes (minutes)
	$(RUN) pytest --numprocesses 2 --dist loadfile -m distributed $(ARGS)

# On a CPU DeepSpeed compiles an extension at its first start: a C++ compiler, and the environment's ninja in the path.
# In a folder of this environment: a process that was killed while it compiled leaves a lock that all later ones wait for.
test-deepspeed: setup  ## run the tests with DeepSpeed ZeRO on two and four processes (minutes); installs [deepspeed]
	$(RUN) pip install --quiet --constraint $(CONSTRAINTS) --editable '.[deepspeed]'
	TORCH_EXTENSIONS_DIR="$(CURDIR)/$(VENV)/torch_extensions" PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
		$(RUN) pytest -m deepspeed $(ARGS)

sharding-report: setup  ## measure sharded against unsharded runs, of other LAMBs too where installed; docs/sharding.md's table
	$(RUN) tests.scripts.sharding_report

kill-test: setup  ## kill the pretraining ten times, in one phase and in two; all must end bit for bit alike (minutes)
	$(RUN) tests.scripts.kill_and_resume $(ARGS)
	$(RUN) tests.scripts.kill_and_resume --plan $(ARGS)

# A line is added for each measurement that is complete; a run that is stopped keeps those it has made.
BENCHED := --output benchmarks/results
bench: setup  ## what a step costs, beside the other LAMBs that are installed, timm among them; docs/speed.md (minutes)
	$(RUN) pip install --quiet --constraint $(CONSTRAINTS) --no-deps timm
	$(RUN) benchmarks.bench_step $(BENCHED)/step.jsonl
	$(RUN) benchmarks.bench_step --dtype bfloat16 $(BENCHED)/step.jsonl
	$(RUN) benchmarks.bench_step --shapes many-small $(BENCHED)/step.jsonl
	$(RUN) benchmarks.bench_step --shapes one-huge $(BENCHED)/step.jsonl
	for n in 2 4; do OMP_NUM_THREADS=1 $(RUN) torch.distributed.run --standalone --nproc_per_node $$n \
		-m benchmarks.bench_sharded_step --hidden_size 256 $(BENCHED)/sharded_step.jsonl || exit 1; done
	$(RUN) benchmarks.bench_trainer $(BENCHED)/trainer.jsonl
	$(RUN) benchmarks.bench_trainer --global_batch_size 64 --per_device_train_batch_size 8 $(BENCHED)/trainer.jsonl
	$(RUN) benchmarks.tables

# Where a GPU is, there may be no network: with the machine's own Python, from this checkout.
gpu-proof:  ## what only a GPU shows: tests, times, memory; docs/gpu.md (8 minutes; ARGS=--dry: toy sizes on a CPU)
	$(PYTHON) -m benchmarks.gpu_proof $(ARGS)

SCHEMA := $(VENV)/bin/check-jsonschema --builtin-schema vendor
lint: setup  ## ruff: lint and format check; import-linter: which module imports which; schemas of what GitHub reads
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(VENV)/bin/lint-imports
	$(SCHEMA).github-workflows .github/workflows/*.yml
	$(SCHEMA).github-issue-forms .github/ISSUE_TEMPLATE/*_re*.yml
	$(SCHEMA).github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA).citation-file-format CITATION.cff

format: setup  ## ruff: mend what can be mended
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

types: setup  ## mypy --strict on hf_lamb/ and recipes/lib/
	$(RUN) mypy

# MkDocs 1 is what the theme needs; the variable ends its advertisement for another program.
docs: setup  ## the documentation site in build/site: strict, links checked; installs [docs]
	$(RUN) pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build $(ARGS)

release: setup  ## prepare a release: make release VERSION=0.2.0; it builds and tests, and prints how to publish
	$(RUN) tests.scripts.release $(VERSION) $(ARGS)

check: lint types docs test test-slow test-distributed test-deepspeed test-peers  ## all of the above

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage runs
