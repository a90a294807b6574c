//! Requests that wait and that run, as the engine counts them.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};

use crate::engine::Pod;
use crate::request::Generation;

/// Counts a request as waiting, then as running.
pub(crate) struct Presence {
    pod: Arc<Pod>,
    adapter: Option<String>,
    running: bool,
}

impl Presence {
    pub(crate) fn waiting(pod: &Arc<Pod>, generation: &Generation) -> Self {
        pod.waiting.fetch_add(1, Relaxed);
        let adapter = pod.loras().contains(&generation.model).then(|| generation.model.clone());
        let presence = Self { pod: Arc::clone(pod), adapter, running: false };
        presence.adapter(|counts| counts.1 += 1);
        presence
    }

    /// The engine has begun; later calls change nothing.
    pub(crate) fn run(&mut self) {
        if self.running {
            return;
        }
        self.running = true;
        self.pod.waiting.fetch_sub(1, Relaxed);
        self.pod.running.fetch_add(1, Relaxed);
        self.adapter(|counts| {
            counts.1 -= 1;
            counts.0 += 1;
        });
    }

    fn adapter(&self, change: impl Fn(&mut (u64, u64))) {
        if let Some(name) = &self.adapter {
            change(self.pod.adapters.lock().unwrap_or_else(PoisonError::into_inner).entry(name.clone()).or_default());
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        if self.running {
            self.pod.running.fetch_sub(1, Relaxed);
            self.adapter(|counts| counts.0 -= 1);
        } else {
            self.pod.waiting.fetch_sub(1, Relaxed);
            self.adapter(|counts| counts.1 -= 1);
        }
    }
}
