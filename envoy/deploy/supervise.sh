#!/usr/bin/env bash
# Runs Envoy under a service manager, and loses no request when Envoy is restarted or stopped:
#
#     envoy/deploy/supervise.sh ENVOY OPTION…
#
# Signals:
#
#     HUP    hot restart: starts ENVOY again, which takes over the listeners. The old process ends the requests that it has.
#     TERM   drains: announces the end to clients, closes the listeners, waits for the requests, then ends
#
# Variables, with defaults:
#
#     PD_ADMIN=127.0.0.1:9901   Envoy's admin interface
#     PD_BASE_ID=0              another one for each supervised Envoy of a machine
#     PD_REQUEST_SECONDS=3600   how long a request may go on in a process that is restarted or stopped
#     PD_LEAVE_SECONDS=5        how long new connections are still accepted after TERM: until load balancers know
#
# If Envoy ends by itself, this program ends with Envoy's status, and the service manager starts both again.
set -uo pipefail

admin=http://${PD_ADMIN:-127.0.0.1:9901}
seconds=${PD_REQUEST_SECONDS:-3600}
epoch=0 current='' previous='' is_stopping='' wants_restart=''
# `immediate`: clients learn with their next answer, not at some time, that they have to connect again.
options=(--base-id "${PD_BASE_ID:-0}" --drain-strategy immediate --drain-time-s "$seconds" --parent-shutdown-time-s "$seconds")

say() { echo "supervise: $*" >&2; }
ask() { curl --silent --max-time 5 "$@"; }
is_alive() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }
start() {
    "$@" "${options[@]}" --restart-epoch "$epoch" &
    current=$!
    say "Envoy of epoch $epoch is process $current"
}

restart() {
    if is_alive "$previous"; then
        # Envoy knows one old process only: a third one would end the first at once, with its requests.
        [ "$wants_restart" = later ] || say "the last restart is not over: the next one begins when process $previous has ended"
        wants_restart=later
        return
    fi
    wants_restart=
    # A broken file must not get far enough to take the admin interface from the running Envoy.
    if ! "$@" --mode validate --log-level error >/dev/null; then
        say 'the configuration is refused: the running Envoy stays'
        return
    fi
    previous=$current epoch=$((epoch + 1))
    start "$@"
    until is_live; do
        is_alive "$current" || {
            say "Envoy of epoch $epoch did not start: the running Envoy stays, without its admin interface"
            current=$previous previous='' epoch=$((epoch - 1))
            return
        }
        sleep 0.1
    done
}

# Whether the newest process has taken over.
is_live() {
    local info
    info=$(ask "$admin/server_info") && [[ $info == *'"state": "LIVE"'* && $info == *"\"restart_epoch\": $epoch,"* ]]
}

# Looks which processes have ended.
reap() {
    local status
    if [ -n "$previous" ] && ! is_alive "$previous"; then
        say "process $previous has ended"
        previous=
    fi
    is_alive "$current" && return
    wait "$current"
    status=$?
    say "Envoy has ended (status $status)"
    exit "$status"
}

active() { ask "$admin/stats?filter=downstream_rq_active\$" | awk '!/admin/ {sum += $2} END {print sum + 0}'; }

stop() {
    local end=$((SECONDS + seconds))
    trap '' TERM HUP
    say 'drains'
    # Load balancers that ask Envoy's health check filter, and clients that stay connected.
    ask -X POST "$admin/healthcheck/fail" -o /dev/null
    ask -X POST "$admin/drain_listeners?graceful" -o /dev/null
    sleep "${PD_LEAVE_SECONDS:-5}"
    ask -X POST "$admin/drain_listeners" -o /dev/null
    while is_alive "$current" && [ "$SECONDS" -lt "$end" ] && [ "$(active)" != 0 ]; do sleep 0.2; done
    # The old process of a hot restart is counted by the new one.
    kill -TERM "$current" $previous 2>/dev/null
    wait
    say 'has ended'
    exit 0
}

trap 'wants_restart=yes' HUP
trap 'is_stopping=yes' TERM INT
start "$@"
while true; do
    [ -z "$is_stopping" ] || stop
    [ -z "$wants_restart" ] || restart "$@"
    # A signal ends this wait.
    sleep 1 &
    wait $!
    reap
done
