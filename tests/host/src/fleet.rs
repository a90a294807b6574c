//! The workers of one Envoy, and two generations of them side by side.

use std::sync::Arc;
use std::time::Duration;

use crate::worker::advance;
use crate::{Clock, Error, Module, SharedStore, Violation, Worker, WorkerConfig};

/// Several workers over one store and one clock.
///
/// An Envoy with `n` worker threads runs `n + 1` VMs: its main thread has one too, which ticks and shares but serves no
/// stream. To model that, start one worker more and send it nothing.
#[derive(Debug)]
pub struct Fleet {
    module: Module,
    shared: Arc<SharedStore>,
    config: WorkerConfig,
    workers: Vec<Worker>,
    draining: Vec<Worker>,
}

impl Fleet {
    /// Starts `count` workers of the same configuration.
    ///
    /// # Errors
    /// See [`Worker::new`].
    pub fn new(module: &Module, count: usize, shared: Arc<SharedStore>, config: WorkerConfig) -> Result<Self, Error> {
        let mut fleet = Self { module: module.clone(), shared, config, workers: Vec::new(), draining: Vec::new() };
        fleet.workers = fleet.start(count)?;
        Ok(fleet)
    }

    /// The workers of the current generation.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// The workers of earlier generations that still drain.
    pub fn draining(&self) -> &[Worker] {
        &self.draining
    }

    /// What they share.
    pub fn shared(&self) -> &Arc<SharedStore> {
        &self.shared
    }

    /// The clock of all of them.
    pub fn clock(&self) -> &Clock {
        &self.config.clock
    }

    /// Ticks every worker, the draining ones too, oldest first.
    pub fn tick(&self) {
        for worker in self.all() {
            worker.tick();
        }
    }

    /// Moves the clock, running on the way, in order of time, every tick and call-out timeout that falls due.
    pub fn advance(&self, by: Duration) {
        advance(&self.all().collect::<Vec<_>>(), &self.config.clock, by);
    }

    /// Runs what was posted to the workers' threads: queue items.
    pub fn run_posted(&self) {
        for worker in self.all() {
            worker.run_posted();
        }
    }

    /// Starts a generation of as many new VMs with a new plugin configuration, of another module if one is given. The
    /// current workers go on as draining ones. Envoy does this when the code, the VM id or the VM configuration changes;
    /// for a change of the plugin configuration alone see [`Fleet::add_roots`].
    ///
    /// # Errors
    /// See [`Worker::new`].
    pub fn reconfigure(&mut self, plugin_configuration: &[u8], module: Option<&Module>) -> Result<(), Error> {
        self.config.plugin_configuration = plugin_configuration.to_vec();
        if let Some(module) = module {
            self.module = module.clone();
        }
        let new = self.start(self.workers.len())?;
        self.draining.append(&mut std::mem::replace(&mut self.workers, new));
        Ok(())
    }

    /// Gives every worker's VM a second root context with a new plugin configuration: what Envoy does when nothing but
    /// the plugin configuration changes. The earlier roots drain; [`Worker::retire_root`] ends them.
    pub fn add_roots(&mut self, plugin_configuration: &[u8]) {
        self.config.plugin_configuration = plugin_configuration.to_vec();
        for worker in &self.workers {
            worker.add_root(plugin_configuration);
        }
    }

    /// Ends the draining generations: the host notifies their root contexts, then deletes the VMs.
    pub fn retire(&mut self) {
        for worker in self.draining.drain(..) {
            worker.shutdown();
        }
    }

    /// Loses one worker's VM without a word to it and starts another in its place, as after a reload.
    ///
    /// # Errors
    /// See [`Worker::new`].
    ///
    /// # Panics
    /// There is no such worker.
    pub fn replace(&mut self, index: usize) -> Result<(), Error> {
        let new = Worker::new(&self.module, self.shared.clone(), self.config.clone())?;
        self.workers[index] = new;
        Ok(())
    }

    /// Violations of all workers, draining ones included.
    pub fn violations(&self) -> Vec<Violation> {
        self.all().flat_map(Worker::violations).collect()
    }

    fn start(&self, count: usize) -> Result<Vec<Worker>, Error> {
        (0..count).map(|_| Worker::new(&self.module, self.shared.clone(), self.config.clone())).collect()
    }

    fn all(&self) -> impl Iterator<Item = &Worker> {
        self.draining.iter().chain(&self.workers)
    }
}
