#!/usr/bin/env bash
# Installs the clients whose requests tests/envoy sends through the gateway, where they are missing, and prints their folder:
#
#     tests/clients/install.sh
#
# The packages openai, anthropic and litellm from PyPI, openai and @anthropic-ai/sdk from npm, in pinned versions, go to
# .cache/clients-HASH/: python/ is a virtual environment, node/ has node_modules. What this machine has no Python or no Node
# for is left out, with a line on standard error. Nothing outside of .cache is touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

from=tests/clients
recipe=$(cat "$from/install.sh" "$from/requirements.txt" "$from/package-lock.json" | sha256sum | cut -c1-8)
directory=$PWD/.cache/clients-$recipe
mkdir -p "$directory"
# Two makes at once must not install into each other's directory.
exec 9>"$directory.lock"
flock 9

say() { echo "clients: $*" >&2; }

if [ ! -e "$directory/python/complete" ]; then
    if python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        say "installing openai, anthropic and litellm into $directory/python"
        rm -rf "$directory/python"
        python3 -m venv "$directory/python"
        if "$directory/python/bin/pip" install --quiet --disable-pip-version-check --no-input --no-deps \
            -r "$from/requirements.txt" >&2; then
            touch "$directory/python/complete"
        else
            say 'NOT TESTED: the packages of PyPI cannot be installed'
        fi
    else
        say 'NOT TESTED without Python 3.10 with venv: openai, anthropic and litellm of PyPI'
    fi
fi
if [ ! -e "$directory/node/complete" ]; then
    if command -v npm >/dev/null && node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' 2>/dev/null; then
        say "installing openai and @anthropic-ai/sdk into $directory/node"
        rm -rf "$directory/node"
        mkdir -p "$directory/node"
        cp "$from/package.json" "$from/package-lock.json" "$directory/node"
        if npm ci --prefix "$directory/node" --no-audit --no-fund --ignore-scripts --silent >&2; then
            touch "$directory/node/complete"
        else
            say 'NOT TESTED: the packages of npm cannot be installed'
        fi
    else
        say 'NOT TESTED without Node 20 and npm: openai and @anthropic-ai/sdk of npm'
    fi
fi
echo "$directory"
