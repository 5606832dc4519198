# Main jobs: `make lab` (a cluster on this machine, a virtual machine on it, a short benchmark) and `make test`.
# Each installs what it needs by itself (scripts/deps.sh; Debian). Labs need root; cargo is run by whoever calls make.

SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO ?= cargo
CSVCTL := target/release/csvctl
# Labs are made of namespaces, mounts and loop devices.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -E env PATH=$(PATH))

.PHONY: help build lab lab-down vm-demo bench man test test-unit test-e2e test-vm check deps

help:
	@echo "make lab        cluster of three nodes, a VM booted on two of them, short benchmark; the lab stays up"
	@echo "make lab-down   removes the lab"
	@echo "make test       everything: format, lints, documentation, unit and end-to-end tests"
	@echo "make test-unit  unit tests only"
	@echo "make test-vm    a cluster of three virtual machines with a SCSI disk between them, and its faults (10 minutes)"
	@echo "make check      format, lints and documentation only"
	@echo "make bench      full benchmark, report in out/bench.html"
	@echo "make build      release build of all programs"
	@echo "make man        manual pages of csvctl, in out/man"

deps:
	@scripts/deps.sh

build: deps
	$(CARGO) build --release --workspace --bins

lab: build
	@if $(SUDO) $(CSVCTL) lab list --json | grep -q '"name": *"lab"'; then \
		echo "removing the lab of an earlier run"; $(SUDO) $(CSVCTL) lab down --name lab; \
	fi
	@$(SUDO) $(CSVCTL) lab up
	@$(SUDO) scripts/vm-demo.sh --lab lab n1 n3
	@$(SUDO) $(CSVCTL) --lab lab volume state
	@$(SUDO) $(CSVCTL) bench --lab lab --quick
	@echo "the lab is still up: try '$(CSVCTL) lab exec n1 -- bash'; 'make lab-down' removes it"

lab-down:
	@$(SUDO) $(CSVCTL) lab down --name lab

vm-demo: build
	@$(SUDO) scripts/vm-demo.sh

bench: build
	@mkdir -p out
	@$(SUDO) $(CSVCTL) bench --html out/bench.html --out out/bench.json

man: build
	@$(CSVCTL) man out/man

check: deps
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

# csv-tests holds the end-to-end suites; everything else is a unit test. CSV_TEST_FULL=1 runs the long ones whole.
test-unit: deps
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(CARGO) nextest run --workspace --exclude csv-tests --no-fail-fast; \
	else \
		$(CARGO) test --workspace --exclude csv-tests --lib --bins --tests --no-fail-fast; \
	fi

test-e2e: build
	$(SUDO) $(CARGO) test -p csv-tests --release --no-fail-fast -- --test-threads=1

# Three nodes and a storage as virtual machines; needs no KVM. Not part of `test`. Says so where it cannot run.
test-vm: build
	@scripts/deps.sh guests || echo "test-vm: what the guests need cannot be installed here"
	$(CARGO) build --release -p csv-lun --example pr
	$(SUDO) $(CARGO) test -p csv-tests --release --test guests -- --nocapture --test-threads=1

test: check test-unit test-e2e
