#!/usr/bin/env bash
# Installs the routers that `make bench-peers` measures, and prints their folder:
#
#     tools/bench/peers/install.sh
#
# Each has a virtual environment of its own in .cache/peers-HASH/, with the pinned packages of NAME.txt from PyPI: two of them
# have a Python module of the same name. Nothing outside of .cache is touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

from=tools/bench/peers
recipe=$(cat "$from"/install.sh "$from"/*.txt | sha256sum | cut -c1-8)
directory=$PWD/.cache/peers-$recipe
mkdir -p "$directory"
# Two makes at once must not install into each other's directory.
exec 9>"$directory.lock"
flock 9

for list in "$from"/*.txt; do
    name=$(basename "$list" .txt)
    [ ! -e "$directory/$name/complete" ] || continue
    echo "peers: installing $name into $directory/$name" >&2
    rm -rf "${directory:?}/$name"
    python3 -m venv "$directory/$name"
    "$directory/$name/bin/pip" install --quiet --disable-pip-version-check --no-input --no-deps -r "$list" >&2
    touch "$directory/$name/complete"
done
echo "$directory"
