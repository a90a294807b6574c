//! The least that a filter can do which runs a prefill leg: it sends a request to the first prefill endpoint, then to
//! the first decode endpoint with a word of what came back. It chooses nothing, checks nothing and tells nobody. What it
//! costs beside plain Envoy is the floor of every such filter: `make bench` measures it in the same run.
#![cfg(target_family = "wasm")]
#![allow(missing_docs, reason = "the entry point that the SDK's macro makes has none")]

use core::time::Duration;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};
use serde_json::Value;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| -> Box<dyn RootContext> { Box::new(Root::default()) });
}}

/// Addresses of a prefill and of a decode endpoint.
#[derive(Clone, Default)]
struct Endpoints {
    prefill: String,
    decode: String,
}

#[derive(Default)]
struct Root {
    endpoints: Endpoints,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        let text = self.get_plugin_configuration().unwrap_or_default();
        let config: Value = serde_json::from_slice(&text).unwrap_or_default();
        let first = |role: &str| {
            let endpoints = config["endpoints"].as_array().into_iter().flatten();
            let found =
                endpoints.filter(|endpoint| endpoint["role"] == role).find_map(|found| found["address"].as_str());
            found.unwrap_or_default().to_owned()
        };
        self.endpoints = Endpoints { prefill: first("prefill"), decode: first("decode") };
        true
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream { endpoints: self.endpoints.clone(), headers: Vec::new() }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Stream {
    endpoints: Endpoints,
    headers: Vec<(String, String)>,
}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        if !end_of_stream {
            self.headers = self.get_http_request_headers();
            self.set_http_request_header("content-length", None);
        }
        Action::Continue
    }

    fn on_http_request_body(&mut self, bytes: usize, end_of_stream: bool) -> Action {
        if end_of_stream {
            let body = self.get_http_request_body(0, bytes);
            let is_forwarded = |name: &str| name != "content-length" && !name.starts_with("x-envoy-");
            let forwarded = self.headers.iter().filter(|(name, _)| is_forwarded(name));
            let headers = forwarded.map(|(name, value)| (name.as_str(), value.as_str()));
            let headers = headers.chain([("x-pd-destination", self.endpoints.prefill.as_str())]).collect();
            let timeout = Duration::from_secs(60);
            if self.dispatch_http_call("engines", headers, body.as_deref(), Vec::new(), timeout).is_err() {
                return Action::Continue;
            }
        }
        Action::Pause
    }
}

impl Context for Stream {
    fn on_http_call_response(&mut self, _: u32, _: usize, bytes: usize, _: usize) {
        let answer = self.get_http_call_response_body(0, bytes).unwrap_or_default();
        self.set_property(vec!["pd.destination"], Some(self.endpoints.decode.as_bytes()));
        self.set_http_request_body(0, 1, format!("{{\"prefilled\":{},", answer.len()).as_bytes());
        self.resume_http_request();
    }
}
