// A control plane for Envoys with the filter, on go-control-plane: it serves the files that envoy/deploy/render.sh writes.
//
//	xds --config /etc/envoy-pd --eds /var/lib/envoy-pd/eds/eds.json --listen 127.0.0.1:18000
//
// Listeners (LDS), their routes (RDS), clusters (CDS) and the engines' hosts (EDS) go to every Envoy that asks, over one stream
// (ADS). A changed file is served within half a second. A file that is no valid resource is logged, and what was served before stays.
package main

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	manager "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"sigs.k8s.io/yaml"

	// Types that the files name.
	_ "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/filters/cel/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/buffer/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/wasm/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/http/early_header_mutation/header_mutation/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/least_request/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/override_host/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	_ "google.golang.org/protobuf/types/known/wrapperspb"
)

// Every Envoy gets the same.
type all struct{}

func (all) ID(*core.Node) string { return "all" }

// From where Envoy takes routes and hosts: the stream on which it got the listener and the cluster.
var ads = &core.ConfigSource{
	ResourceApiVersion:    core.ApiVersion_V3,
	ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}},
}

func main() {
	config := flag.String("config", "/etc/envoy-pd", "folder with lds/lds.yaml and cds/cds.yaml")
	eds := flag.String("eds", "/var/lib/envoy-pd/eds/eds.json", "file with the engines' hosts, which pd-control writes")
	address := flag.String("listen", "127.0.0.1:18000", "address for Envoys")
	flag.Parse()

	files := []string{filepath.Join(*config, "lds/lds.yaml"), filepath.Join(*config, "cds/cds.yaml"), *eds}
	snapshots := cache.NewSnapshotCache(true, all{}, nil)
	go follow(snapshots, files)

	socket, err := net.Listen("tcp", *address)
	if err != nil {
		log.Fatal(err)
	}
	envoys := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(envoys, server.NewServer(context.Background(), snapshots, nil))
	log.Printf("serving %v on %s", files, *address)
	log.Fatal(envoys.Serve(socket))
}

// Serves what the files have, again whenever they have changed.
func follow(snapshots cache.SnapshotCache, files []string) {
	seen := ""
	for ; ; time.Sleep(500 * time.Millisecond) {
		contents, version, err := read(files)
		if err == nil && version == seen {
			continue
		}
		var next *cache.Snapshot
		if err == nil {
			next, err = snapshot(contents, version)
		}
		if err == nil {
			err = snapshots.SetSnapshot(context.Background(), all{}.ID(nil), next)
		}
		if err != nil {
			// A file that is being written comes again in half a second.
			if version != seen {
				log.Printf("not served: %v", err)
			}
		} else {
			log.Printf("version %s", version)
		}
		seen = version
	}
}

// The files' contents, and a text that is another one when they are.
func read(files []string) ([][]byte, string, error) {
	contents, sum := make([][]byte, len(files)), sha256.New()
	for i, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, err.Error(), err
		}
		contents[i] = content
		fmt.Fprintf(sum, "%d\n%s", len(content), content)
	}
	return contents, fmt.Sprintf("%x", sum.Sum(nil)[:6]), nil
}

func snapshot(contents [][]byte, version string) (*cache.Snapshot, error) {
	var all [][]types.Resource
	for _, content := range contents {
		resources, err := resources(content)
		if err != nil {
			return nil, err
		}
		all = append(all, resources)
	}
	var routes []types.Resource
	for _, it := range all[0] {
		found, err := takeRoutes(it)
		if err != nil {
			return nil, err
		}
		routes = append(routes, found...)
	}
	for _, it := range all[1] {
		if cluster, ok := it.(*cluster.Cluster); ok && cluster.EdsClusterConfig != nil {
			cluster.EdsClusterConfig.EdsConfig = ads
		}
	}
	snapshot, err := cache.NewSnapshot(version, map[resource.Type][]types.Resource{
		resource.ListenerType: all[0], resource.RouteType: routes, resource.ClusterType: all[1], resource.EndpointType: all[2],
	})
	if err != nil {
		return nil, err
	}
	return snapshot, snapshot.Consistent()
}

// The resources of a file in the form that Envoy reads from files.
func resources(content []byte) ([]types.Resource, error) {
	json, err := yaml.YAMLToJSON(content)
	if err != nil {
		return nil, err
	}
	var file discovery.DiscoveryResponse
	if err := protojson.Unmarshal(json, &file); err != nil {
		return nil, err
	}
	var resources []types.Resource
	for _, it := range file.Resources {
		message, err := it.UnmarshalNew()
		if err != nil {
			return nil, err
		}
		resources = append(resources, message)
	}
	return resources, nil
}

// Takes the routes out of a listener, as resources of their own: then a change of routes leaves the listener alone.
func takeRoutes(it proto.Message) ([]types.Resource, error) {
	var routes []types.Resource
	gateway, ok := it.(*listener.Listener)
	if !ok {
		return nil, fmt.Errorf("%T is no listener", it)
	}
	for _, chain := range gateway.FilterChains {
		for _, filter := range chain.Filters {
			var http manager.HttpConnectionManager
			if filter.GetTypedConfig().UnmarshalTo(&http) != nil || http.GetRouteConfig() == nil {
				continue
			}
			config := http.GetRouteConfig()
			routes = append(routes, config)
			http.RouteSpecifier = &manager.HttpConnectionManager_Rds{
				Rds: &manager.Rds{RouteConfigName: config.Name, ConfigSource: ads},
			}
			changed, err := anypb.New(&http)
			if err != nil {
				return nil, err
			}
			filter.ConfigType = &listener.Filter_TypedConfig{TypedConfig: changed}
		}
	}
	return routes, nil
}
