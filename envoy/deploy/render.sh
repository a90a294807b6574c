#!/usr/bin/env bash
# Writes Envoy's configuration for a deployment, from envoy/local.yaml, as files that Envoy follows while it runs:
#
#     envoy/deploy/render.sh DIRECTORY
#
#     DIRECTORY/envoy.yaml       bootstrap: files below
#     DIRECTORY/envoy-xds.yaml   bootstrap: a server that speaks xDS, such as envoy/deploy/xds
#     DIRECTORY/lds/lds.yaml     listener with TLS, routes and filter
#     DIRECTORY/cds/cds.yaml     clusters
#     DIRECTORY/tls/sds.yaml     where the certificate and its key are
#
# Variables, with defaults:
#
#     PD_CONFIG=/etc/envoy-pd                             where DIRECTORY will be
#     PD_MODULE=/usr/local/lib/envoy-pd/pd_filter.wasm
#     PD_EDS=/var/lib/envoy-pd/eds/eds.json               the engines' hosts, which pd-control writes
#     PD_LISTEN=0.0.0.0:8443  PD_ADMIN=127.0.0.1:9901  PD_CONTROL=127.0.0.1:9000  PD_XDS=127.0.0.1:18000
set -euo pipefail

directory=${1:?usage: envoy/deploy/render.sh DIRECTORY}
source=$(dirname "${BASH_SOURCE[0]}")/../local.yaml
config=${PD_CONFIG:-/etc/envoy-pd}
module=${PD_MODULE:-/usr/local/lib/envoy-pd/pd_filter.wasm}
eds=${PD_EDS:-/var/lib/envoy-pd/eds/eds.json}

# An IPv4 address with port, in Envoy's form.
socket() { echo "{socket_address: {address: ${1%:*}, port_value: ${1##*:}}}"; }
# Lines of local.yaml from one pattern up to another; the last one is not among them.
between() { awk -v from="$1" -v to="$2" '$0 ~ to {on = 0} on; $0 ~ from {on = 1}' "$source"; }
# The items of a list as resources of a type.
resources() {
    echo 'resources:'
    sed -e 's/^  //' -e "s#^- name: #- '@type': type.googleapis.com/envoy.config.$1\n  name: #"
}
# A file that Envoy follows. It watches the folder, because editors and Kubernetes replace files.
watched() { echo "{path_config_source: {path: $1, watched_directory: {path: ${1%/*}}}, resource_api_version: V3}"; }

tls="    - transport_socket:\\
        name: envoy.transport_sockets.tls\\
        typed_config:\\
          '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext\\
          common_tls_context:\\
            alpn_protocols: [h2, http/1.1]\\
            tls_certificate_sds_secret_configs:\\
            - {name: server, sds_config: $(watched "$config/tls/sds.yaml")}\\
      filters:"

mkdir -p "$directory"/{lds,cds,tls}
# The list of endpoints comes from pd-control; requests that come before it, after a hot restart, wait. No client is trusted.
between '^  listeners:' '^  clusters:' | sed -e '/"endpoints": \[/,/\],/d' -e '/"trusted_headers"/d' \
    -e 's/"uncached_tokens": 256}}}/"uncached_tokens": 256}, "queue": {"no_endpoint_ms": 10000}}}/' \
    -e "s#^    address: {socket_address.*#    address: $(socket "${PD_LISTEN:-0.0.0.0:8443}")#" \
    -e "s#filename: [^}]*pd_filter.wasm#filename: $module#" -e "s#^    - filters:#$tls#" |
    resources listener.v3.Listener >"$directory/lds/lds.yaml"
between '^  clusters:' '^$never' | sed -e "s#{path: envoy/eds.json, .*#{path: $eds, watched_directory: {path: ${eds%/*}}}#" \
    -e "s#{socket_address: {address: 127.0.0.1, port_value: 9000}}#$(socket "${PD_CONTROL:-127.0.0.1:9000}")#" |
    resources cluster.v3.Cluster >"$directory/cds/cds.yaml"
cat >"$directory/tls/sds.yaml" <<YAML
resources:
- '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
  name: server
  tls_certificate:
    certificate_chain: {filename: $config/tls/cert.pem}
    private_key: {filename: $config/tls/key.pem}
    watched_directory: {path: $config/tls}
YAML

# The node's name and cluster are options of the command line: the unit has the host's name.
common() {
    echo "admin: {address: $(socket "${PD_ADMIN:-127.0.0.1:9901}")}"
    echo 'stats_config:'
    between '^stats_config:' '^$'
}
{
    common
    cat <<YAML
dynamic_resources:
  lds_config: $(watched "$config/lds/lds.yaml")
  cds_config: $(watched "$config/cds/cds.yaml")
YAML
} >"$directory/envoy.yaml"
{
    common
    xds=${PD_XDS:-127.0.0.1:18000}
    cat <<YAML
dynamic_resources:
  lds_config: {ads: {}, resource_api_version: V3}
  cds_config: {ads: {}, resource_api_version: V3}
  ads_config: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}
static_resources:
  clusters:
  - name: xds
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {connection_keepalive: {interval: 10s, timeout: 5s}}}
    load_assignment:
      cluster_name: xds
      endpoints: [{lb_endpoints: [{endpoint: {address: $(socket "$xds")}}]}]
YAML
} >"$directory/envoy-xds.yaml"
