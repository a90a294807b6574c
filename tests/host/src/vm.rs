//! The VM of a worker: its exports, its root contexts, and calls into it.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{Context, ensure};
use wasmtime::{Instance, Store, TypedFunc, WasmParams, WasmResults};

use crate::Error;
use crate::engine::{Module, host_error};
use crate::host::{Action, CallResponse, Callout, Host, RootState, VM_CONTEXT, Violation};
use crate::stream_state::StreamState;

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
    pub(crate) store: Store<Host>,
    exports: Exports,
    pub(crate) module: Module,
    /// The newest root context.
    pub(crate) root: u32,
    /// Ended streams whose handles live on.
    finished: HashMap<u32, StreamState>,
    pub(crate) fuel_base: u64,
}

impl Vm {
    pub(crate) fn new(module: &Module, host: Host) -> Result<Self, Error> {
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
    pub(crate) fn start_root(&mut self, plugin_configuration: Vec<u8>) {
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

    pub(crate) fn retire_root(&mut self, root: u32) {
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

    pub(crate) fn tick(&mut self, root: u32) {
        self.call_void1("proxy_on_tick", root, |e| e.tick.clone());
        self.run_actions();
        let now = self.host().config.clock.monotonic_ns();
        if let Some(state) = self.host_mut().roots.get_mut(&root) {
            state.next_tick_ns = now + state.tick_period.unwrap_or_default().as_nanos() as u64;
        }
    }

    pub(crate) fn take_callout(&mut self, token: u32) -> Result<Callout, Error> {
        self.host_mut().callouts.remove(&token).with_context(|| format!("no call-out {token} waits"))
    }

    /// Gives the module an answer, or the news that there is none, in the root's name.
    pub(crate) fn deliver(&mut self, root: u32, token: u32, response: Option<CallResponse>) {
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

    /// `absent` is the value that Envoy assumes if the module lacks the callback.
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

    pub(crate) fn fuel_total(&mut self) -> u64 {
        u64::MAX - self.store.get_fuel().unwrap_or(u64::MAX)
    }
}
