//! The pod of each endpoint and the pods that pd-control refused, for the status page and the metrics. Filters do not
//! get it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use pd_core::wire::EndpointId;

use crate::sources::kubernetes::pod::PodName;

/// The newest view of the pods.
#[derive(Debug, Default)]
pub struct Pods(RwLock<Arc<PodsView>>);

/// A view of the pods.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodsView {
    /// The pod of each endpoint.
    pub names: BTreeMap<EndpointId, PodName>,
    /// Pods that pd-control refused, with the reason.
    pub refused: BTreeMap<PodName, String>,
    /// Number of engine pods without an address.
    pub pending: usize,
    /// One line for each pool and role whose endpoints are unready and stay in the list.
    pub busy: Vec<String>,
    /// The watches.
    pub watches: Vec<WatchView>,
}

/// A watch of one kind of object in one namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct WatchView {
    /// `pods in NAMESPACE`.
    pub name: String,
    /// Whether the objects were listed.
    pub is_listed: bool,
    /// Why the view of the objects may be old; none: it is up to date.
    pub problem: Option<String>,
}

impl Pods {
    /// The newest view.
    #[must_use]
    pub fn view(&self) -> Arc<PodsView> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the view; returns the refused pods whose reason is new.
    pub fn set(&self, view: PodsView) -> Vec<(PodName, String)> {
        let mut present = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let is_new = |(name, reason): &(&PodName, &String)| present.refused.get(name) != Some(reason);
        let refused = view.refused.iter().filter(is_new).map(|(name, reason)| (name.clone(), reason.clone())).collect();
        *present = Arc::new(view);
        refused
    }
}
