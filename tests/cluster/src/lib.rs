//! A Kubernetes control plane on one Linux machine without containers: the real etcd, kube-apiserver and
//! kube-controller-manager, and a node that runs pods as processes. Enough to install Envoy Gateway by its own chart and
//! to apply our manifests.
//!
//! Everything lives in namespaces of one process (network, mounts, processes), so that its end, whatever it is, ends
//! everything. Needs root, and the programs that `tests/cluster/programs/build.sh` builds.
#![forbid(unsafe_code)]

pub mod api;
pub mod control_plane;
pub mod dns;
pub mod namespaces;
pub mod network;
pub mod node;
pub mod pki;
pub mod program;
pub mod registry;
pub mod schema;
pub mod services;
