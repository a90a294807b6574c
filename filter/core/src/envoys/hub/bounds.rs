//! Bounds of what a hub keeps. Together they fit into the container's memory limit that the manifests set (256 MiB), beside
//! requests in flight, which `pd-control` bounds.
//!
//! Beyond a bound, the host whose Envoys have the most loses records. So a client that makes up a thousand Envoys gets no more
//! than one host.

use hashbrown::HashMap;

use super::{Gateway, Hub};

/// Most Envoys that a hub remembers. An Envoy that is gone counts until the hub drops its blocks.
const MAX_GATEWAYS: usize = 1_024;
/// Most bytes of block events of all Envoys together, with the overhead of each.
const MAX_LOG_BYTES: usize = 24 << 20;
/// Most endpoints in the loads of all Envoys together: 40 bytes each, and as much again in the sums.
const MAX_ALL_LOADS: usize = 1 << 18;
/// Most bytes of the reports of all Envoys together.
const MAX_ALL_REPORT_BYTES: usize = 8 << 20;

/// The part of one bound that the Envoys of one host use.
#[derive(Clone, Copy, Default)]
struct Share {
    all: usize,
    /// The largest part of one Envoy, and its number.
    most: usize,
    gateway: u64,
}

impl Hub {
    /// Makes room for an unknown Envoy. The hub forgets the Envoy that has been gone longest, else one of the host that has
    /// the most Envoys. `false` where no host has more Envoys than the host `origin`.
    pub(super) fn make_room(&mut self, gateway: u64, origin: u64) -> bool {
        if self.gateways.len() < MAX_GATEWAYS || self.gateways.contains_key(&gateway) {
            return true;
        }
        let oldest = |only_gone: bool, origin: Option<u64>| {
            let those = self.gateways.iter().filter(|(_, of)| of.is_gone || !only_gone);
            let those = those.filter(|(_, of)| origin.is_none_or(|origin| origin == of.origin));
            those.min_by_key(|(_, of)| of.last_seen).map(|(id, _)| *id)
        };
        let victim = oldest(true, None).or_else(|| {
            let mut counts: HashMap<u64, usize> = HashMap::new();
            for of in self.gateways.values() {
                let count = counts.entry(of.origin).or_default();
                *count = count.saturating_add(1);
            }
            let own = counts.get(&origin).copied().unwrap_or(0);
            let (most, count) = counts.into_iter().max_by_key(|(origin, count)| (*count, *origin))?;
            (count > own.saturating_add(1)).then(|| oldest(false, Some(most))).flatten()
        });
        let Some(victim) = victim else { return false };
        if let Some(mut of) = self.gateways.remove(&victim)
            && !of.is_gone
        {
            of.retract(&mut self.sums);
            self.changes = self.changes.wrapping_add(1);
        }
        true
    }

    /// Forgets block events, loads and reports until all are within their bounds.
    pub(super) fn shorten(&mut self) {
        self.shorten_logs();
        self.shorten_loads();
        self.shorten_reports();
    }

    fn shorten_logs(&mut self) {
        let size = |gateway: &Gateway| gateway.log.bytes();
        while self.total(size) > MAX_LOG_BYTES {
            let Some(log) = self.heaviest(size).map(|gateway| &mut gateway.log) else { return };
            // An eighth at a time: to look for the heaviest costs more than to forget an event.
            let target = log.bytes().saturating_sub(log.bytes() / 8).saturating_sub(1);
            while log.bytes() > target && log.forget_oldest() {}
        }
    }

    fn shorten_loads(&mut self) {
        let size = |gateway: &Gateway| gateway.loads.len();
        while self.total(size) > MAX_ALL_LOADS {
            let mut sums = core::mem::take(&mut self.sums);
            if let Some(most) = self.heaviest(size) {
                let half = most.loads.len() / 2;
                let loads = most.loads.iter().take(half).copied().collect();
                most.load(&mut sums, loads);
                most.changes = most.changes.wrapping_add(1);
            }
            self.sums = sums;
            self.changes = self.changes.wrapping_add(1);
        }
    }

    fn shorten_reports(&mut self) {
        let size = |gateway: &Gateway| gateway.report.len();
        while self.total(size) > MAX_ALL_REPORT_BYTES {
            let Some(heaviest) = self.heaviest(size) else { return };
            heaviest.report = Vec::new();
        }
    }

    fn total(&self, size: impl Fn(&Gateway) -> usize) -> usize {
        self.gateways.values().map(size).fold(0, usize::saturating_add)
    }

    /// The Envoy that has the most, of the host whose Envoys have the most. Of several, one that is the same in each run.
    fn heaviest(&mut self, size: impl Fn(&Gateway) -> usize) -> Option<&mut Gateway> {
        let mut hosts: HashMap<u64, Share> = HashMap::new();
        for (id, gateway) in &self.gateways {
            let host = hosts.entry(gateway.origin).or_default();
            let size = size(gateway);
            host.all = host.all.saturating_add(size);
            if size >= host.most {
                (host.most, host.gateway) = (size, *id);
            }
        }
        let (_, share) = hosts.into_iter().max_by_key(|(origin, share)| (share.all, *origin))?;
        self.gateways.get_mut(&share.gateway)
    }
}
