//! The state behind one VM's host calls.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use wasmtime::{Memory, StoreLimits, StoreLimitsBuilder, TypedFunc};

use crate::abi::{BufferType, MapType, text, texts};
use crate::shared::Metric;
use crate::stream_state::{Body, LocalReply, StreamState};
use crate::{ClusterState, Fault, LogLevel, MetricKind, Pairs, SharedStore, WorkerConfig, find_header};

/// Envoy's cap on linear memory.
const MEMORY_CAP_BYTES: usize = 1 << 30;
/// The context of the VM itself: initialisation and the module's allocator run in it.
pub(crate) const VM_CONTEXT: u32 = 0;

/// A breach of the rules: what would be undefined behaviour, a dead worker or a wrong request in a real Envoy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The VM trapped (a panic, usually). The worker answers 503 from here on, and paused streams hang.
    Trap {
        /// The callback that trapped.
        callback: &'static str,
        /// Wasmtime's message with the stack.
        message: String,
    },
    /// Pause on request headers: stock Envoy stops everything, no body callback arrives.
    PausedOnHeaders {
        /// The stream's context.
        context: u32,
    },
    /// A resume of a stream (request side) that was not paused.
    ResumeWithoutPause {
        /// The stream's context.
        context: u32,
    },
    /// A resume before the end of the request: later chunks can be lost (envoy#46841).
    ResumeBeforeEndOfStream {
        /// The stream's context.
        context: u32,
    },
    /// A resume, reset or local reply for a stream that has ended.
    ActionAfterEnd {
        /// The stream's context.
        context: u32,
        /// What was asked for.
        action: &'static str,
    },
    /// A call-out and a local reply in one callback (proxy-wasm-cpp-host#326).
    DispatchAndReply {
        /// The callback.
        callback: &'static str,
    },
    /// A call-out started where it must not be: before the plugin runs, or in a throw-away VM.
    DispatchInConfigure {
        /// The callback.
        callback: &'static str,
    },
    /// `content-length` of the forwarded request is not the length of its body. Happens when a chunk was passed on and a
    /// later one paused: the buffer filter counts the first twice.
    ContentLengthMismatch {
        /// The stream's context.
        context: u32,
        /// What the header says.
        declared: u64,
        /// What the body has.
        actual: u64,
    },
    /// A call-out callback grew the buffered body over the limit: Envoy answers 413 from inside the host call, enters the
    /// VM again, whose SDK panics, and the process dies.
    BodyOverLimitInCallback {
        /// The stream's context.
        context: u32,
    },
    /// A gauge fell below zero and wrapped.
    GaugeUnderflow {
        /// The gauge.
        name: String,
    },
    /// A header field with NUL, CR or LF in it was handed to the host.
    InvalidHeader {
        /// The host call.
        call: &'static str,
    },
    /// A host call that Envoy forbids during initialisation or allocation; it traps.
    RestrictedCall {
        /// The host call.
        call: &'static str,
    },
}

/// An HTTP call-out that waits for its answer.
#[derive(Clone, PartialEq, Eq)]
pub struct Callout {
    /// Names the call in the answer.
    pub token: u32,
    /// The cluster.
    pub cluster: String,
    /// Header fields as sent, with the `content-length` Envoy adds to a body.
    pub headers: Pairs,
    /// The body.
    pub body: Vec<u8>,
    /// Trailers.
    pub trailers: Pairs,
    /// Time limit; zero means none.
    pub timeout: Duration,
    /// The context (stream or root) in whose name the module called.
    pub context: u32,
    /// The callback that started it.
    pub callback: &'static str,
    /// When it started, wall ns.
    pub at_ns: u64,
    pub(crate) root: u32,
    pub(crate) deadline_ns: Option<u64>,
}

impl Callout {
    /// The first value of a header field.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        find_header(&self.headers, name)
    }
}

impl std::fmt::Debug for Callout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Callout")
            .field("token", &self.token)
            .field("cluster", &self.cluster)
            .field("headers", &texts(&self.headers))
            .field("body", &text(&self.body))
            .field("timeout", &self.timeout)
            .field("context", &self.context)
            .field("callback", &self.callback)
            .finish_non_exhaustive()
    }
}

