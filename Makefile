# Everything a developer does, one command each. `make` alone lists them.
# Rust comes with rustup (rust-toolchain.toml names the version); other packages are installed by e2e/setup.sh.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help tools setup build static images test unit fmt lint deny demo soak bench clusters clusters-down e2e fuzz

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
ARGS ?=
MINUTES ?= 10
SEEDS ?= 10000000
POWER_SEEDS ?= 20
SECONDS ?= 60
# Tests that need running clusters; cargo runs them only by name.
CLUSTER_TESTS := --test clusters --test standin --test rules --test admission --test product

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

tools:
	@command -v cargo >/dev/null || { echo "cargo is missing: install rustup; rust-toolchain.toml then picks the version"; exit 1; }
	@command -v cc >/dev/null || { echo "a C compiler is missing: run \`make setup\` as root, or install gcc and libc6-dev"; exit 1; }

setup: ## install the Debian packages that tests, demo and build need (as root; says what it does)
	@if [ -x e2e/setup.sh ]; then e2e/setup.sh test; fi

build: tools ## build everything
	cargo build --workspace

static: tools ## build the sidecar as one static binary
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --target x86_64-unknown-linux-gnu -p watari-sidecar

images: tools ## build both images as archives in target/images, for `docker load -i` or `skopeo copy docker-archive:…` (minutes)
	cargo run -q --bin watari-clusters -- pack $(abspath $(TARGET_DIR))/images

test: setup tools ## run every test (as root: whole-system tests make namespaces and boot guests)
	@mkdir -p $(TARGET_DIR)
	@status=0; cargo test --workspace --no-fail-fast 2>&1 | tee $(TARGET_DIR)/test.log || status=$$?; \
	awk '/^test result:/ { passed += $$4; failed += $$6; skipped += $$8 } \
	     END { printf "\n%d passed, %d failed, %d skipped\n", passed, failed, skipped; exit passed == 0 }' $(TARGET_DIR)/test.log; \
	exit $$status

unit: tools ## run the tests of all crates, without the whole-system ones
	cargo test --workspace --exclude watari-e2e

fmt: tools ## format the code
	cargo fmt --all

lint: tools ## formatting, clippy without warnings for all targets, and what no compiler looks for
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --workspace $(CLUSTER_TESTS) -- -D warnings
	.ci/check-tree

deny: ## licences, duplicate and banned dependencies (needs cargo-deny, see deny.toml)
	@command -v cargo-deny >/dev/null || { echo "cargo-deny is missing: cargo install --locked cargo-deny (some minutes)"; exit 1; }
	cargo deny check licenses bans sources

demo: ## move a running VM over an emulated WAN, with a progress view, and compare (as root)
	e2e/setup.sh demo
	cargo run -q --bin watari-demo -- $(ARGS)

soak: ## the long tests: simulated histories (MINUTES, SEEDS), the wide model, all mutations, POWER_SEEDS lives, then 200 kills and 20 moves on real QEMU (as root; ARGS narrows the last)
	e2e/setup.sh test
	cargo run --profile soak -p watari-sim -- soak --minutes $(MINUTES) --seeds $(SEEDS)
	RIGHTS=full cargo test --profile soak -p watari-sim --test rights -- --nocapture --test-threads 1
	cargo run --profile soak -p watari-sim -- mutate
	POWER_SEEDS=$(POWER_SEEDS) cargo test --profile soak -p watari-store --test replica_power -- --nocapture
	cargo run --release --bin watari-soak -- $(ARGS)

fuzz: tools ## every decoder under libFuzzer, SECONDS each (needs cargo-fuzz, see sidecar/fuzz/README.md)
	@command -v cargo-fuzz >/dev/null || { echo "cargo-fuzz is missing: cargo install --locked cargo-fuzz (a minute or two)"; exit 1; }
	@for target in $$(sed -n 's/.*Target { name: "\([a-z_]*\)".*/\1/p' sidecar/fuzz/src/lib.rs); do \
	  echo "== $$target"; mkdir -p $(TARGET_DIR)/fuzz/$$target; \
	  WATARI_FUZZ_TARGET=$$target RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir sidecar/fuzz/libfuzzer decode $(abspath $(TARGET_DIR))/fuzz/$$target -- \
	    -max_total_time=$(SECONDS) -max_len=65536 -rss_limit_mb=1024 -print_final_stats=1; \
	done

bench: ## measure everything beside its peers: a table, docs/BENCHMARKS.md and plots (as root; ARGS="--only F3,F5", --quick, --help)
	e2e/setup.sh bench
	cargo build --release -q --workspace --bin watari-sidecar
	cargo run --release -q --bin watari-bench -- $(ARGS)

# What is built from Go modules is kept outside the work tree: e2e/clusters/README.md.
clusters: tools ## bring two Kubernetes clusters up, with an emulated WAN between them (as root; ARGS="--nodes 2 rate=1G delay=10ms"; KUBEVIRT_DIR=… deploys KubeVirt)
	e2e/setup.sh clusters
	cargo run -q --bin watari-clusters -- up $(ARGS)
	cargo run -q --bin watari-clusters -- images
	@[ -z "$${KUBEVIRT_DIR:-}" ] || cargo run -q --bin watari-clusters -- kubevirt up

clusters-down: tools ## take the clusters off this machine
	cargo run -q --bin watari-clusters -- down

e2e: tools ## run the tests that need clusters, on ours (which stay up) or on two others (e2e/clusters/README.md)
	@[ -n "$${WATARI_E2E_KUBECONFIG_A:-}" ] || $(MAKE) clusters
	cargo test --workspace $(CLUSTER_TESTS) -- --test-threads 1
