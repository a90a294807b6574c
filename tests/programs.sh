#!/usr/bin/env bash
# Builds programs that tests ask for a second opinion, from published Go modules, and prints their folder:
#
#     tests/programs.sh
#
# helm and kustomize render the manifests, grpcurl is a gRPC client of another make, tests/collector is an OpenTelemetry
# Collector, and envoy/deploy/xds is a control plane for Envoys. They go to .cache/programs-HASH/. From nothing that takes
# about three minutes on two cores; Go's cache then has most of what tests/cluster/programs/build.sh needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

modules=(
    helm.sh/helm/v3/cmd/helm@v3.18.6
    sigs.k8s.io/kustomize/kustomize/v5@v5.7.1
    github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3
)
directory=$PWD/.cache/programs-$({ printf '%s\n' "${modules[@]}"; cat {tests/collector,envoy/deploy/xds}/{main.go,go.mod}; } | sha256sum | cut -c1-8)
mkdir -p .cache
exec 9>"$directory.lock"
flock 9
if [ ! -e "$directory/complete" ]; then
    command -v go >/dev/null || { echo 'programs: needs Go (https://go.dev/dl)' >&2; exit 1; }
    mkdir -p "$directory"
    echo "programs: building helm, kustomize, grpcurl, a collector and an xDS server into $directory" >&2
    for module in "${modules[@]}"; do
        GOBIN=$directory go install "$module"
    done
    (cd tests/collector && go build -o "$directory/collector" .)
    (cd envoy/deploy/xds && go build -o "$directory/xds" .)
    touch "$directory/complete"
fi
echo "$directory"
