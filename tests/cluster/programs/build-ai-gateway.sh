#!/usr/bin/env bash
# Builds Envoy AI Gateway from its published Go module, where it is missing, and prints the folder:
#
#     tests/cluster/programs/build-ai-gateway.sh [--is-built]
#
# Controller, external processor and charts go to .cache/ai-gateway-VERSION/. From nothing that takes some minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

version=$(<tests/cluster/programs/ai-gateway.version)
directory=$PWD/.cache/ai-gateway-$version

source tests/cluster/programs/once.sh
once "$directory" "Envoy AI Gateway $version" "$@"
module=$(go mod download -json "github.com/envoyproxy/ai-gateway@$version" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
# In the module's own folder: `go install PROGRAM@VERSION` also asks for the list of versions, which not every proxy has.
for program in controller extproc; do
    (cd "$module" && go build -o "$directory/ai-gateway-$program" "./cmd/$program")
done
rm -rf "$directory/charts"
cp -r "$module/manifests/charts" "$directory/charts"
cp "$module/manifests/envoy-gateway-values.yaml" "$directory/"
chmod -R u+w "$directory/charts" "$directory/envoy-gateway-values.yaml"
touch "$directory/complete"
echo "$directory"
