#!/usr/bin/env bash
# Pushes a release that `make release` built: the filter's image, those of pd-control and pd-sim for each architecture with an
# index of both, and the chart. Needs docker (for the index), helm, and their logins:
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
for program in control sim; do
    images=()
    for layout in "$layouts/$program"-*; do
        images+=("$(push "$REGISTRY/pd-$program:$version-${layout##*-}" --layout "$layout")")
    done
    docker buildx imagetools create --tag "$REGISTRY/pd-$program:$version" "${images[@]}"
done
helm push "$folder/envoy-pd-$version.tgz" "oci://$REGISTRY/charts"
