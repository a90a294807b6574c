#!/usr/bin/env bash
# Checks a release, and exits with 1 at the first thing that is wrong:
#
#     [PUB=public.pem] tools/release/verify.sh FOLDER
#
# The signature of SHA256SUMS (with PUB), every sum and no file beside them, the provenance's subjects, the images' digests in
# the chart and in images.env, and that each SBOM lists components.
set -euo pipefail
cd "$1"
export LC_ALL=C
fail() { echo "release: $*" >&2; exit 1; }

[ -f SHA256SUMS ] || fail "there is no SHA256SUMS"
if [ -n "${PUB:-}" ]; then
    [ -f SHA256SUMS.sig ] || fail "there is no signature"
    openssl pkeyutl -verify -rawin -pubin -inkey "$PUB" -in SHA256SUMS -sigfile SHA256SUMS.sig >/dev/null ||
        fail "the signature is not that of $PUB"
    echo "release: signed by $PUB"
else
    echo 'release: SIGNATURE NOT CHECKED, name the public key: PUB=public.pem' >&2
fi
[ -z "$(find . -type l)" ] || fail "there are links:" $(find . -type l)
sha256sum --check --strict --quiet SHA256SUMS >&2 || fail "a file is not what SHA256SUMS says"
beside=$(comm -3 <(cut -c67- SHA256SUMS | sort) <(find . -mindepth 1 ! -name SHA256SUMS ! -name SHA256SUMS.sig -printf '%P\n' | sort))
[ -z "$beside" ] || fail "files that SHA256SUMS does not name:" $beside

python3 - <<'PYTHON' || exit 1
import glob, hashlib, io, json, sys, tarfile

def fail(text):
    sys.exit("release: " + text)

def only(pattern):
    found = glob.glob(pattern)
    if len(found) != 1:
        fail(f"{len(found)} files are named {pattern}")
    return found[0]

sums = dict(reversed(line.split()) for line in open("SHA256SUMS"))
provenance = only("provenance-*.intoto.json")
subjects = {it["name"]: it["digest"]["sha256"] for it in json.load(open(provenance))["subject"]}
if subjects != {name: digest for name, digest in sums.items() if name != provenance}:
    fail(f"{provenance} does not name these files")

digests = {}
for name in sorted(glob.glob("*.oci.tar")):
    with tarfile.open(name) as tar:
        files = {member.name.split("/", 1)[1]: tar.extractfile(member).read() for member in tar if member.isfile()}
    digest = json.loads(files["index.json"])["manifests"][0]["digest"]
    digests[name] = digest
    for path, content in files.items():
        if path.startswith("blobs/sha256/") and hashlib.sha256(content).hexdigest() != path.rsplit("/", 1)[1]:
            fail(f"{name}: {path} has another digest")
    if "blobs/sha256/" + digest.removeprefix("sha256:") not in files:
        fail(f"{name}: the manifest is missing")

images = dict(line.strip().split("=", 1) for line in open("images.env"))
for name, image in images.items():
    if name in ("control", "sim"):
        index = only(f"pd-{name}-*.index.json")
        content = open(index, "rb").read()
        if image.rsplit("@", 1)[1] != "sha256:" + hashlib.sha256(content).hexdigest():
            fail(f"images.env: {name} is not {index}")
        for of in json.loads(content)["manifests"]:
            archive = only(f"pd-{name}-{of['platform']['architecture']}-*.oci.tar")
            if of["digest"] != digests[archive]:
                fail(f"{index}: {of['platform']['architecture']} is not {archive}")
        continue
    archive = only(f"pd-{name}-*.oci.tar")
    if image.rsplit("@", 1)[1] != digests[archive]:
        fail(f"images.env: {name} is not {archive}")

chart = only("envoy-pd-*.tgz")
with tarfile.open(chart) as tar:
    values = tar.extractfile("envoy-pd/values.yaml").read().decode()
for key, name in (("filter", "filter"), ("control", "control"), ("simulator", "sim")):
    if f"  {key}: {images[name]}\n" not in values:
        fail(f"{chart}: its {key} is not {images[name]}")

for name in glob.glob("*.cdx.json"):
    bom = json.load(open(name))
    if bom.get("bomFormat") != "CycloneDX" or not bom.get("components"):
        fail(f"{name}: no CycloneDX list of components")
if not glob.glob("*.cdx.json"):
    fail("there is no SBOM")
PYTHON
echo "release: $(wc -l <SHA256SUMS) files are as they should be"
