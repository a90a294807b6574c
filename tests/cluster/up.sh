#!/usr/bin/env bash
# A cluster that stays up, for trying things out: the one of the tests, with the manifests of overlay `sim`.
#
#     tests/cluster/up.sh up                 start it, and say where the Gateway is
#     tests/cluster/up.sh shell [COMMAND…]   a shell or a command in its network, with kubectl set up
#     tests/cluster/up.sh down               end it; nothing is left but the logs in target/cluster-up/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
state=$PWD/target/cluster-up
pidfile=$PWD/target/cluster-up.pid

die() { echo "cluster: $*" >&2; exit 1; }
is_up() { [ -e "$pidfile" ] && kill -0 "$(<"$pidfile")" 2>/dev/null; }

up() {
    ! is_up || die "it is up (make cluster-down ends it)"
    [ "$(id -u)" -eq 0 ] || die "making network namespaces needs root"
    for program in unshare setpriv nsenter ip docker-registry curl; do
        command -v "$program" >/dev/null || die "there is no $program (Debian, Ubuntu: apt-get install util-linux iproute2 docker-registry curl)"
    done
    PD_CLUSTER_BIN=${PD_CLUSTER_BIN:-$(tests/cluster/programs/build.sh)}
    # Of all packages, as the tests build them.
    cargo build ${CI:+--locked} --workspace --exclude pd-filter --bins
    envoy=$(find ".cache/envoy-$PD_ENVOY_VERSION/" -path '*/_bin/envoy' -type f)
    rm -rf "$state"
    PATH="$PATH:$PD_CLUSTER_BIN" setsid target/debug/pd-cluster --programs "$PD_CLUSTER_BIN" --state "$state" \
        --image "envoy=$envoy" --image pd-sim=target/debug/pd-sim --image pd-control=target/debug/pd-control \
        -- "$PWD/tests/cluster/up.sh" inside >"$state.log" 2>&1 </dev/null &
    echo $! >"$pidfile"
    until [ -e "$state/ready" ]; do
        is_up || { tail -n 20 "$state.log" >&2; die "it did not come up: $state.log"; }
        sleep 0.2
    done
    cat "$state/ready"
}

# In the cluster: what its README says of installing, and a wait for the first answer.
inside() {
    cp -r gateway-manifests "$state/manifests"
    target/debug/pd-image make --module target/wasm32-wasip1/filter/pd_filter.wasm --layout "$state/image"
    target/debug/pd-image push "$PD_CLUSTER_REGISTRY/pd-filter:up" --layout "$state/image" --plain-http \
        --pin "$state/manifests/base/filter-image.env"
    until kubectl apply -k "$state/manifests/overlays/sim"; do sleep 1; done
    until address=$(kubectl -n llm get gateway pd -o 'jsonpath={.status.addresses[0].value}') && [ -n "$address" ] &&
        curl -sf "http://$address/v1/completions" -H 'content-type: application/json' \
            -d '{"model":"sim","prompt":"a","max_tokens":1}' -o /dev/null; do sleep 0.5; done
    cat >"$state/ready.new" <<TEXT
The Gateway is at http://$address in the cluster's network; manifests to edit are in target/cluster-up/manifests.

    make cluster-shell                       # a shell there: kubectl, curl http://$address/v1/models
    kubectl apply -k target/cluster-up/manifests/overlays/sim
    make cluster-down

Logs are in target/cluster-up/, one for each container.
TEXT
    mv "$state/ready.new" "$state/ready"
    exec sleep infinity
}

# The first process in the cluster's namespaces: the child of `unshare`, which the harness starts.
first() {
    local pid
    pid=$(<"$pidfile")
    for _ in 1 2; do read -r pid _ <"/proc/$pid/task/$pid/children"; done
    echo "$pid"
}

shell() {
    is_up || die "it is not up (make cluster-up)"
    [ $# -gt 0 ] || set -- "${SHELL:-/bin/bash}"
    PD_CLUSTER_BIN=${PD_CLUSTER_BIN:-$(tests/cluster/programs/build.sh)}
    KUBECONFIG=$state/pki/kubeconfig PATH="$PATH:$PD_CLUSTER_BIN" exec nsenter --target "$(first)" --net --mount --pid --wd="$PWD" "$@"
}

down() {
    is_up || die "it is not up"
    pid=$(<"$pidfile")
    kill "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
    rm -f "$pidfile"
}

case ${1:-} in
    up | inside | down) "$1" ;;
    shell) shell "${@:2}" ;;
    *) die "up, shell or down" ;;
esac
