# What people type. `make run` and `make test` do all the set-up that they need.

SHELL := /bin/bash
TARGET := $(or $(CARGO_TARGET_DIR),target)
NODES ?= 3
DOCS ?=
BASE_PORT ?= 6333
SCHEMAS := $(TARGET)/python-kubernetes
# The commit that upgrades begin with; deploy/old-build.sh chooses one when it is empty.
OLD ?=

.PHONY: run test manifests bench fixture chaos chaos-ci chaos-all chaos-docker chaos-planted upgrade-test \
	chaos-tools build model setup lint doc fmt

## A cluster of NODES nodes on this machine, a corpus ingested (DOCS, or a sample), one search answered. Ctrl-C stops it.
## It listens on BASE_PORT and the ports after it, ten for each node.
run: build model
	@SHOAL_BIN=$(TARGET)/release/shoal NODES=$(NODES) DOCS="$(DOCS)" BASE_PORT=$(BASE_PORT) deploy/run-local.sh

## All tests: unit, conformance, property, whole-system with real processes, chaos, deployment files.
test: setup chaos-tools model build
	cargo test --release --workspace
	$(MAKE) chaos-ci
	python3 tests/deploy/check_metrics.py --self-test
	$(MAKE) manifests
	tests/deploy/run_local_test.sh $(TARGET)/release/shoal
	tests/deploy/compose_test.sh $(TARGET)/release/shoal

## The files for running Shoal agree with each other, with the node and with the schemas of Kubernetes. The schemas come
## from PyPI; what they would say is skipped where that cannot be reached.
manifests:
	@cmp -s tests/python/kubernetes.txt $(SCHEMAS)/complete || { \
	  python3 -m venv --clear $(SCHEMAS) && \
	  $(SCHEMAS)/bin/pip install --quiet --disable-pip-version-check -r tests/python/kubernetes.txt && \
	  cp tests/python/kubernetes.txt $(SCHEMAS)/complete; } || true
	@python=$(SCHEMAS)/bin/python; [ -e $(SCHEMAS)/complete ] || python=python3; \
	  $$python tests/deploy/validate_manifests.py --self-test && $$python tests/deploy/validate_manifests.py

## Every row of the chaos matrix in its small size (about 25 minutes; as root, or most rows are skipped).
chaos: chaos-tools build
	$(TARGET)/release/chaos run all --out $(TARGET)/chaos

## A selection of about 6 minutes.
chaos-ci: chaos-tools build
	$(TARGET)/release/chaos run ci --out $(TARGET)/chaos

## Every row in its large size: a night.
chaos-all: chaos-tools build
	$(TARGET)/release/chaos run all --size nightly --out $(TARGET)/chaos

## A selection with containers of a Docker Engine instead of network namespaces (about 4 minutes; no root, no registry).
chaos-docker: build
	$(TARGET)/release/chaos run baseline kill-leader rejoin zombie-leader --backend docker --seconds 26 \
		--out $(TARGET)/chaos/docker

## Bugs on purpose, each of which chaos must catch. The build with the bugs is a program of its own; that without is not
## touched. Where this machine can show none of them, which is exit code 3, that is said and no failure.
chaos-planted: chaos-tools build
	cargo build --release --workspace --features shoal-node/planted-bugs --bin shoal-planted
	@$(TARGET)/release/chaos planted --bin $(TARGET)/release/shoal-planted --out $(TARGET)/chaos/planted || { \
	  code=$$?; [ $$code -eq 3 ] || exit $$code; \
	  echo "skipped: make chaos-planted: no planted bug can be shown on this machine"; }

## Nodes of an earlier commit, OLD=COMMIT, are upgraded under load, forth and back, and while nodes are killed.
upgrade-test: chaos-tools build model
	deploy/old-build.sh $(TARGET) $(OLD)
	SHOAL_OLD_BIN=$(abspath $(TARGET))/release/shoal-old \
		cargo test --release --workspace --test upgrade -- --nocapture
	$(TARGET)/release/chaos run upgrade --old-bin $(TARGET)/release/shoal-old --out $(TARGET)/chaos/upgrade

## Packs what a node of this build stores into tests/testdata/saved-NAME.tar.gz, for later builds to be tested with: to be
## committed when a format has changed. NAME=2026-11-22, so that they sort by age.
fixture: build
	SHOAL_FIXTURE=$(NAME) cargo test --release --workspace --test saved -- --ignored --nocapture

## The numbers in README. Nothing is asserted; JSON goes to bench.json.
bench: build model
	$(TARGET)/release/bench --json bench.json

build: setup
	cargo build --release --workspace

model:
	@deploy/model/get.sh models

setup:
	@deploy/setup.sh

chaos-tools:
	@deploy/setup.sh chaos

lint:
	cargo fmt --check
	cargo clippy --release --workspace --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --release --workspace --no-deps --document-private-items

fmt:
	cargo fmt
