#!/usr/bin/env bash
# Packs what was built into a release, the same bytes for the same input:
#
#     VERSION=0.1.0 COMMIT=… EPOCH=… [REGISTRY=registry.example] [KEY=private.pem] tools/release/pack.sh INPUT OUTPUT
#
# INPUT has OCI layouts (filter, control-amd64, control-arm64, sim-amd64, …) and SBOMs (*.cdx.json). OUTPUT gets them as archives, an index
# of each program's images, the chart with the images' digests, SHA256SUMS, a provenance statement and, with KEY (Ed25519, PEM), a signature of SHA256SUMS.
set -euo pipefail
input=$(realpath "$1")
mkdir -p "$2"
output=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export LC_ALL=C TZ=UTC
umask 022
registry=${REGISTRY:-registry.example}
[ -z "$(ls -A "$output")" ] || { echo "release: $output is not empty" >&2; exit 1; }

# An archive without traces of the machine: names in order, one time, no owner, plain modes. Links are followed.
archive() { # FOLDER NAME
    tar --create --dereference --directory "$1" --sort=name --format=ustar --owner=0 --group=0 --numeric-owner \
        --mtime="@$EPOCH" --mode='u+rw,go+r,go-w,a+X,a-s' "$2"
}
digest() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["manifests"][0]["digest"])' "$1/index.json"; }

# An index of a program's images, one for each architecture.
index() { # LAYOUT…
    python3 - "$@" <<'PYTHON'
import json, os, sys

def blob(layout, digest):
    return json.load(open(os.path.join(layout, "blobs/sha256", digest.removeprefix("sha256:"))))

manifests = []
for layout in sys.argv[1:]:
    manifest = json.load(open(layout + "/index.json"))["manifests"][0]
    config = blob(layout, blob(layout, manifest["digest"])["config"]["digest"])
    manifests.append({**manifest, "platform": {"architecture": config["architecture"], "os": config["os"]}})
kind = "application/vnd.oci.image.index.v1+json"
print(json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": manifests}, sort_keys=True))
PYTHON
}

filter=$registry/pd-filter@$(digest "$input/filter")
programs=()
for program in control sim; do
    file=$output/pd-$program-$VERSION.index.json
    index "$input/$program"-*/ >"$file"
    programs+=("$program=$registry/pd-$program@sha256:$(sha256sum <"$file" | cut -c1-64)")
done
control=${programs[0]#*=} simulator=${programs[1]#*=}
for layout in "$input"/*/; do
    name=$(basename "$layout")
    archive "$input" "$name" >"$output/pd-$name-$VERSION.oci.tar"
    case $name in *-*) programs+=("$name=$registry/pd-${name%%-*}@$(digest "$layout")") ;; esac
done
printf '%s\n' "filter=$filter" "${programs[@]}" >"$output/images.env"

# The chart names all images by digest. Images of programs differ by architecture, so it names the index of both.
staged=$(mktemp -d)
trap 'rm -rf "$staged"' EXIT
cp -rL charts/envoy-pd "$staged/envoy-pd"
rm -rf "$staged/envoy-pd/ci"
sed -i -e "s#^  filter: .*#  filter: $filter#" -e "s#^  control: .*#  control: $control#" \
    -e "s#^  simulator: .*#  simulator: $simulator#" "$staged/envoy-pd/values.yaml"
sed -i -e "s#^version: .*#version: $VERSION#" -e "s#^appVersion: .*#appVersion: $VERSION#" "$staged/envoy-pd/Chart.yaml"
archive "$staged" envoy-pd | gzip -9 --no-name >"$output/envoy-pd-$VERSION.tgz"

cp "$input"/*.cdx.json "$output/"

cd "$output"
sha256sum -- * >"$staged/subjects"
python3 - "$staged/subjects" >"$staged/provenance" <<'PYTHON'
import json, os, sys
subjects = [line.split() for line in open(sys.argv[1])]
source = "https://github.com/envoy-pd/envoy-pd"
statement = {
    "_type": "https://in-toto.io/Statement/v1",
    "subject": [{"name": name, "digest": {"sha256": digest}} for digest, name in subjects],
    "predicateType": "https://slsa.dev/provenance/v1",
    "predicate": {
        "buildDefinition": {
            "buildType": source + "/blob/main/docs/release.md#what-is-in-a-release",
            "externalParameters": {"version": os.environ["VERSION"], "registry": os.environ.get("REGISTRY", "registry.example")},
            "resolvedDependencies": [{"uri": "git+" + source, "digest": {"gitCommit": os.environ["COMMIT"]}}],
        },
        "runDetails": {"builder": {"id": os.environ.get("BUILDER", source + "#make-release")}},
    },
}
print(json.dumps(statement, indent=1, sort_keys=True))
PYTHON
mv "$staged/provenance" "provenance-$VERSION.intoto.json"
sha256sum -- * >"$staged/sums"
mv "$staged/sums" SHA256SUMS
chmod 644 -- *
if [ -n "${KEY:-}" ]; then
    openssl pkeyutl -sign -rawin -inkey "$KEY" -in SHA256SUMS -out SHA256SUMS.sig
else
    echo 'release: NOT SIGNED, name an Ed25519 key: KEY=private.pem' >&2
fi
cat SHA256SUMS
