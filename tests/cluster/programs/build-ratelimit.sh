#!/usr/bin/env bash
# Builds Envoy's rate limit service from its published Go module, where it is missing, and prints the folder:
#
#     tests/cluster/programs/build-ratelimit.sh [--is-built]
#
# Its version is the one that the tested Envoy Gateway depends on. It goes to .cache/ratelimit-VERSION/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

gateway=$(<tests/cluster/programs/envoy-gateway.version)
field() { sed -n "s/^\t\"$1\": \"\(.*\)\",\$/\1/p"; }
requirements=$(go mod download -json "github.com/envoyproxy/gateway@$gateway" | field GoMod)
version=$(sed -n 's/^\tgithub.com\/envoyproxy\/ratelimit //p' "$requirements")
directory=$PWD/.cache/ratelimit-$version

source tests/cluster/programs/once.sh
once "$directory" "Envoy's rate limit service $version" "$@"
module=$(go mod download -json "github.com/envoyproxy/ratelimit@$version" | field Dir)
(cd "$module" && go build -o "$directory/ratelimit" ./src/service_cmd)
touch "$directory/complete"
echo "$directory"
