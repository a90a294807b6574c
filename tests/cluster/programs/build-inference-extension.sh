#!/usr/bin/env bash
# Takes the CRDs of the Gateway API Inference Extension from its published Go module, where they are missing, and prints the folder:
#
#     tests/cluster/programs/build-inference-extension.sh [--is-built]
#
# They go to .cache/inference-extension-VERSION/crds/. Nothing is compiled.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

version=$(<tests/cluster/programs/inference-extension.version)
directory=$PWD/.cache/inference-extension-$version

source tests/cluster/programs/once.sh
once "$directory" "CRDs of the Gateway API Inference Extension $version" "$@"
module=$(go mod download -json "sigs.k8s.io/gateway-api-inference-extension@$version" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
rm -rf "$directory/crds"
cp -r "$module/config/crd/bases" "$directory/crds"
chmod -R u+w "$directory/crds"
touch "$directory/complete"
echo "$directory"
