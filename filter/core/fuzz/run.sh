#!/usr/bin/env bash
# Fuzzes one target for a bounded time, on stable Rust and without cargo-fuzz:
#
#     filter/core/fuzz/run.sh TARGET SECONDS [libFuzzer arguments]
#
# Starts from seeds/TARGET (never written) and from what earlier runs found (target/fuzz/corpus/TARGET). Prints executions
# and coverage. A finding ends it with an error and the path of the input; run the printed command to see it again.
set -euo pipefail

die() { echo "fuzz: $*" >&2; exit 2; }

[ $# -ge 2 ] || die "usage: run.sh TARGET SECONDS [libFuzzer arguments]"
target=$1 seconds=$2
shift 2

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(cd "$here/../../.." && pwd)/target/fuzz
[ -f "$here/targets/$target.rs" ] || die "no target $target; there are: $(cd "$here/targets" && echo *.rs | sed 's/\.rs//g')"
[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "SECONDS must be a whole number above 0, not $seconds"
cxx=${CXX:-c++}
command -v "${cxx%% *}" >/dev/null || die "needs a C++ compiler to build libFuzzer (Debian, Ubuntu: apt-get install g++)"

# What cargo-fuzz passes, less the sanitizers, which need a nightly compiler. With --target build scripts stay as they are.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares"
export CARGO_TARGET_DIR=$work/build
triple=$(rustc -vV | sed -n 's/^host: //p')
(cd "$here" && cargo build --release --locked --quiet --target "$triple" --bin "$target")
binary=$CARGO_TARGET_DIR/$triple/release/$target

corpus=$work/corpus/$target findings=$work/findings/$target log=$work/$target.log
mkdir -p "$corpus" "$findings" "$here/seeds/$target"
arguments=(-max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1)
arguments+=(-artifact_prefix="$findings/")
[ ! -f "$here/dict/$target" ] || arguments+=(-dict="$here/dict/$target")

status=0
if [ -t 1 ]; then
    "$binary" "${arguments[@]}" "$@" "$corpus" "$here/seeds/$target" 2>&1 | tee "$log" || status=$?
else
    "$binary" "${arguments[@]}" "$@" "$corpus" "$here/seeds/$target" >"$log" 2>&1 || status=$?
fi

executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
coverage=$(grep -o 'cov: [0-9]*' "$log" | tail -n 1 | sed 's/cov: //' || true)
if grep -q "libFuzzer: run interrupted" "$log"; then
    echo "fuzz: $target: stopped after ${executions:-?} executions, coverage ${coverage:-?}, nothing found" >&2
    exit 130
fi
if [ "$status" -ne 0 ]; then
    finding=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
    grep -m 1 -A 3 "panicked at\|ERROR: libFuzzer" "$log" >&2 || tail -n 20 "$log" >&2
    echo "fuzz: $target failed after ${executions:-?} executions; the whole output is in $log" >&2
    [ -z "$finding" ] || echo "fuzz: the input is $finding; again: $binary $finding" >&2
    exit 1
fi
# Without instrumentation everything would pass, and nothing would be found.
[ "${coverage:-0}" -gt 0 ] || die "$target ran without coverage; see $log"
echo "fuzz: $target: $executions executions in $seconds s, coverage $coverage, nothing found"
