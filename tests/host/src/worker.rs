//! One worker thread of Envoy: a VM, its root contexts, its call-outs and its streams.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::host::{CallResponse, Host, RootState};
use crate::shared::lock;
use crate::stream_state::StreamState;
use crate::vm::Vm;
use crate::{
    CallbackTime, Callout, Clock, ClusterState, Error, Fault, HeaderMiss, LogLevel, Module, Pairs, SharedStore, Stream,
    Violation, WorkerConfig, pairs,
};

/// A worker with its VM. Clones are handles to the same worker.
#[derive(Clone)]
pub struct Worker {
    vm: Arc<Mutex<Vm>>,
}

/// What a throw-away VM, in which Envoy tries a configuration first, came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Throwaway {
    /// `proxy_on_vm_start` and `proxy_on_configure` both said yes.
    pub accepted: bool,
    /// Breaches of the rules; a call-out is one here.
    pub violations: Vec<Violation>,
    /// Its log.
    pub logs: Vec<(LogLevel, String)>,
}

impl Worker {
    /// Makes a VM as Envoy does: initialise, create the root context, start, configure. A module that says no, or traps,
    /// makes a failed worker that answers 503, not an error; see [`Worker::is_failed`].
    ///
    /// # Errors
    /// The module cannot be instantiated, or lacks what Envoy needs (memory, an allocator).
    pub fn new(module: &Module, shared: Arc<SharedStore>, config: WorkerConfig) -> Result<Self, Error> {
        Self::start(module, shared, config, false)
    }

    fn start(module: &Module, shared: Arc<SharedStore>, config: WorkerConfig, throwaway: bool) -> Result<Self, Error> {
        let mut vm = Vm::new(module, Host::new(config, shared, throwaway))?;
        let configuration = vm.host().config.plugin_configuration.clone();
        vm.start_root(configuration);
        Ok(Self { vm: Arc::new(Mutex::new(vm)) })
    }

    /// Makes the throw-away VM in which Envoy tries a plugin configuration on the main thread, with this worker's
    /// module and shared store. It goes without `done` or `delete`.
    ///
    /// # Errors
    /// See [`Worker::new`].
    pub fn start_throwaway(&self, plugin_configuration: &[u8]) -> Result<Throwaway, Error> {
        let (module, shared, mut config) = {
            let vm = lock(&self.vm);
            (vm.module.clone(), vm.host().shared.clone(), vm.host().config.clone())
        };
        config.plugin_configuration = plugin_configuration.to_vec();
        let worker = Self::start(&module, shared, config, true)?;
        let mut vm = lock(&worker.vm);
        let host = vm.host_mut();
        Ok(Throwaway {
            accepted: !host.failed,
            violations: std::mem::take(&mut host.violations),
            logs: std::mem::take(&mut host.logs),
        })
    }

    /// A new VM with a new plugin configuration beside this one, which goes on and drains.
    ///
    /// # Errors
    /// See [`Worker::new`].
    pub fn reconfigure(&self, plugin_configuration: &[u8]) -> Result<Self, Error> {
        let vm = lock(&self.vm);
        let mut config = vm.host().config.clone();
        config.plugin_configuration = plugin_configuration.to_vec();
        Self::new(&vm.module, vm.host().shared.clone(), config)
    }

    /// Another root context with its own plugin configuration in the same VM. Envoy does this when only the plugin
    /// configuration changes while a VM of the same id, code and VM configuration is alive on the thread. New streams
    /// belong to the new root; those of the old one stay with it. Returns the root's context.
    pub fn add_root(&self, plugin_configuration: &[u8]) -> u32 {
        let mut vm = lock(&self.vm);
        vm.start_root(plugin_configuration.to_vec());
        vm.root
    }

    /// Ends one root context when its listener has drained: the host calls `on_done`, and deletes the context if that
    /// returns true.
    pub fn retire_root(&self, root: u32) {
        let mut vm = lock(&self.vm);
        vm.retire_root(root);
        vm.sweep();
    }

    /// The newest root context.
    pub fn root(&self) -> u32 {
        lock(&self.vm).root
    }

    /// Starts a stream; nothing reaches the VM before its first headers.
    pub fn stream(&self) -> Stream {
        let root = lock(&self.vm).root;
        self.stream_of(root)
    }

    /// Starts a stream that belongs to a certain root context.
    pub fn stream_of(&self, root: u32) -> Stream {
        let mut vm = lock(&self.vm);
        let host = vm.host_mut();
        let id = host.new_context();
        host.streams.insert(id, StreamState { root, ..StreamState::default() });
        Stream { vm: self.vm.clone(), id }
    }

    /// Calls `proxy_on_tick` of every root that has asked for ticks. Returns whether any has.
    pub fn tick(&self) -> bool {
        let mut vm = lock(&self.vm);
        let due: Vec<u32> =
            vm.host().roots.iter().filter(|(_, r)| r.tick_period.is_some()).map(|(id, _)| *id).collect();
        for root in &due {
            vm.tick(*root);
        }
        vm.sweep();
        !due.is_empty()
    }

