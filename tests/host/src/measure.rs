//! Cost of a scripted request, for benches.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::{CallbackTime, Worker};

/// What requests cost on a worker.
#[derive(Clone, Debug)]
pub struct Measure {
    /// Requests run.
    pub requests: u32,
    /// Wall time of all of them, the host's own work included.
    pub wall: Duration,
    /// Calls and wall time by callback: the time in the VM and in its host calls.
    pub callbacks: BTreeMap<&'static str, CallbackTime>,
    /// Calls by host function.
    pub host_calls: BTreeMap<&'static str, u64>,
    /// By how much linear memory has grown, bytes.
    pub memory_growth_bytes: usize,
    /// Instructions executed, if the module counts them.
    pub fuel: Option<u64>,
}

impl Measure {
    /// Runs a request `requests` times after a tenth as many to warm up. The worker's log is thrown away on the way.
    pub fn run(worker: &Worker, requests: u32, mut request: impl FnMut(&Worker)) -> Self {
        let mut repeat = |times| {
            for _ in 0..times {
                request(worker);
                worker.take_logs();
            }
        };
        repeat(requests / 10);
        worker.reset_counts();
        let memory_before = worker.memory_bytes();
        let began = Instant::now();
        repeat(requests);
        Self {
            requests,
            wall: began.elapsed(),
            callbacks: worker.callback_times(),
            host_calls: worker.host_calls(),
            memory_growth_bytes: worker.memory_bytes() - memory_before,
            fuel: worker.fuel_used(),
        }
    }

    /// Mean time in the VM per request, all callbacks together.
    pub fn vm_time(&self) -> Duration {
        let total: Duration = self.callbacks.values().map(|c| c.total).sum();
        total / self.requests.max(1)
    }
}
