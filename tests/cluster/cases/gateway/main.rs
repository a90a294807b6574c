//! Our manifests on a real cluster with Envoy Gateway: `make test-cluster`, or `KUBECONFIG` and `PD_CLUSTER_REGISTRY` of
//! a cluster that has one. The tests share the cluster, so they run one after another.

mod aibrix;
mod cluster;
mod engine_pods;
mod families;
mod inference;
mod listener;
mod llm_d;
mod matrix;
mod operation;
mod policies;
mod registry;
mod replicas;
mod requests;
mod rollout;
mod texts;
mod traffic;
