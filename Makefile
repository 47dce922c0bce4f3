# Isthmus. `make help` lists what there is.

.DEFAULT_GOAL := help
SHELL := /bin/bash
CARGO ?= cargo
STAY ?=
WHAT ?=
TIME ?= 60
QUICK ?=

# Integration tests by file, so that a new one is never forgotten. Always with --workspace: a part alone would be built with
# other features, that is, twice.
targets = $(foreach file,$(1),--test $(basename $(notdir $(file))))
E2E_TESTS := $(wildcard e2e/tests/*.rs)
UNIT_TESTS := $(filter-out $(E2E_TESTS),$(wildcard */tests/*.rs libs/*/tests/*.rs))

.PHONY: help demo test check lint unit e2e e2e-known bench fuzz fuzz-seeds envoy tools build fmt clean

help: ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 18

demo: tools envoy build ## Three clusters on this machine, real Envoy, the failover story (STAY=1 leaves it running)
	@target/debug/isthmus-demo --dir target/demo $(if $(STAY),--stay)

test: tools envoy ## Everything CI runs: formatting, lints, unit, property and end-to-end tests
	@$(MAKE) --no-print-directory lint
	@echo "== unit and property tests"
	@$(CARGO) test --workspace --locked --lib --bins $(call targets,$(UNIT_TESTS))
	@$(MAKE) --no-print-directory e2e

check: ## The fast inner loop: formatting, lints, unit tests
	@$(MAKE) --no-print-directory lint
	@$(CARGO) test --workspace --locked -q --lib

lint: ## Formatting and clippy, warnings denied
	@echo "== formatting"
	@$(CARGO) fmt --all --check
	@echo "== clippy"
	@$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

e2e: e2e-known tools envoy build ## End-to-end tests with real processes (WHAT=name for one suite)
	@echo "== end-to-end tests"
	@$(CARGO) test --workspace --locked $(if $(WHAT),--test $(WHAT),$(call targets,$(E2E_TESTS))) -- --nocapture --test-threads=1

# First of all: what is mistyped is told before anything is built.
e2e-known:
	@[ -z "$(WHAT)" ] || [ -f "e2e/tests/$(WHAT).rs" ] || { echo "There is no end-to-end suite '$(WHAT)'." >&2; \
	  echo "There are: $(E2E_TESTS:e2e/tests/%.rs=%)" >&2; exit 2; }

fuzz: ## Fuzz the gateway's decoders, TIME=60 seconds each (WHAT=tunnel, hello or availability for one)
	@deploy/tools/require.sh cc g++
	@CARGO="$(CARGO)" fuzz/run.sh $(TIME) $(WHAT)

fuzz-seeds: ## Write fuzz/corpus/ anew, from real hellos and frames
	@$(CARGO) test --workspace --lib --locked -q -- --ignored --exact fuzzing::seeds::write_seeds

bench: ## Measure beside rivals, release build: WHAT=gateway, failover, limits, raft or agents (QUICK=1: a rough answer in minutes)
	@case "$(WHAT)" in gateway|failover|limits|raft|agents) ;; *) \
	  [ -z "$(WHAT)" ] || echo "There is no benchmark '$(WHAT)'." >&2; \
	  echo "make bench WHAT=gateway    throughput, latency, new connections, memory, a long path with loss" >&2; \
	  echo "make bench WHAT=failover   failed requests when gateways and clusters fail" >&2; \
	  echo "make bench WHAT=limits     what a packet costs on this machine, whoever sends it" >&2; \
	  echo "make bench WHAT=raft       committed writes of the control plane, beside etcd" >&2; \
	  echo "make bench WHAT=agents     1,000 agents on one control plane: time to sync, time of a change, memory" >&2; \
	  echo "QUICK=1 gives a rough answer in two to three minutes." >&2; exit 2;; esac
	@deploy/tools/require.sh cc setpriv ip nft python3 pip
	@case "$(WHAT)" in raft) deploy/tools/fetch-etcd.sh;; agents) ;; *) $(MAKE) --no-print-directory envoy;; esac
	@echo "== release build"
	@CARGO_INCREMENTAL=0 $(CARGO) build --release --workspace --bins --locked
	@target/release/isthmus-bench $(WHAT) $(if $(QUICK),--quick)

build: ## All programs, debug
	@echo "== build"
	@$(CARGO) build --workspace --bins --locked

envoy: ## Fetch the pinned Envoy into .tools/
	@deploy/tools/fetch-envoy.sh

tools: ## Install missing Debian packages (needs root only if one is missing)
	@deploy/tools/require.sh cc dig setpriv ip nft faketime python3 pip

fmt: ## Format the code
	@$(CARGO) fmt --all

clean: ## Remove all that was built
	@$(CARGO) clean
