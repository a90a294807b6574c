//! Which pod each endpoint is, and which pods were left out: for people and metrics, not for filters.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use pd_core::wire::EndpointId;

use crate::sources::kubernetes::pod::PodName;

/// The newest view.
#[derive(Debug, Default)]
pub struct Pods(RwLock<Arc<PodsView>>);

/// What became of each pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodsView {
    /// The pod of each endpoint.
    pub names: BTreeMap<EndpointId, PodName>,
    /// Pods that say something wrong, and what.
    pub refused: BTreeMap<PodName, String>,
    /// Engines without an address yet.
    pub pending: usize,
    /// What is followed.
    pub watches: Vec<WatchView>,
}

/// One kind of object in one namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct WatchView {
    /// `pods in NAMESPACE`.
    pub name: String,
    /// Whether they were listed once.
    pub is_listed: bool,
    /// Why what is known of them may be old.
    pub problem: Option<String>,
}

impl Pods {
    /// The newest view.
    #[must_use]
    pub fn view(&self) -> Arc<PodsView> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes a view; returns the pods that are refused for a reason that is new.
    pub fn set(&self, view: PodsView) -> Vec<(PodName, String)> {
        let mut present = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let is_new = |(name, reason): &(&PodName, &String)| present.refused.get(name) != Some(reason);
        let refused = view.refused.iter().filter(is_new).map(|(name, reason)| (name.clone(), reason.clone())).collect();
        *present = Arc::new(view);
        refused
    }
}
