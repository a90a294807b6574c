#!/usr/bin/env bash
# Pushes a release that `make release` built: the filter's image, those of pd-control and pd-sim for each architecture with an
# index of both, and the chart. Needs helm, and the logins of docker and helm:
#
#     REGISTRY=registry.example [PLAIN_HTTP=1] tools/release/push.sh FOLDER
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
image() { cargo run --locked --quiet -p pd-image --no-default-features -- "$@" ${PLAIN_HTTP:+--plain-http}; }

image push "$REGISTRY/pd-filter:$version" --layout "$layouts/filter"
for program in control sim; do
    for layout in "$layouts/$program"-*; do
        image push "$REGISTRY/pd-$program:$version-${layout##*-}" --layout "$layout"
    done
    image push-index "$REGISTRY/pd-$program:$version" --index "$folder/pd-$program-$version.index.json"
done
helm push "$folder/envoy-pd-$version.tgz" "oci://$REGISTRY/charts" ${PLAIN_HTTP:+--plain-http}
