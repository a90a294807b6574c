#!/usr/bin/env bash
# Runs the tests of the manifests, on a cluster made for them or on the one that KUBECONFIG names:
#
#     tests/cluster/run.sh [FILTER…]
#
# PD_CLUSTER_SECONDS bounds all of it: what does not fit is not run, and says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Of all packages, as `make test` builds them: other features of what they share would be built once more.
tests() { cargo test --offline --workspace --exclude pd-filter "$@"; }
suite=(cargo test --offline --workspace --exclude pd-filter --test gateway -- --test-threads=1 --nocapture "$@")
not_run() { echo "cluster: NOT RUN, $*" >&2; exit 0; }

if [ -n "${KUBECONFIG:-}" ]; then
    exec "${suite[@]}"
fi
[ "$(id -u)" -eq 0 ] || not_run "making network namespaces needs root"
for program in unshare setpriv nsenter ip docker-registry; do
    command -v "$program" >/dev/null || not_run "there is no $program (Debian, Ubuntu: apt-get install util-linux iproute2 docker-registry)"
done

limit=${PD_CLUSTER_SECONDS:-}
# Compiling the tests and running them.
needed=600
[ -z "$limit" ] || [ "$limit" -ge "$needed" ] || not_run "$limit s are left, and it takes $needed"
if [ -z "${PD_CLUSTER_BIN:-}" ]; then
    build=tests/cluster/programs/build.sh
    "$build" --is-built || command -v go >/dev/null || not_run "there is no Go to build a control plane with (https://go.dev/dl)"
    left=${limit:+$((limit - needed))}
    # 0: no limit.
    PD_CLUSTER_BIN=$(timeout "${left:-0}" "$build") || {
        [ $? -eq 124 ] || exit 1
        not_run "$left s were left to build a control plane, and that was not enough (Go's cache keeps what was built)"
    }
fi

# The programs are built with the tests of their packages: pd-cluster, pd-control, pd-sim.
tests --quiet --test gateway --test lifetime --test control --test sim --no-run
# However the harness ends, it leaves nothing behind.
PD_CLUSTER_BIN=$PD_CLUSTER_BIN tests --quiet --test lifetime -- --nocapture
# The program itself, which the Python package's `envoy` starts.
envoy=$(find ".cache/envoy-$PD_ENVOY_VERSION/" -path '*/_bin/envoy' -type f)
export PATH="$PATH:$PD_CLUSTER_BIN"
left=${limit:+$((limit - SECONDS))}
[ "${left:-1}" -gt 0 ] || not_run "compiling took all the time that was left"
timeout --foreground "${left:-0}" target/debug/pd-cluster --programs "$PD_CLUSTER_BIN" --state target/cluster \
    --image "envoy=$envoy" --image pd-sim=target/debug/pd-sim --image pd-control=target/debug/pd-control -- "${suite[@]}" || {
    status=$?
    [ "$status" -eq 124 ] || exit "$status"
    echo "cluster: NOT FINISHED in the $left s that were left" >&2
}
