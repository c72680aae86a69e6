# `make help` lists the verbs. State of a checkout is under out/ and .venv/; binaries are cached by version outside it.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PY := .venv/bin/python
MODE ?= cluster
CLUSTER ?= local
export KUBECONFIG := $(if $(filter existing,$(CLUSTER)),$(KUBECONFIG),$(CURDIR)/out/cluster/kubeconfig)
export PATH := $(CURDIR)/.venv/bin:$(shell . hack/cluster/env.sh && echo $$(tool kubernetes):$$(tool helm)):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: help
help: ## Show the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: env
env: out/env.stamp ## Python environment in .venv (3 minutes, 6 GB)

out/env.stamp: requirements/all.txt pyproject.toml hack/env.sh
	@hack/env.sh
	@touch $@

.PHONY: cluster
cluster: env ## Kubernetes, JobSet and S3 on this machine (first time 20 minutes; root)
	@hack/cluster/host.sh
	@hack/cluster/tools.sh
	@hack/cluster/up.sh

.PHONY: images
images: cluster ## Build the project's images into the cluster
	@hack/images.sh

.PHONY: demo
demo: ## A population learns, is kept, is served (MODE=local: no cluster; CLUSTER=existing: yours)
	@hack/demo.sh $(MODE) $(CLUSTER)

.PHONY: down
down: ## Remove everything that demo and cluster started
	@hack/down.sh

.PHONY: test
test: images ## All tests but gpu: unit, integration, end to end
	$(PY) -m pytest

.PHONY: test-fast
test-fast: env ## Tests of the inner loop, a minute and a half
	$(PY) -m pytest -m "not cluster and not engine and not slow and not gpu"

.PHONY: test-gpu
test-gpu: env ## Tests of what only a GPU runs
	$(PY) -m pytest -m gpu

.PHONY: soak-store
soak-store: env ## Ten thousand random kills of the store's writers (ARGS="--minutes 10 --seed 1"; hours)
	$(PY) -W ignore -m tests.store.soak $(ARGS)

.PHONY: soak-rollout
soak-rollout: env ## An hour of faults while 256 adapters change over four slots (ARGS="--minutes 10 --seed 1")
	$(PY) -W ignore -m tests.rollout.soak $(ARGS)

.PHONY: bench-trainer
bench-trainer: env ## One step of N adapters against other ways (DEVICE=cuda: on a GPU; ARGS="--help" tells; 15 minutes)
	$(PY) -W ignore -m bench.trainer$(if $(filter cuda,$(DEVICE)),.device) $(ARGS)

.PHONY: bench-store
bench-store: cluster ## The store against an object per adapter, in S3 and in etcd (ARGS="--help" tells)
	$(PY) -W ignore -m bench.store $(ARGS)

.PHONY: bench-rollout
bench-rollout: env ## Publishing, scheduling and residency against the bare engine (DEVICE=cuda; ARGS="--help" tells)
	$(PY) -W ignore -m bench.rollout $(if $(filter cuda,$(DEVICE)),--delay 0) $(ARGS)

.PHONY: lint
lint: env ## ruff, mypy, import-linter, generated files
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) -m allele.api.crds --out crds --check
	charts/allele/sync-crds.sh --check
	requirements/compile.sh --check

.PHONY: fmt
fmt: env ## Format and sort imports
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.PHONY: crds
crds: env ## Write crds/ from allele/api and copy them into the chart
	$(PY) -m allele.api.crds --out crds
	charts/allele/sync-crds.sh
