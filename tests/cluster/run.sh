#!/usr/bin/env bash
# Runs the tests of the manifests, on a cluster made for them or on the one that KUBECONFIG names:
#
#     tests/cluster/run.sh [FILTER…]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

suite=(cargo test --offline -p pd-cluster --test gateway -- --test-threads=1 --nocapture "$@")
not_run() { echo "cluster: NOT RUN, $*" >&2; exit 0; }

if [ -n "${KUBECONFIG:-}" ]; then
    exec "${suite[@]}"
fi
[ "$(id -u)" -eq 0 ] || not_run "making network namespaces needs root"
for program in unshare nsenter ip docker-registry; do
    command -v "$program" >/dev/null || not_run "there is no $program (Debian, Ubuntu: apt-get install util-linux iproute2 docker-registry)"
done
if [ -z "${PD_CLUSTER_BIN:-}" ]; then
    command -v go >/dev/null || not_run "there is no Go to build a control plane with (https://go.dev/dl)"
    PD_CLUSTER_BIN=$(tests/cluster/programs/build.sh)
fi

# The program pd-cluster with it.
cargo test --quiet -p pd-cluster --test gateway --no-run
# The program itself, which the Python package's `envoy` starts.
envoy=$(find ".cache/envoy-$PD_ENVOY_VERSION/" -path '*/_bin/envoy' -type f)
export PATH="$PATH:$PD_CLUSTER_BIN"
exec target/debug/pd-cluster --programs "$PD_CLUSTER_BIN" --state target/cluster \
    --image "envoy=$envoy" --image pd-sim=target/debug/pd-sim --image pd-control=target/debug/pd-control -- "${suite[@]}"