/// A header call in a phase that has no such map. Envoy answers `BadArgument`, on which SDK accessors panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderMiss {
    /// The host call.
    pub call: &'static str,
    /// The callback that made it.
    pub callback: &'static str,
    /// The context.
    pub context: u32,
}

/// Wall time spent in one callback, for benches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallbackTime {
    /// How often it ran.
    pub calls: u64,
    /// Time in it, its host calls included.
    pub total: Duration,
}

/// Runs between a get and a set of shared data: the store and the key about to be written.
pub(crate) type SharedDataHook = Box<dyn FnMut(&SharedStore, &[u8]) + Send>;

/// What Envoy does after the VM has returned.
#[derive(Debug)]
pub(crate) enum Action {
    ContinueRequest(u32),
    ContinueResponse(u32),
    Reset(u32),
    LocalReply(u32, LocalReply),
    DeleteRoot(u32),
    /// The answer of the call-out just delivered goes away.
    ForgetAnswer,
}

#[derive(Debug)]
pub(crate) struct CallResponse {
    pub root: u32,
    pub headers: Pairs,
    pub body: Vec<u8>,
    pub trailers: Pairs,
}

#[derive(Debug, Default)]
pub(crate) struct RootState {
    pub plugin_configuration: Vec<u8>,
    pub tick_period: Option<Duration>,
    pub next_tick_ns: u64,
    pub pending_done: bool,
}

/// Everything host functions work on; the data of the wasmtime store.
pub(crate) struct Host {
    pub config: WorkerConfig,
    pub shared: Arc<SharedStore>,
    pub worker_id: u32,
    pub throwaway: bool,
    pub memory: Option<Memory>,
    pub malloc: Option<TypedFunc<u32, u32>>,
    pub limits: StoreLimits,

    pub roots: BTreeMap<u32, RootState>,
    pub streams: BTreeMap<u32, StreamState>,
    pub next_context: u32,
    pub current: u32,
    pub effective: u32,
    pub callback: &'static str,
    pub restricted: bool,
    /// Set while the root context starts or is configured: the plugin configuration can be read.
    pub configuring: Option<u32>,
    pub stop_iteration: bool,
    pub failed: bool,
    pub actions: VecDeque<Action>,
    dispatched: bool,
    replied: bool,

    pub clusters: BTreeMap<String, ClusterState>,
    pub callouts: BTreeMap<u32, Callout>,
    pub next_call: u32,
    pub call_response: Option<CallResponse>,
    pub status_message: &'static str,

    pub metrics: HashMap<u32, (MetricKind, String, Arc<Metric>)>,
    pub next_metric: [u32; 3],

    pub logs: Vec<(LogLevel, String)>,
    pub violations: Vec<Violation>,
    pub header_misses: Vec<HeaderMiss>,
    pub host_calls: BTreeMap<&'static str, u64>,
    pub callbacks: BTreeMap<&'static str, CallbackTime>,
    pub faults: HashMap<String, Fault>,
    pub before_set_shared_data: Option<SharedDataHook>,
    pub random: u64,
}

impl Host {
    pub(crate) fn new(config: WorkerConfig, shared: Arc<SharedStore>, throwaway: bool) -> Self {
        let worker_id = shared.join();
        let clusters = config.clusters.iter().map(|name| (name.clone(), ClusterState::Ready)).collect();
        Self {
            shared,
            worker_id,
            throwaway,
            memory: None,
            malloc: None,
            limits: StoreLimitsBuilder::new().memory_size(MEMORY_CAP_BYTES).build(),
            roots: BTreeMap::new(),
            streams: BTreeMap::new(),
            next_context: 1,
            current: VM_CONTEXT,
            effective: 0,
            callback: "",
            restricted: false,
            configuring: None,
            stop_iteration: false,
            failed: false,
            actions: VecDeque::new(),
            dispatched: false,
            replied: false,
            clusters,
            callouts: BTreeMap::new(),
            next_call: 0,
            call_response: None,
            status_message: "",
            metrics: HashMap::new(),
            next_metric: [0, 1, 2],
            logs: Vec::new(),
            violations: Vec::new(),
            header_misses: Vec::new(),
            host_calls: BTreeMap::new(),
            callbacks: BTreeMap::new(),
            faults: HashMap::new(),
            before_set_shared_data: None,
            random: config.seed ^ u64::from(worker_id) << 32,
            config,
        }
    }

