#!/usr/bin/env bash
# Builds KEDA and prometheus-adapter from their published Go modules, where they are missing, and prints the folder:
#
#     tests/cluster/programs/build-keda.sh [--is-built]
#
# KEDA's operator, its metrics server and its manifests, and prometheus-adapter go to .cache/keda-VERSION-HASH/.
#
# KEDA has more than 70 scalers, with the client libraries of as many services. The build leaves out all but those that the tests
# use. Nothing else of KEDA is changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

version=$(<tests/cluster/programs/keda.version)
adapter=v0.12.0
directory=$PWD/.cache/keda-$version-$(cat tests/cluster/programs/build-keda.sh | sha256sum | cut -c1-8)

source tests/cluster/programs/once.sh
once "$directory" "KEDA $version and prometheus-adapter $adapter" "$@"
folder() { go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'; }

source=$directory/source
rm -rf "$source"
cp -r "$(folder "github.com/kedacore/keda/v2@$version")" "$source"
chmod -R u+w "$source"
python3 - "$source" <<'PYTHON'
import pathlib, re, sys
module = pathlib.Path(sys.argv[1])
kept = {"external", "external-push", "prometheus"}
builder = module / "pkg/scaling/scalers_builder.go"
before, cases, after = re.split(r"(?<=// TRIGGERS-START\n)|(?=\t// TRIGGERS-END)", builder.read_text())
name = lambda block: re.match(r'\tcase "([^"]+)"', block)
blocks = re.split(r"(?m)^(?=\tcase |\tdefault:)", cases)
builder.write_text(before + "".join(it for it in blocks if not name(it) or name(it)[1] in kept) + after)
# One of the others defines what these use.
shared = r"(?m)^\s*(externalMetricType\s*=.*)$"
for file in (module / "pkg/scalers").glob("*_scaler.go"):
    if file.name in ("external_scaler.go", "prometheus_scaler.go"):
        continue
    if found := re.search(shared, file.read_text()):
        (module / "pkg/scalers/shared.go").write_text(f"package scalers\n\nconst {found[1]}\n")
    file.unlink()
PYTHON
# In the modules' own folders, with the dependencies that they name.
for program in keda=operator keda-metrics-apiserver=adapter; do
    (cd "$source" && go build -o "$directory/${program%%=*}" "./cmd/${program#*=}")
done
(cd "$(folder "sigs.k8s.io/prometheus-adapter@$adapter")" && go build -o "$directory/prometheus-adapter" ./cmd/adapter)
rm -rf "$directory/config"
mv "$source/config" "$directory/config"
rm -rf "$source"
touch "$directory/complete"
echo "$directory"
