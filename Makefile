# What people type. `make run` and `make test` do all the set-up that they need.

SHELL := /bin/bash
TARGET := $(or $(CARGO_TARGET_DIR),target)
NODES ?= 3
DOCS ?=

.PHONY: run test bench build model setup lint doc fmt

## A cluster of NODES nodes on this machine, a corpus ingested, one search answered. Ctrl-C stops it.
run: build model
	@SHOAL_BIN=$(TARGET)/release/shoal NODES=$(NODES) DOCS="$(DOCS)" deploy/run-local.sh

## All tests: unit, conformance, property, whole-system with real processes, deployment files.
test: setup model build
	cargo test --release --workspace
	python3 tests/deploy/check_metrics.py --self-test
	python3 tests/deploy/validate_manifests.py --self-test
	python3 tests/deploy/validate_manifests.py
	tests/deploy/compose_test.sh $(TARGET)/release/shoal

## The numbers in README. Nothing is asserted; JSON goes to bench.json.
bench: build model
	cargo run --release -p shoal-tests --bin bench -- --json bench.json

build: setup
	cargo build --release --workspace

model:
	@deploy/model/get.sh models

setup:
	@deploy/setup.sh

lint:
	cargo fmt --check
	cargo clippy --release --workspace --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --release --workspace --no-deps --document-private-items

fmt:
	cargo fmt