    pub(crate) fn new_context(&mut self) -> u32 {
        let id = self.next_context;
        self.next_context += 1;
        id
    }

    pub(crate) fn begin_callback(&mut self, callback: &'static str, context: u32) {
        self.callback = callback;
        self.current = context;
        self.effective = 0;
        self.dispatched = false;
        self.replied = false;
    }

    /// The context that host calls act on: the effective one, as long as it lives.
    pub(crate) fn context(&self) -> u32 {
        let alive = self.effective != 0 && self.has_context(self.effective);
        if alive { self.effective } else { self.current }
    }

    pub(crate) fn has_context(&self, id: u32) -> bool {
        id == VM_CONTEXT || self.roots.contains_key(&id) || self.streams.contains_key(&id)
    }

    pub(crate) fn root_of(&self, id: u32) -> u32 {
        self.streams.get(&id).map_or(id, |stream| stream.root)
    }

    pub(crate) fn stream(&self) -> Option<&StreamState> {
        self.streams.get(&self.context())
    }

    pub(crate) fn stream_mut(&mut self) -> Option<&mut StreamState> {
        let id = self.context();
        self.streams.get_mut(&id)
    }

    pub(crate) fn violate(&mut self, violation: Violation) {
        self.violations.push(violation);
    }

    pub(crate) fn mark_dispatch(&mut self) {
        self.dispatched = true;
        if self.configuring.is_some() || self.throwaway {
            self.violate(Violation::DispatchInConfigure { callback: self.callback });
        }
        self.check_dispatch_and_reply();
    }

    pub(crate) fn mark_reply(&mut self) {
        self.replied = true;
        self.check_dispatch_and_reply();
    }

    fn check_dispatch_and_reply(&mut self) {
        let violation = Violation::DispatchAndReply { callback: self.callback };
        if self.dispatched && self.replied && self.violations.last() != Some(&violation) {
            self.violate(violation);
        }
    }

    pub(crate) fn miss(&mut self, call: &'static str) {
        let miss = HeaderMiss { call, callback: self.callback, context: self.context() };
        self.header_misses.push(miss);
    }

    /// A map as it can be read now; `None` where Envoy has none in this phase.
    pub(crate) fn map(&self, kind: MapType) -> Option<&Pairs> {
        match kind {
            MapType::CallResponseHeaders => self.call_response().map(|r| &r.headers),
            MapType::CallResponseTrailers => self.call_response().map(|r| &r.trailers).filter(|t| !t.is_empty()),
            _ => self.stream()?.map(kind),
        }
    }

    /// A map as it can be changed now. Answers of call-outs never can.
    pub(crate) fn map_mut(&mut self, kind: MapType) -> Option<&mut Pairs> {
        self.stream_mut()?.map_mut(kind)
    }

    /// A buffer's bytes; `None` where Envoy has no such buffer. A body outside its phase is there, and empty.
    pub(crate) fn buffer(&self, kind: BufferType) -> Option<&[u8]> {
        match kind {
            BufferType::RequestBody | BufferType::ResponseBody => {
                Some(self.stream().map_or(&[], |s| s.body(kind == BufferType::RequestBody).visible()))
            }
            BufferType::CallResponseBody => self.call_response().map(|r| r.body.as_slice()),
            BufferType::VmConfiguration => Some(&self.config.vm_configuration),
            BufferType::PluginConfiguration => {
                let root = self.configuring.filter(|root| *root == self.context())?;
                self.roots.get(&root).map(|r| r.plugin_configuration.as_slice())
            }
            BufferType::CallData | BufferType::GrpcReceive | BufferType::Downstream | BufferType::Upstream => Some(&[]),
        }
    }

    /// The body the module may edit now.
    pub(crate) fn body_mut(&mut self, kind: BufferType) -> Option<&mut Body> {
        match kind {
            BufferType::RequestBody => self.stream_mut().map(|s| &mut s.request_body),
            BufferType::ResponseBody => self.stream_mut().map(|s| &mut s.response_body),
            _ => None,
        }
    }

    /// A deterministic generator (xorshift), different in each worker.
    pub(crate) fn next_random(&mut self) -> u8 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 24) as u8
    }

    fn call_response(&self) -> Option<&CallResponse> {
        let root = self.root_of(self.context());
        self.call_response.as_ref().filter(|r| r.root == root)
    }
}
