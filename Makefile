# `make help` lists what there is.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# envoy/local.yaml names the filter's module under target/, and the launcher finds its programs there.
export CARGO_TARGET_DIR := $(CURDIR)/target
# The source revision, which the filter shows in its log and as a metric.
export PD_BUILD ?= $(shell git describe --always --dirty --abbrev=12 --exclude '*' 2>/dev/null || echo unknown)
# Where rustup puts cargo, also before the next login shell has it in its PATH.
export PATH := $(PATH):$(HOME)/.cargo/bin

ENVOY_VERSION := $(shell cat envoy/version)
# Envoy Gateway's default Envoy.
GATEWAY_ENVOY_VERSION := 1.39.0
# Of the end-to-end tests those that depend on what Envoy does. The others run on one version only.
GATEWAY_CASES ?= blame compat connections decode_failure envoys_errors errors exchange hostile ipv6 kv_params leaving \
    observe pass plugin protocols split waiting
# End-to-end tests wait for half of their time, so more of them run at once than there are cores.
TEST_THREADS := $(shell echo $$(($$(nproc) * 3 / 2)))
# pd-control's image: a program without any other file.
MUSL := $(shell uname -m)-unknown-linux-musl
# Names of folders do not get into what is built: two builds of one commit are equal bit for bit.
REMAP = --remap-path-prefix=$(CURDIR)=/envoy-pd --remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=/cargo
# The same for C sources of dependencies, which have the names of their files in them.
REMAP_C = -ffile-prefix-map=$(CURDIR)=/envoy-pd -ffile-prefix-map=$(or $(CARGO_HOME),$(HOME)/.cargo)=/cargo
FILTER_FLAGS = --config 'target.wasm32-wasip1.rustflags=[$(subst $(space),$(comma),$(REMAP:%="%"))]'
comma := ,
space := $(subst ,, )
# C sources for the other architecture: Debian's compiler for it; Rust's own linker needs nothing else.
ifneq ($(MUSL),$(shell uname -m)-unknown-linux-musl)
CROSS = CARGO_TARGET_$(subst -,_,$(shell echo $(MUSL) | tr a-z A-Z))_LINKER=rust-lld CC_$(subst -,_,$(MUSL))=$(firstword $(subst -, ,$(MUSL)))-linux-gnu-gcc
else
CROSS = CC_$(subst -,_,$(MUSL))=$${CC:-cc}
endif
CROSS += CFLAGS_$(subst -,_,$(MUSL))='$(REMAP_C)'
LOCKED := $(if $(CI),--locked)
FUZZ_TARGETS := $(patsubst filter/core/fuzz/targets/%.rs,%,$(wildcard filter/core/fuzz/targets/*.rs))
say = @printf '\n== %s\n' "$(1)"

##@ Use

help: ## List the targets
	@echo 'usage: make TARGET [VARIABLE=value …]'
	@sed -n -e '/^##@ /{s///;s/^/\n/p}' -e '/^#> /{s//                /p}' \
	    -e '/^[a-z-]*:.* ## /{s/^\([a-z-]*\):.* ## /  \1           \t/;s/^\(.\{16\}\)[^\t]*\t/\1/p}' Makefile

run: build $(if $(ENVOY),,envoy) $(filter vllm,$(ENGINE)) ## Run engines, pd-control and Envoy with the filter on this machine
#> PREFILL=host:port,… DECODE=host:port,…   your own engines in place of simulators
#> ENGINE=vllm-shared MODEL=name            their protocol (vllm-nixl), model for the curl line
#> ENGINE=vllm                              a real vLLM pair for CPUs with a tiny random model (6 GB)
#> ENVOY=path                               your own Envoy
#> SPEED=0.1                                simulators ten times faster
#> PORT_OFFSET=1000                         other ports, where the usual ones are taken
	@exec target/debug/pd-run --envoy '$(or $(ENVOY),.cache/envoy-$(ENVOY_VERSION)/bin/envoy)' \
	    $(if $(PREFILL),--prefill '$(PREFILL)') $(if $(DECODE),--decode '$(DECODE)') $(if $(MODEL),--model '$(MODEL)') \
	    $(if $(filter vllm,$(ENGINE)),--vllm,$(if $(ENGINE),--engine '$(ENGINE)')) $(if $(SPEED),--speed '$(SPEED)') $(if $(PORT_OFFSET),--port-offset '$(PORT_OFFSET)')

replay: build envoy ## Drive a trace through Envoy and the simulators
#> TRACE=file RATE=requests/s ARGS=…         more of its options
	@[ -n '$(TRACE)' ] || { echo 'make: name the trace: make replay TRACE=file.jsonl [RATE=requests/s]' >&2; exit 1; }
	cargo run $(LOCKED) --quiet -p pd-bench --bin pd-replay -- --trace '$(TRACE)' $(if $(RATE),--rate '$(RATE)') $(ARGS)

sim: toolchain ## Simulate servers on traces: pd-core's choices beside the field's rules and bounds
#> TRACE=file POLICIES=pd-core,late,…     made-up loads without; some policies only
#> ARGS=…                                   more of its options
	cargo run $(LOCKED) --quiet -p pd-trace -- --out '$(CURDIR)/target/sim' \
	    $(if $(TRACE),--trace '$(TRACE)') $(if $(POLICIES),--policies '$(POLICIES)') $(ARGS)

sim-split: toolchain ## Simulate split or whole: time to first token and per token of each split.mode
#> TRACE=file                               made-up chat, code, agents and documents without
#> ARGS=…                                   more of its options
	cargo run $(LOCKED) --quiet -p pd-trace --bin pd-split -- $(if $(TRACE),--trace '$(TRACE)') $(ARGS)

sim-agree: build envoy ## Compare Envoy's choices with the simulation's, request by request
#> TRACE=file                               a made-up load without
#> ARGS=…                                   more of its options
	cargo run $(LOCKED) --quiet -p pd-trace --bin pd-agree -- $(if $(TRACE),--trace '$(TRACE)') $(ARGS)

sim-autoscale: toolchain ## Simulate autoscaling of both roles over loads that change, beside an oracle: target/autoscale
#> ARGS='--minutes 90 --start-s 60'         lengths, targets: see --help
	@cargo run $(LOCKED) --quiet -p pd-trace --bin pd-autoscale -- --out '$(CURDIR)/target/autoscale' $(ARGS)

plan: toolchain ## Plan prefill and decode servers for a trace: the cheapest that meet an objective, by simulation
#> TRACE=file                               a made-up load without
#> ARGS=…                                   objective, prices and service times, such as --ttft 2 --prefill-price 3
	@cargo run $(LOCKED) --quiet -p pd-trace --bin pd-plan -- --out '$(CURDIR)/target/plan' $(if $(TRACE),--trace '$(TRACE)') $(ARGS)

bench-serve: toolchain ## Measure a gateway that runs: output tokens/s, TTFT, TPOT, ITL at 32, 64, 128 streams
#> URL=http://host:port                     the gateway, or a server
#> ARGS=…                                   more options, such as --model, --concurrency, --input-tokens
	@[ -n '$(URL)' ] || { echo 'make: name the gateway: make bench-serve URL=http://127.0.0.1:8080' >&2; exit 1; }
	@cargo run $(LOCKED) --quiet --release -p pd-bench --bin pd-bench-serve -- --url '$(URL)' $(ARGS)

explain: toolchain ## Say why a request would go where it would: the code of the filter, without an Envoy
#> BODY=file…                               one after another: later ones find what earlier ones left
#> CONFIG=file                              plugin configuration with endpoints, as JSON
	@[ -n '$(BODY)' ] || { echo 'make: name a request body: make explain BODY=file.json' >&2; exit 1; }
	@cargo run $(LOCKED) --quiet -p pd-trace --bin pd-explain -- $(if $(CONFIG),--config '$(CONFIG)') $(BODY)

##@ Build

build: wasm ## Build the filter's module and the native programs
	$(call say,building the native programs)
	cargo build $(LOCKED) -p pd-sim -p pd-control -p pd-run

wasm: toolchain ## Build the filter's module: target/wasm32-wasip1/filter/pd_filter.wasm
	$(call say,building the filter ($(PD_BUILD)))
	cargo build $(LOCKED) -p pd-filter --target wasm32-wasip1 --profile filter $(FILTER_FLAGS)

image: wasm ## Write the filter's OCI image for Envoy Gateway: target/image
	$(call say,image)
	cargo run $(LOCKED) --quiet -p pd-image -- make --module target/wasm32-wasip1/filter/pd_filter.wasm --layout target/image

push: image ## Push the filter's image, pull it back and compare; credentials are Docker's
#> IMAGE=registry/name:tag                  where to
#> PIN=gateway-manifests/base/filter-image.env   file to write its name by digest into
#> PLAIN_HTTP=1                             the registry speaks plain HTTP
	@[ -n '$(IMAGE)' ] || { echo 'make: say where to: make push IMAGE=registry.example/pd-filter:0.1.0' >&2; exit 1; }
	cargo run $(LOCKED) --quiet -p pd-image -- push '$(IMAGE)' --layout target/image $(if $(PIN),--pin '$(PIN)') $(if $(PLAIN_HTTP),--plain-http)

image-control: toolchain ## Write pd-control's OCI image, one static program for this machine's architecture: target/image-control
#> MUSL=aarch64-unknown-linux-musl         another one (needs gcc-aarch64-linux-gnu)
	$(call say,image of pd-control ($(MUSL)))
	@rustup target list --installed | grep -qx $(MUSL) || rustup --quiet target add $(MUSL)
	@# C sources need no more than this machine's compiler, or Debian's for the other architecture.
	$(CROSS) CARGO_PROFILE_RELEASE_STRIP=symbols RUSTFLAGS='$(REMAP)' \
	    cargo build $(LOCKED) --release --target $(MUSL) -p pd-control
	cargo run $(LOCKED) --quiet -p pd-image --no-default-features -- make --program target/$(MUSL)/release/pd-control --layout target/image-control

push-control: image-control ## Push pd-control's image likewise
#> IMAGE=registry/name:tag                  where to
#> PIN=gateway-manifests/base/control-image.env   file to write its name by digest into
#> PLAIN_HTTP=1                             the registry speaks plain HTTP
	@[ -n '$(IMAGE)' ] || { echo 'make: say where to: make push-control IMAGE=registry.example/pd-control:0.1.0' >&2; exit 1; }
	cargo run $(LOCKED) --quiet -p pd-image --no-default-features -- push '$(IMAGE)' --layout target/image-control $(if $(PIN),--pin '$(PIN)') $(if $(PLAIN_HTTP),--plain-http)

image-sim: toolchain ## Write the simulators' image, which the chart runs by default: target/image-sim
#> MUSL=aarch64-unknown-linux-musl         another architecture
	$(call say,image of pd-sim ($(MUSL)))
	@rustup target list --installed | grep -qx $(MUSL) || rustup --quiet target add $(MUSL)
	$(CROSS) CARGO_PROFILE_RELEASE_STRIP=symbols RUSTFLAGS='$(REMAP)' \
	    cargo build $(LOCKED) --release --target $(MUSL) -p pd-sim
	cargo run $(LOCKED) --quiet -p pd-image --no-default-features -- make --program target/$(MUSL)/release/pd-sim --layout target/image-sim

image-bench: toolchain ## Write the image of pd-bench-serve for the Job in gateway-manifests/bench: target/image-bench
	$(call say,image of pd-bench-serve ($(MUSL)))
	@rustup target list --installed | grep -qx $(MUSL) || rustup --quiet target add $(MUSL)
	$(CROSS) CARGO_PROFILE_RELEASE_STRIP=symbols RUSTFLAGS='$(REMAP)' \
	    cargo build $(LOCKED) --release --target $(MUSL) -p pd-bench --bin pd-bench-serve
	cargo run $(LOCKED) --quiet -p pd-image --no-default-features -- make --program target/$(MUSL)/release/pd-bench-serve --layout target/image-bench

release: toolchain ## Build a release and sign it: images, chart, SBOM, provenance, checksums
#> OUT=target/release-out                   where to
#> REGISTRY=registry.example                where the images will be
#> KEY=private.pem                          Ed25519 key to sign with
	@REGISTRY='$(or $(REGISTRY),registry.example)' KEY='$(KEY)' tools/release/build.sh '$(or $(OUT),target/release-out)'

release-verify: ## Check a release: signature, checksums, provenance, digests in the chart
#> OUT=target/release-out PUB=public.pem    where it is; key that it is signed with
	@PUB='$(PUB)' tools/release/verify.sh '$(or $(OUT),target/release-out)'

toolchain: ## Install the pinned Rust toolchain, where it is missing
	@.ci/toolchain

envoy: ## Install Envoy into .cache, where it is missing
	@envoy/fetch.sh $(ENVOY_VERSION) >/dev/null

programs: ## Build helm, kustomize, grpcurl and a collector into .cache for tests, where there is Go
	@tests/programs.sh >/dev/null || echo 'make: NOT TESTED without Go: the chart against kustomize, the external scaler with grpcurl, traces' >&2

clients: ## Install clients of PyPI and npm into .cache for tests, where there are Python and Node
	@tests/clients/install.sh >/dev/null

vllm: ## Install a vLLM for CPUs and a tiny model into .cache, where they are missing
	@tests/vllm/install.sh >/dev/null

##@ Check

test: lint wasm envoy programs clients ## Everything: lints, unit, property and end-to-end tests, those of Envoy itself on two versions, fuzzing
#> FUZZ_SECONDS=10                          for each target
#> GATEWAY_CASES=                           all end-to-end tests on the second Envoy, too
	@envoy/fetch.sh $(GATEWAY_ENVOY_VERSION) >/dev/null
	@# Always of all packages, programs included: of one alone other features of what they share would be built once more.
	$(call say,tests of all crates with Envoy $(ENVOY_VERSION))
	PD_PROGRAMS=$$(tests/programs.sh 2>/dev/null || true) PD_CLIENTS=$$(tests/clients/install.sh 2>/dev/null || true) \
	    PD_ENVOY_VERSION=$(ENVOY_VERSION) RUST_TEST_THREADS=$(TEST_THREADS) \
	    cargo test $(LOCKED) --workspace --exclude pd-filter
	$(call say,end-to-end tests with Envoy $(GATEWAY_ENVOY_VERSION))
	PD_ENVOY_VERSION=$(GATEWAY_ENVOY_VERSION) RUST_TEST_THREADS=$(TEST_THREADS) \
	    cargo test $(LOCKED) --workspace --exclude pd-filter --test envoy -- $(GATEWAY_CASES)
	@# With one seed, so that a finding comes again. `make fuzz` has another one each time.
	@FUZZ_SECONDS=$(or $(FUZZ_SECONDS),10) $(MAKE) fuzz-all FUZZ_ARGS=-seed=1
	$(call say,everything passed)

test-vllm: vllm build envoy ## End-to-end tests with a real vLLM prefill/decode pair on this machine's CPU
#> PD_VLLM_MINUTES=20                       after which they are given up
	$(call say,end-to-end tests with vLLM $(shell cat tests/vllm/version) and Envoy $(ENVOY_VERSION))
	PD_ENVOY_VERSION=$(ENVOY_VERSION) cargo test $(LOCKED) -p pd-vllm --test vllm -- --nocapture --test-threads=1

test-cluster: wasm ## The manifests on a real control plane with Envoy Gateway, without containers (needs root and Go)
#> KUBECONFIG=file                          on that cluster, which has Envoy Gateway and the programs' images
#> PD_CLUSTER_BIN=folder                    with the control plane, in place of building it (10 minutes)
#> PD_AI_GATEWAY_BIN=folder                 with Envoy AI Gateway, in place of building it
#> PD_CLUSTER_SECONDS=900                   after which it says that it did not run, or is given up
#> TESTS=rollout                            some of them
#> GATEWAY=v1.9.1                           another version of Envoy Gateway, or `latest`
	@envoy/fetch.sh $(GATEWAY_ENVOY_VERSION) >/dev/null
	$(call say,tests on a cluster with Envoy Gateway $(or $(GATEWAY),$(shell cat tests/cluster/programs/envoy-gateway.version)))
	@$(if $(GATEWAY),PD_ENVOY_GATEWAY_VERSION=$(GATEWAY)) PD_ENVOY_VERSION=$(GATEWAY_ENVOY_VERSION) tests/cluster/run.sh $(TESTS)

cluster-up: wasm ## That cluster with simulators on it, to try things out; `make cluster-down` ends it
	@envoy/fetch.sh $(GATEWAY_ENVOY_VERSION) >/dev/null
	@PD_ENVOY_VERSION=$(GATEWAY_ENVOY_VERSION) tests/cluster/up.sh up

cluster-shell: ## A shell in that cluster's network, with kubectl set up
	@tests/cluster/up.sh shell

cluster-down: ## End that cluster
	@tests/cluster/up.sh down

lint: toolchain deps-check ## Formatting, clippy for native and wasm, pd-core's dependencies
	$(call say,formatting)
	cargo fmt --all --check
	$(call say,clippy)
	@# What ships: with the disallowed lists of filter/clippy.toml and filter/core/clippy.toml.
	cargo clippy $(LOCKED) -p pd-core -p pd-filter --target wasm32-wasip1 -- -D warnings
	cargo clippy $(LOCKED) -p pd-least --target wasm32-wasip1 -- -D warnings
	@# Everything else, and core's tests, which may use what core may not.
	CLIPPY_CONF_DIR=$(CURDIR) cargo clippy $(LOCKED) --workspace --exclude pd-filter --all-targets -- -D warnings
	@# Tests that other make targets run are none of all targets.
	CLIPPY_CONF_DIR=$(CURDIR) cargo clippy $(LOCKED) --workspace --exclude pd-filter \
	    --test vllm --test gateway --test helm --test scaling --test telemetry --test ai_gateway --test lifetime -- -D warnings

fmt: toolchain ## Format the sources
	cargo fmt --all

docs: toolchain ## Write the tables of docs/ that are generated from the code
	PD_DOCS=write cargo test $(LOCKED) --quiet -p pd-run --test docs generated_tables

budgets: wasm ## Write what a request costs now (host calls, instructions, allocations) into tests/host/budgets.csv, which tests hold
	PD_BUDGETS=write cargo test $(LOCKED) --quiet --workspace --exclude pd-filter --test allocations --test filter budget

soak: build envoy ## Many requests at 64 concurrent while everything goes wrong on two Envoys, then with random faults at every engine
#> SOAK_REQUESTS=100000 SOAK_SEED=1          how many, in each of the two; in which order what goes wrong
#> SOAK_MINUTES=25                           after which the first one is given up
#> SOAK_ENGINE=sglang                        one engine only, and no first one
	$(call say,$(or $(SOAK_REQUESTS),100000) requests with random faults)
	PD_SOAK_REQUESTS=$(or $(SOAK_REQUESTS),100000) $(if $(SOAK_ENGINE),PD_SOAK_ENGINE='$(SOAK_ENGINE)') \
	    $(if $(SOAK_SEED),PD_SOAK_SEED='$(SOAK_SEED)') $(if $(SOAK_MINUTES),PD_SOAK_MINUTES='$(SOAK_MINUTES)') \
	    cargo test $(LOCKED) -p pd-tests --test envoy $(if $(SOAK_ENGINE),soak::random,soak::) -- --nocapture --test-threads=1

fuzz: toolchain ## Fuzz at length
#> FUZZ_SECONDS=1800 TARGETS=…              for each target; some of them only
	@FUZZ_SECONDS=$(or $(FUZZ_SECONDS),1800) $(MAKE) fuzz-all

bench: build envoy ## Measure: stages of pd-core, module size, Envoy with and without the filter, the push
#> ARGS=…                                   more options of its end-to-end part
	$(call say,size of the module)
	@stat -c '%s bytes' target/wasm32-wasip1/filter/pd_filter.wasm
	$(call say,stages of pd-core)
	cargo bench $(LOCKED) -p pd-core
	$(call say,a request in the module)
	cargo run $(LOCKED) --quiet -p pd-host --example cost
	$(call say,Envoy with and without the filter)
	cargo build $(LOCKED) --quiet -p pd-least --target wasm32-wasip1 --profile filter $(FILTER_FLAGS)
	cargo run $(LOCKED) --quiet -p pd-bench --bin pd-bench -- --least target/wasm32-wasip1/filter/pd_least.wasm $(ARGS)
	$(call say,a change of the list and pd-control)
	cargo run $(LOCKED) --quiet -p pd-bench --bin pd-bench-push

bench-peers: build envoy ## Measure the filter beside the routers vllm-router, sglang-router and smg, alone and behind Envoy
#> ARGS=…                                   sizes, connections, rounds: see --help
	@cargo run $(LOCKED) --quiet -p pd-bench --bin pd-bench-peers -- --peers "$$(tools/bench/peers/install.sh)" $(ARGS)

bench-growth: build envoy ## Measure how cost and memory grow: prompts, endpoints, workers, Envoys, streams, held requests, …
#> ARGS=…                                   some axes, rounds: see --help
	@cargo run $(LOCKED) --quiet -p pd-bench --bin pd-bench-growth -- $(ARGS)

dashboard-pictures: build envoy ## Draw the dashboard of a replay into docs/dashboard, from a real Prometheus (Debian: prometheus)
	cargo test $(LOCKED) --workspace --exclude pd-filter --test ops -- --ignored --nocapture pictures

schemas: toolchain ## Store the schemas that the manifests are checked by, from a folder of definitions
#> CRDS=folder                              such as .cache/cluster-…/eg-chart/charts/crds
	cargo run $(LOCKED) --quiet -p pd-cluster --bin pd-schemas -- '$(CRDS)' tests/cluster/schemas

deps: toolchain ## Accept pd-core's present dependencies
	@$(core_dependencies) > filter/core/dependencies.txt

clean: ## Remove everything that was built or fetched
	rm -rf target .cache

# --- parts of the above

core_dependencies = cargo tree --quiet $(LOCKED) -p pd-core -e normal --prefix none | sed 's/ .*//' | LC_ALL=C sort -u

deps-check: toolchain
	@diff -u filter/core/dependencies.txt <($(core_dependencies)) || \
	    { echo 'make: the dependencies of pd-core have changed; if that is meant: make deps' >&2; exit 1; }

fuzz-all:
	@if ! command -v "$${CXX:-c++}" >/dev/null; then \
	    echo 'make: NOT FUZZED, there is no C++ compiler (Debian, Ubuntu: apt-get install g++)' >&2; \
	else \
	    for target in $(or $(TARGETS),$(FUZZ_TARGETS)); do \
	        printf '\n== fuzzing %s for %s s\n' "$$target" "$$FUZZ_SECONDS"; \
	        filter/core/fuzz/run.sh "$$target" "$$FUZZ_SECONDS" $(FUZZ_ARGS); \
	    done; \
	fi

.PHONY: help docs run replay sim sim-agree sim-autoscale bench-serve explain build wasm image push image-control push-control image-sim image-bench release release-verify programs clients toolchain envoy vllm test test-vllm test-cluster cluster-up cluster-shell cluster-down lint fmt soak fuzz bench bench-peers bench-growth schemas deps clean deps-check fuzz-all plan dashboard-pictures sim-split
