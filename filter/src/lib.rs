//! The filter as Envoy loads it. It turns Envoy's callbacks into events of pd-core, and pd-core's effects into host calls.
//! pd-core takes every decision.
#![allow(missing_docs, reason = "the entry point that the SDK's macro makes has none")]

mod host;
mod metrics;
mod root;
mod shell;
mod stream;
mod version;
mod waiting;
mod wake;

use proxy_wasm::traits::RootContext;
use proxy_wasm::types::LogLevel;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|id| -> Box<dyn RootContext> { Box::new(root::Root::new(id)) });
}}