    /// The tick period the (newest) root has set.
    pub fn tick_period(&self) -> Option<Duration> {
        let vm = lock(&self.vm);
        vm.host().roots.get(&vm.root)?.tick_period
    }

    /// Moves the clock, running this worker's ticks and call-out timeouts on the way. For several workers on one clock
    /// see [`crate::Fleet::advance`].
    pub fn advance(&self, by: Duration) {
        let clock = self.clock();
        advance(&[self], &clock, by);
    }

    /// The worker's clock.
    pub fn clock(&self) -> Clock {
        lock(&self.vm).host().config.clock.clone()
    }

    /// Runs what other workers posted: `proxy_on_queue_ready` for each item queued for this one.
    pub fn run_posted(&self) {
        let mut vm = lock(&self.vm);
        let worker = vm.host().worker_id;
        let posted = vm.host().shared.take_posted(worker);
        for (context, token) in posted {
            if vm.host().roots.contains_key(&context) {
                vm.call_void2("proxy_on_queue_ready", context, token, |e| e.queue_ready.clone());
                vm.run_actions();
            }
        }
        vm.sweep();
    }

    /// Tells the roots that they are done, and deletes those that agree.
    pub fn shutdown(&self) {
        let mut vm = lock(&self.vm);
        let roots: Vec<u32> = vm.host().roots.keys().copied().collect();
        for root in roots {
            vm.retire_root(root);
        }
        vm.host_mut().callouts.clear();
        vm.sweep();
    }
}

// Call-outs.
impl Worker {
    /// Call-outs that wait for an answer, oldest first.
    pub fn callouts(&self) -> Vec<Callout> {
        lock(&self.vm).host().callouts.values().cloned().collect()
    }

    /// Answers a call-out. The stream behind it may be gone: Envoy delivers the answer to the root all the same.
    ///
    /// # Errors
    /// No call-out with this token waits.
    pub fn answer<K: AsRef<[u8]>, V: AsRef<[u8]>>(
        &self,
        token: u32,
        headers: impl IntoIterator<Item = (K, V)>,
        body: impl AsRef<[u8]>,
    ) -> Result<(), Error> {
        self.answer_with_trailers(token, pairs(headers), body, Pairs::new())
    }

    /// Answers a call-out, with trailers.
    ///
    /// # Errors
    /// No call-out with this token waits.
    pub fn answer_with_trailers(
        &self,
        token: u32,
        headers: Pairs,
        body: impl AsRef<[u8]>,
        trailers: Pairs,
    ) -> Result<(), Error> {
        let mut vm = lock(&self.vm);
        let root = vm.take_callout(token)?.root;
        let body = body.as_ref().to_vec();
        vm.deliver(root, token, Some(CallResponse { root, headers, body, trailers }));
        Ok(())
    }

    /// Answers with the 503 of a refused connection.
    ///
    /// # Errors
    /// No call-out with this token waits.
    pub fn refuse(&self, token: u32) -> Result<(), Error> {
        let body = "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure";
        self.local_answer(token, "503", body)
    }

    /// Answers with the 504 of a call-out that took too long.
    ///
    /// # Errors
    /// No call-out with this token waits.
    pub fn time_out(&self, token: u32) -> Result<(), Error> {
        self.local_answer(token, "504", "upstream request timeout")
    }

    /// Fails a call-out without an answer (reset, or an answer over the buffer limit): no headers arrive.
    ///
    /// # Errors
    /// No call-out with this token waits.
    pub fn fail(&self, token: u32) -> Result<(), Error> {
        let mut vm = lock(&self.vm);
        let root = vm.take_callout(token)?.root;
        vm.deliver(root, token, None);
        Ok(())
    }

    /// Times out every call-out whose limit has passed on the clock. Returns how many.
    pub fn expire_callouts(&self) -> usize {
        let now = self.clock().monotonic_ns();
        let due = self.callouts().into_iter().filter(|c| c.deadline_ns.is_some_and(|at| at <= now));
        due.filter(|c| self.time_out(c.token).is_ok()).count()
    }

    /// Makes a cluster known, changes what stands behind it, or removes it (`None`): then a call-out is a bad argument.
    pub fn set_cluster(&self, name: &str, state: Option<ClusterState>) {
        let mut vm = lock(&self.vm);
        let clusters = &mut vm.host_mut().clusters;
        match state {
            Some(state) => drop(clusters.insert(name.to_owned(), state)),
            None => drop(clusters.remove(name)),
        }
    }

    fn local_answer(&self, token: u32, status: &str, body: &str) -> Result<(), Error> {
        let length = body.len().to_string();
        let headers = [(":status", status), ("content-length", length.as_str()), ("content-type", "text/plain")];
        self.answer(token, headers, body)
    }
}

