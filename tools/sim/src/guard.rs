//! Counting generation requests in flight.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use crate::engine::Pod;

/// Counts a generation request as in flight, and as left by its client unless it is finished.
pub(crate) struct Guard {
    pod: Arc<Pod>,
    finished: bool,
}

impl Guard {
    pub(crate) fn new(pod: &Arc<Pod>) -> Self {
        pod.stats.add(&pod.stats.in_flight, 1);
        Self { pod: Arc::clone(pod), finished: false }
    }

    pub(crate) fn finish(&mut self) {
        self.finished = true;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let stats = &self.pod.stats;
        stats.in_flight.fetch_sub(1, Relaxed);
        if !self.finished {
            stats.client_disconnects.fetch_add(1, Relaxed);
        }
        stats.touch();
    }
}
