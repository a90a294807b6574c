#!/usr/bin/env bash
# Runs the tests of the manifests, on a cluster made for them or on the one that KUBECONFIG names:
#
#     tests/cluster/run.sh [FILTER…]
#
# PD_CLUSTER_SECONDS bounds all of it: what does not fit is not run, and says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Of all packages, as `make test` builds them: other features of what they share would be built once more.
tests() { cargo test ${CI:+--locked} --workspace --exclude pd-filter "$@"; }
# The cluster's network leads nowhere else; what a suite needs is compiled before.
suite() { printf '%s\0' cargo test --offline --workspace --exclude pd-filter --test "$1" -- --test-threads=1 --nocapture "${@:2}"; }
not_run() { echo "cluster: NOT RUN, $*" >&2; exit 0; }

if [ -n "${KUBECONFIG:-}" ]; then
    mapfile -d '' command < <(suite gateway "$@")
    exec "${command[@]}"
fi
[ "$(id -u)" -eq 0 ] || not_run "making network namespaces needs root"
for program in unshare setpriv nsenter ip docker-registry; do
    command -v "$program" >/dev/null || not_run "there is no $program (Debian, Ubuntu: apt-get install util-linux iproute2 docker-registry)"
done

limit=${PD_CLUSTER_SECONDS:-}
# Compiling the tests and running them.
needed=600
# The same for those beside Envoy AI Gateway.
needed_beside=300
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
export PD_CLUSTER_BIN
if [ -z "${PD_CLUSTER_INFERENCE_CRDS:-}" ] && command -v go >/dev/null; then
    # Only files of a module; without them a test says that it did not run.
    PD_CLUSTER_INFERENCE_CRDS=$(tests/cluster/programs/build-inference-extension.sh) && export PD_CLUSTER_INFERENCE_CRDS
fi

# The programs are built with the tests of their packages: pd-cluster, pd-control, pd-sim.
tests --quiet --test gateway --test helm --test scaling --test telemetry --test ai_gateway --test lifetime --test control --test sim --no-run
# However the harness ends, it leaves nothing behind.
tests --quiet --test lifetime -- --nocapture
# The program itself, which the Python package's `envoy` starts.
envoy=$(find ".cache/envoy-$PD_ENVOY_VERSION/" -path '*/_bin/envoy' -type f)
export PATH="$PATH:$PD_CLUSTER_BIN"
images=(--image "envoy=$envoy" --image pd-sim=target/debug/pd-sim --image pd-control=target/debug/pd-control)
[ -z "${PD_CLUSTER_SIDECAR:-}" ] || images+=(--image "llm-d-routing-sidecar=$PD_CLUSTER_SIDECAR")

# Whether the filters leave tests of a suite.
has_tests() { [ $# -eq 1 ] || [[ $(tests --quiet --test "$1" -- --list "${@:2}" 2>/dev/null) == *': test'* ]]; }
# Runs a suite on a cluster of its own: its name, then filters.
on_cluster() {
    local left=${limit:+$((limit - SECONDS))} status=0 command
    [ "${left:-1}" -gt 0 ] || not_run "there is no time left for the tests $1"
    mapfile -d '' command < <(suite "$@")
    timeout --foreground "${left:-0}" target/debug/pd-cluster --programs "$PD_CLUSTER_BIN" --state target/cluster \
        "${images[@]}" -- "${command[@]}" || status=$?
    [ "$status" -ne 124 ] || { echo "cluster: NOT FINISHED in the $left s that were left: $1" >&2; exit 0; }
    [ "$status" -eq 0 ] || exit "$status"
}
! has_tests gateway "$@" || on_cluster gateway "$@"
! has_tests helm "$@" || on_cluster helm "$@"

# Autoscalers.
scaling() {
    local left=${limit:+$((limit - SECONDS - needed_beside))} build=tests/cluster/programs/build-keda.sh name
    command -v prometheus >/dev/null ||
        { echo "cluster: NOT RUN, there is no prometheus (Debian, Ubuntu: apt-get install prometheus): scaling" >&2; return 0; }
    if [ -z "${PD_KEDA_BIN:-}" ]; then
        [ "${left:-1}" -gt 0 ] || { echo "cluster: NOT RUN, there is no time left to build KEDA: scaling" >&2; return 0; }
        PD_KEDA_BIN=$(timeout "${left:-0}" "$build") || {
            [ $? -eq 124 ] || exit 1
            echo "cluster: NOT RUN, $left s were left to build KEDA, and that was not enough: scaling" >&2
            return 0
        }
    fi
    export PD_KEDA_BIN
    for name in keda keda-metrics-apiserver prometheus-adapter; do
        images+=(--image "$name=$PD_KEDA_BIN/$name")
    done
    images+=(--image "prometheus=$(command -v prometheus)")
    on_cluster scaling "$@"
}
! has_tests scaling "$@" || scaling "$@"

# Rate limits by tokens, and traces.
telemetry() {
    local left=${limit:+$((limit - SECONDS - needed_beside))} programs service
    command -v redis-server >/dev/null ||
        { echo "cluster: NOT RUN, there is no redis-server (Debian, Ubuntu: apt-get install redis-server): telemetry" >&2; return 0; }
    [ "${left:-1}" -gt 0 ] || { echo "cluster: NOT RUN, there is no time left to build a rate limit service: telemetry" >&2; return 0; }
    programs=$(timeout "${left:-0}" tests/programs.sh) &&
        service=$(timeout "${left:-0}" tests/cluster/programs/build-ratelimit.sh) || {
        [ $? -eq 124 ] || exit 1
        echo "cluster: NOT RUN, $left s were left to build a rate limit service, and that was not enough: telemetry" >&2
        return 0
    }
    # Debian's is a link to a program of several names, and its name decides what it is.
    install -D "$(command -v redis-server)" target/cluster-redis/redis-server
    images+=(--image redis=target/cluster-redis/redis-server --image "ratelimit=$service/ratelimit"
        --image "opentelemetry-collector=$programs/collector")
    on_cluster telemetry "$@"
}
! has_tests telemetry "$@" || telemetry "$@"

has_tests ai_gateway "$@" || exit 0
left=${limit:+$((limit - SECONDS - needed_beside))}
[ "${left:-1}" -gt 0 ] || not_run "there is no time left for the tests beside Envoy AI Gateway"
if [ -z "${PD_AI_GATEWAY_BIN:-}" ]; then
    build=tests/cluster/programs/build-ai-gateway.sh
    "$build" --is-built || command -v go >/dev/null || not_run "there is no Go to build Envoy AI Gateway with (https://go.dev/dl)"
    PD_AI_GATEWAY_BIN=$(timeout "${left:-0}" "$build") || {
        [ $? -eq 124 ] || exit 1
        not_run "$left s were left to build Envoy AI Gateway, and that was not enough (Go's cache keeps what was built)"
    }
fi
export PD_AI_GATEWAY_BIN
for program in controller extproc; do
    images+=(--image "ai-gateway-$program=$PD_AI_GATEWAY_BIN/ai-gateway-$program")
done
on_cluster ai_gateway "$@"
