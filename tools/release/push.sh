#!/usr/bin/env bash
# Pushes a release that `make release` built: the filter's image, pd-control's for each architecture with an index of both, and
# the chart. Needs docker (for the index), helm, and their logins:
#
#     REGISTRY=registry.example tools/release/push.sh FOLDER
set -euo pipefail
folder=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
layouts=$(mktemp -d)
trap 'rm -rf "$layouts"' EXIT
for archive in "$folder"/*.oci.tar; do
    tar --extract --directory "$layouts" --file "$archive"
done
version=$(basename "$folder"/envoy-pd-*.tgz .tgz)
version=${version#envoy-pd-}
push() { cargo run --locked --quiet -p pd-image --no-default-features -- push "$@"; }

push "$REGISTRY/pd-filter:$version" --layout "$layouts/filter"
images=()
for layout in "$layouts"/control-*; do
    images+=("$(push "$REGISTRY/pd-control:$version-${layout##*-}" --layout "$layout")")
done
docker buildx imagetools create --tag "$REGISTRY/pd-control:$version" "${images[@]}"
helm push "$folder/envoy-pd-$version.tgz" "oci://$REGISTRY/charts"
