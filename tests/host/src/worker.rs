//! One worker thread of Envoy: a VM, its root contexts, its call-outs and its streams.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use wasmtime::{Instance, Store, TypedFunc, WasmParams, WasmResults};

use crate::engine::host_error;
use crate::host::{Action, CallResponse, Host, RootState, VM_CONTEXT};
use crate::shared::lock;
use crate::stream::StreamState;
use crate::{
    CallbackTime, Callout, Clock, ClusterState, Error, Fault, HeaderMiss, LogLevel, Module, Pairs, SharedStore, Status,
    Stream, Violation, WorkerConfig, pairs,
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

    /// Ends one root context when its listener has drained: it is told that it is done, and deleted if it agrees.
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

type Word<P> = Option<TypedFunc<P, u32>>;
type Void<P> = Option<TypedFunc<P, ()>>;

/// The callbacks a module exports; those it lacks are skipped.
pub(crate) struct Exports {
    pub context_create: Void<(u32, u32)>,
    pub vm_start: Word<(u32, u32)>,
    pub configure: Word<(u32, u32)>,
    pub tick: Void<u32>,
    pub queue_ready: Void<(u32, u32)>,
    pub request_headers: Word<(u32, u32, u32)>,
    pub request_body: Word<(u32, u32, u32)>,
    pub request_trailers: Word<(u32, u32)>,
    pub response_headers: Word<(u32, u32, u32)>,
    pub response_body: Word<(u32, u32, u32)>,
    pub response_trailers: Word<(u32, u32)>,
    pub http_call_response: Void<(u32, u32, u32, u32, u32)>,
    pub done: Word<u32>,
    pub log: Void<u32>,
    pub delete: Void<u32>,
}

impl Exports {
    fn of(instance: &Instance, store: &mut Store<Host>) -> Self {
        Self {
            context_create: typed(instance, store, "proxy_on_context_create"),
            vm_start: typed(instance, store, "proxy_on_vm_start"),
            configure: typed(instance, store, "proxy_on_configure"),
            tick: typed(instance, store, "proxy_on_tick"),
            queue_ready: typed(instance, store, "proxy_on_queue_ready"),
            request_headers: typed(instance, store, "proxy_on_request_headers"),
            request_body: typed(instance, store, "proxy_on_request_body"),
            request_trailers: typed(instance, store, "proxy_on_request_trailers"),
            response_headers: typed(instance, store, "proxy_on_response_headers"),
            response_body: typed(instance, store, "proxy_on_response_body"),
            response_trailers: typed(instance, store, "proxy_on_response_trailers"),
            http_call_response: typed(instance, store, "proxy_on_http_call_response"),
            done: typed(instance, store, "proxy_on_done"),
            log: typed(instance, store, "proxy_on_log"),
            delete: typed(instance, store, "proxy_on_delete"),
        }
    }
}

fn typed<P: WasmParams, R: WasmResults>(
    instance: &Instance,
    store: &mut Store<Host>,
    name: &str,
) -> Option<TypedFunc<P, R>> {
    instance.get_typed_func(store, name).ok()
}

/// The VM behind a worker.
pub(crate) struct Vm {
    store: Store<Host>,
    exports: Exports,
    module: Module,
    /// The newest root context.
    root: u32,
    /// Ended streams whose handles live on.
    finished: HashMap<u32, StreamState>,
    fuel_base: u64,
}

impl Vm {
    fn new(module: &Module, host: Host) -> Result<Self, Error> {
        let mut store = Store::new(module.engine(), host);
        store.limiter(|host| &mut host.limits);
        if module.counts_fuel() {
            store.set_fuel(u64::MAX).map_err(host_error)?;
        }
        let instance = module.pre().instantiate(&mut store).map_err(host_error)?;
        let memory = instance.get_memory(&mut store, "memory").context("the module exports no memory")?;
        let malloc: Option<TypedFunc<u32, u32>> =
            typed(&instance, &mut store, "malloc").or_else(|| typed(&instance, &mut store, "proxy_on_memory_allocate"));
        ensure!(malloc.is_some(), "the module exports neither malloc nor proxy_on_memory_allocate");
        store.data_mut().memory = Some(memory);
        store.data_mut().malloc = malloc;
        let exports = Exports::of(&instance, &mut store);
        let mut vm = Self { store, exports, module: module.clone(), root: 0, finished: HashMap::new(), fuel_base: 0 };
        let initialize: Void<()> = typed(&instance, &mut vm.store, "_initialize");
        vm.host_mut().restricted = true;
        match initialize {
            Some(initialize) => {
                vm.call("_initialize", VM_CONTEXT, Some(initialize), ());
                let main: Word<(u32, u32)> = typed(&instance, &mut vm.store, "main");
                vm.call("main", VM_CONTEXT, main, (0, 0));
            }
            None => {
                let start: Void<()> = typed(&instance, &mut vm.store, "_start");
                vm.call("_start", VM_CONTEXT, start, ());
            }
        }
        vm.host_mut().restricted = false;
        Ok(vm)
    }

    /// Creates, starts and configures a root context.
    fn start_root(&mut self, plugin_configuration: Vec<u8>) {
        let vm_configuration_bytes = self.host().config.vm_configuration.len() as u32;
        let configuration_bytes = plugin_configuration.len() as u32;
        let root = self.host_mut().new_context();
        self.host_mut().roots.insert(root, RootState { plugin_configuration, ..RootState::default() });
        self.host_mut().configuring = Some(root);
        self.call_void2("proxy_on_context_create", root, 0, |e| e.context_create.clone());
        let started = self.call_word2("proxy_on_vm_start", root, vm_configuration_bytes, 1, |e| e.vm_start.clone());
        self.run_actions();
        let configured = if started == Some(0) {
            None
        } else {
            self.call_word2("proxy_on_configure", root, configuration_bytes, 1, |e| e.configure.clone())
        };
        self.run_actions();
        let host = self.host_mut();
        host.configuring = None;
        if started == Some(0) || configured == Some(0) {
            host.failed = true;
        }
        self.root = root;
    }

    fn retire_root(&mut self, root: u32) {
        let agrees = self.call_word1("proxy_on_done", root, 1, |e| e.done.clone()) != Some(0);
        self.run_actions();
        if agrees {
            self.delete_root(root);
        } else if let Some(state) = self.host_mut().roots.get_mut(&root) {
            state.pending_done = true;
        }
    }

    pub(crate) fn delete_root(&mut self, root: u32) {
        self.call_void1("proxy_on_delete", root, |e| e.delete.clone());
        self.host_mut().roots.remove(&root);
    }

    fn tick(&mut self, root: u32) {
        self.call_void1("proxy_on_tick", root, |e| e.tick.clone());
        self.run_actions();
        let now = self.host().config.clock.monotonic_ns();
        if let Some(state) = self.host_mut().roots.get_mut(&root) {
            state.next_tick_ns = now + state.tick_period.unwrap_or_default().as_nanos() as u64;
        }
    }

    fn take_callout(&mut self, token: u32) -> Result<Callout, Error> {
        self.host_mut().callouts.remove(&token).with_context(|| format!("no call-out {token} waits"))
    }

    /// Gives the module an answer, or the news that there is none, in the root's name.
    fn deliver(&mut self, root: u32, token: u32, response: Option<CallResponse>) {
        let counts = response
            .as_ref()
            .map_or((0, 0, 0), |r| (r.headers.len() as u32, r.body.len() as u32, r.trailers.len() as u32));
        let host = self.host_mut();
        host.status_message = if response.is_none() { "reset" } else { "" };
        host.call_response = response;
        host.actions.push_back(Action::ForgetAnswer);
        let callback = self.exports.http_call_response.clone();
        let arguments = (root, token, counts.0, counts.1, counts.2);
        self.call("proxy_on_http_call_response", root, callback, arguments);
        self.run_actions();
        self.sweep();
    }

    /// Calls into the VM in the name of a context. `None`: not exported, or the VM is or becomes dead.
    fn call<P: WasmParams, R: WasmResults>(
        &mut self,
        name: &'static str,
        context: u32,
        callback: Option<TypedFunc<P, R>>,
        arguments: P,
    ) -> Option<R> {
        let callback = callback?;
        let host = self.host_mut();
        if host.failed {
            return None;
        }
        let saved = (host.current, host.effective, host.callback);
        host.begin_callback(name, context);
        let began = Instant::now();
        let result = callback.call(&mut self.store, arguments);
        let took = began.elapsed();
        let host = self.host_mut();
        (host.current, host.effective, host.callback) = saved;
        let time = host.callbacks.entry(name).or_default();
        time.calls += 1;
        time.total += took;
        match result {
            Ok(result) => Some(result),
            Err(trap) => {
                host.failed = true;
                host.violate(Violation::Trap { callback: name, message: format!("{trap:?}") });
                None
            }
        }
    }

    pub(crate) fn call_void1(&mut self, name: &'static str, context: u32, get: impl FnOnce(&Exports) -> Void<u32>) {
        let callback = get(&self.exports);
        self.call(name, context, callback, context);
    }

    /// `absent` is what Envoy takes for the answer of a module that lacks the callback.
    pub(crate) fn call_word1(
        &mut self,
        name: &'static str,
        context: u32,
        absent: u32,
        get: impl FnOnce(&Exports) -> Word<u32>,
    ) -> Option<u32> {
        let Some(callback) = get(&self.exports) else { return Some(absent) };
        self.call(name, context, Some(callback), context)
    }

    pub(crate) fn call_void2(
        &mut self,
        name: &'static str,
        context: u32,
        argument: u32,
        get: impl FnOnce(&Exports) -> Void<(u32, u32)>,
    ) {
        let callback = get(&self.exports);
        self.call(name, context, callback, (context, argument));
    }

    pub(crate) fn call_word2(
        &mut self,
        name: &'static str,
        context: u32,
        argument: u32,
        absent: u32,
        get: impl FnOnce(&Exports) -> Word<(u32, u32)>,
    ) -> Option<u32> {
        let Some(callback) = get(&self.exports) else { return Some(absent) };
        self.call(name, context, Some(callback), (context, argument))
    }

    /// Headers and body callbacks: a count or size, and the end of the stream. Absent ones continue.
    pub(crate) fn call_word3(
        &mut self,
        name: &'static str,
        context: u32,
        (size, end): (u32, bool),
        get: impl FnOnce(&Exports) -> Word<(u32, u32, u32)>,
    ) -> Option<u32> {
        let Some(callback) = get(&self.exports) else { return Some(0) };
        self.call(name, context, Some(callback), (context, size, u32::from(end)))
    }

    pub(crate) fn host(&self) -> &Host {
        self.store.data()
    }

    pub(crate) fn host_mut(&mut self) -> &mut Host {
        self.store.data_mut()
    }

    /// A stream, live or ended. Handles and the filter manager only name streams that are one or the other.
    pub(crate) fn stream_state(&mut self, id: u32) -> &mut StreamState {
        match self.store.data_mut().streams.get_mut(&id) {
            Some(stream) => stream,
            None => self.finished.entry(id).or_insert_with(|| StreamState { ended: true, ..StreamState::default() }),
        }
    }

    /// Lets ended contexts go once the outermost call is over, as Envoy's deferred deletion does.
    pub(crate) fn sweep(&mut self) {
        let ended = self.store.data_mut().streams.extract_if(.., |_, s| s.ended);
        for (id, stream) in ended {
            if !stream.orphaned {
                self.finished.insert(id, stream);
            }
        }
    }

    pub(crate) fn drop_stream(&mut self, id: u32) {
        self.finished.remove(&id);
        if let Some(stream) = self.host_mut().streams.get_mut(&id) {
            stream.orphaned = true;
        }
    }

    fn fuel_total(&mut self) -> u64 {
        u64::MAX - self.store.get_fuel().unwrap_or(u64::MAX)
    }
}

impl From<Status> for u32 {
    fn from(status: Status) -> Self {
        status as u32
    }
}