// What a test looks at, and the knobs.
impl Worker {
    /// The VM trapped or refused to start: every request gets 503.
    pub fn is_failed(&self) -> bool {
        lock(&self.vm).host().failed
    }

    /// Breaches of the rules so far.
    pub fn violations(&self) -> Vec<Violation> {
        lock(&self.vm).host().violations.clone()
    }

    /// Checks that no rule was broken.
    ///
    /// # Panics
    /// One was.
    #[track_caller]
    pub fn assert_clean(&self) {
        let violations = self.violations();
        assert!(violations.is_empty(), "violations: {violations:#?}");
    }

    /// Header calls in phases without headers.
    pub fn header_misses(&self) -> Vec<HeaderMiss> {
        lock(&self.vm).host().header_misses.clone()
    }

    /// The log so far.
    pub fn logs(&self) -> Vec<(LogLevel, String)> {
        lock(&self.vm).host().logs.clone()
    }

    /// Takes the log away.
    pub fn take_logs(&self) -> Vec<(LogLevel, String)> {
        std::mem::take(&mut lock(&self.vm).host_mut().logs)
    }

    /// How often each host function was called, those answered by a fault included.
    pub fn host_calls(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.vm).host().host_calls.clone()
    }

    /// All host calls.
    pub fn host_call_count(&self) -> u64 {
        lock(&self.vm).host().host_calls.values().sum()
    }

    /// Calls of each callback and the wall time in it.
    pub fn callback_times(&self) -> BTreeMap<&'static str, CallbackTime> {
        lock(&self.vm).host().callbacks.clone()
    }

    /// Forgets counts and times, for a bench after its warm-up.
    pub fn reset_counts(&self) {
        let mut vm = lock(&self.vm);
        vm.host_mut().host_calls.clear();
        vm.host_mut().callbacks.clear();
        vm.fuel_base = vm.fuel_total();
    }

    /// Instructions executed since the start or the last [`Worker::reset_counts`]; `None` unless the module was compiled
    /// to count them.
    pub fn fuel_used(&self) -> Option<u64> {
        let mut vm = lock(&self.vm);
        vm.module.counts_fuel().then(|| vm.fuel_total() - vm.fuel_base)
    }

    /// Size of linear memory, bytes. It never shrinks.
    pub fn memory_bytes(&self) -> usize {
        let vm = lock(&self.vm);
        vm.host().memory.map_or(0, |memory| memory.data_size(&vm.store))
    }

    /// Streams that have not ended.
    pub fn open_streams(&self) -> usize {
        lock(&self.vm).host().streams.len()
    }

    /// Lets a host function fail. The status may be one that no Envoy returns.
    pub fn fail_host_call(&self, function: &str, fault: Fault) {
        lock(&self.vm).host_mut().faults.insert(function.to_owned(), fault);
    }

    /// Lets all host functions work again.
    pub fn clear_faults(&self) {
        lock(&self.vm).host_mut().faults.clear();
    }

    /// Runs before every write of shared data, with the key: the place for another worker's write in between. It must
    /// not use this worker.
    pub fn before_set_shared_data(&self, hook: impl FnMut(&SharedStore, &[u8]) + Send + 'static) {
        lock(&self.vm).host_mut().before_set_shared_data = Some(Box::new(hook));
    }

    fn next_event_ns(&self) -> Option<u64> {
        let vm = lock(&self.vm);
        let host = vm.host();
        let ticks = host.roots.values().filter(|r| r.tick_period.is_some()).map(|r| r.next_tick_ns);
        let deadlines = host.callouts.values().filter_map(|c| c.deadline_ns);
        if host.failed { None } else { ticks.chain(deadlines).min() }
    }

    fn run_due(&self, now: u64) {
        self.expire_callouts();
        let mut vm = lock(&self.vm);
        let due = |r: &RootState| r.tick_period.is_some() && r.next_tick_ns <= now;
        let roots: Vec<u32> = vm.host().roots.iter().filter(|(_, r)| due(r)).map(|(id, _)| *id).collect();
        for root in roots {
            vm.tick(root);
        }
        vm.sweep();
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

/// Moves a clock for the workers on it, from event to event.
pub(crate) fn advance(workers: &[&Worker], clock: &Clock, by: Duration) {
    let target = clock.monotonic_ns() + by.as_nanos() as u64;
    loop {
        let next = workers.iter().filter_map(|w| w.next_event_ns()).min();
        let now = clock.monotonic_ns();
        let Some(at) = next.map(|at| at.max(now)).filter(|at| *at <= target) else { break };
        clock.advance(Duration::from_nanos(at - now));
        for worker in workers {
            worker.run_due(at);
        }
    }
    clock.advance(Duration::from_nanos(target - clock.monotonic_ns()));
}
