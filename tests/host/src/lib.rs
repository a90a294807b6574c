//! A Proxy-Wasm host for tests: it loads the built `.wasm` and drives it the way stock Envoy does, deterministically.
//!
//! What is modelled is what a filter can see of Envoy: the ABI 0.2.1 host calls with Envoy's statuses, the filter
//! manager with the chain `wasm → buffer → router` (buffering, resume, local replies, the 413), call-outs that belong to
//! the root context, shared data, metrics and queues of the process, ticks, and the order of the last callbacks. Time
//! stands still unless a test moves the [`Clock`]; nothing sleeps and nothing is random.
//!
//! On top of that stand knobs a real Envoy does not have: any host call can be made to fail, a call-out can stay
//! unanswered, a hook can run between reading and writing shared data, and breaches of Envoy's rules are collected as
//! [`Violation`]s instead of being undefined behaviour.
//!
//! ```no_run
//! use pd_host::{Module, SharedStore, Worker, WorkerConfig};
//!
//! let module = Module::load("filter.wasm")?;
//! let config = WorkerConfig { clusters: vec!["engines".into()], ..WorkerConfig::default() };
//! let worker = Worker::new(&module, SharedStore::new(), config)?;
//! let stream = worker.stream();
//! stream.request_headers([(":method", "POST"), (":path", "/v1/completions"), (":authority", "a")], false);
//! stream.request_body(br#"{"model":"m","#, false);
//! stream.request_body(br#""prompt":"p"}"#, true);
//! let call = worker.callouts().remove(0);
//! worker.answer(call.token, [(":status", "200")], b"{}")?;
//! let request = stream.forwarded().expect("resumed");
//! assert!(request.complete);
//! worker.assert_clean();
//! # Ok::<(), pd_host::Error>(())
//! ```

mod abi;
mod clock;
mod config;
mod engine;
mod faults;
mod fleet;
mod host;
mod hostcalls;
mod manager;
mod measure;
mod shared;
mod stream;
mod stream_state;
mod vm;
mod wasi;
mod worker;

pub use abi::{LogLevel, Pairs, Status, find_header, pairs};
pub use clock::Clock;
pub use config::{ClusterState, Property, WorkerConfig};
pub use engine::{Module, ModuleOptions};
pub use faults::{ClientGone, Fault, Request, random_chunks, split_at_each_byte};
pub use fleet::Fleet;
pub use host::{CallbackTime, Callout, HeaderMiss, Violation};
pub use measure::Measure;
pub use shared::{MetricKind, SharedStore};
pub use stream::Stream;
pub use stream_state::{ClientView, Forwarded, LocalReply, Seen};
pub use worker::{Throwaway, Worker};

/// An error of the host itself: a module that does not load, a token that is not waiting.
pub type Error = anyhow::Error;
