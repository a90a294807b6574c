#!/usr/bin/env bash
# Builds what the cluster of tests consists of from published Go modules, where it is missing, and prints the folder:
#
#     tests/cluster/programs/build.sh [--is-built]
#
# etcd, kube-apiserver, kube-controller-manager, kubectl, helm, Envoy Gateway and its chart go to .cache/cluster-VERSION/.
# From nothing that takes about ten minutes on two cores and 4 GB of disk in Go's caches.
# PD_ENVOY_GATEWAY_VERSION is another version of Envoy Gateway, or `latest`. It shares the other programs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

gateway=${PD_ENVOY_GATEWAY_VERSION:-$(<tests/cluster/programs/envoy-gateway.version)}
[ "$gateway" != latest ] || gateway=$(go list -m -f '{{.Version}}' github.com/envoyproxy/gateway@latest)
helm=v3.18.6
sources=$(cat tests/cluster/programs/{build.sh,go.mod,go.sum} | sha256sum | cut -c1-8)
directory=$PWD/.cache/cluster-$gateway-$sources

source tests/cluster/programs/once.sh
once "$directory" "etcd, Kubernetes, helm and Envoy Gateway $gateway" "$@"
export GOBIN=$directory
# The others are those of another version of Envoy Gateway, where there is one.
for other in .cache/cluster-*-"$sources"/complete; do
    [ ! -e "$other" ] || (cd "${other%/complete}" && cp -l etcd kube-apiserver kube-controller-manager kubectl helm "$directory/")
done
(
    cd tests/cluster/programs
    # Without a version, the API server says v0.0.0, and helm refuses charts that need a newer one.
    version=$(sed -n 's#^\tk8s.io/kubernetes \(v.*\)$#\1#p' go.mod)
    IFS=. read -r major minor _ <<<"${version#v}"
    package=k8s.io/component-base/version
    flags="-X $package.gitVersion=$version -X $package.gitMajor=$major -X $package.gitMinor=$minor"
    [ -e "$directory/etcd" ] || go build -o "$directory/etcd" ./etcd
    for program in kube-apiserver kube-controller-manager kubectl; do
        [ -e "$directory/$program" ] || go build -ldflags "$flags" -o "$directory/$program" "k8s.io/kubernetes/cmd/$program"
    done
)
[ -e "$directory/helm" ] || go install "helm.sh/helm/v3/cmd/helm@$helm"
go install "github.com/envoyproxy/gateway/cmd/envoy-gateway@$gateway"

# The chart is in Envoy Gateway's module; its release fills two variables of the values.
module=$(go mod download -json "github.com/envoyproxy/gateway@$gateway" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
rm -rf "$directory/eg-chart"
cp -r "$module/charts/gateway-helm" "$directory/eg-chart"
chmod -R u+w "$directory/eg-chart"
sed -e "s#\${GatewayImage}#docker.io/envoyproxy/gateway:$gateway#; s#\${GatewayImagePullPolicy}#IfNotPresent#" \
    "$directory/eg-chart/values.tmpl.yaml" >"$directory/eg-chart/values.yaml"
touch "$directory/complete"
echo "$directory"
