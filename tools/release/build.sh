#!/usr/bin/env bash
# Builds a release from the tree as it is and packs it: `make release` calls it.
#
#     [REGISTRY=registry.example] [KEY=private.pem] tools/release/build.sh OUTPUT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
output=$1
die() { echo "release: $*" >&2; exit 1; }

[ -n "${ALLOW_DIRTY:-}" ] || [ -z "$(git status --porcelain)" ] || die "the tree has changes; commit them, or say ALLOW_DIRTY=1"
VERSION=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
COMMIT=$(git rev-parse HEAD)
# The commit's time: the archives' time does not depend on when they are made.
EPOCH=$(git log -1 --format=%ct)
export VERSION COMMIT EPOCH SOURCE_DATE_EPOCH=$EPOCH CI=true

input=target/release-input
rm -rf "$input" "$output"
mkdir -p "$input"
make image
cp -r target/image "$input/filter"
for target in amd64=x86_64-unknown-linux-musl arm64=aarch64-unknown-linux-musl; do
    make image-control MUSL="${target#*=}"
    cp -r target/image-control "$input/control-${target%%=*}"
    make image-sim MUSL="${target#*=}"
    cp -r target/image-sim "$input/sim-${target%%=*}"
done

# Each package's dependencies for its platform. The tool writes beside the manifests.
cyclonedx=.cache/cargo-cyclonedx-0.5.9
[ -x "$cyclonedx/bin/cargo-cyclonedx" ] || cargo install --quiet --locked --root "$cyclonedx" cargo-cyclonedx@0.5.9
for package in filter=wasm32-wasip1 control=x86_64-unknown-linux-musl tools/sim=x86_64-unknown-linux-musl; do
    PATH="$cyclonedx/bin:$PATH" cargo cyclonedx --quiet --format json --target "${package#*=}" --override-filename release.cdx
    folder=${package%%=*}
    # A random serial number would make every SBOM another one, and folders are not its business.
    python3 - "$folder/release.cdx.json" "$PWD" >"$input/pd-${folder##*/}-$VERSION.cdx.json" <<'PYTHON'
import json, sys
text = open(sys.argv[1]).read().replace(sys.argv[2], "/envoy-pd")
bom = json.loads(text)
bom.pop("serialNumber", None)
print(json.dumps(bom, indent=1, sort_keys=True))
PYTHON
    find . -name release.cdx.json -not -path './target/*' -delete
done
tools/release/pack.sh "$input" "$output"
