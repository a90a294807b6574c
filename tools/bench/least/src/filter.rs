//! The module that Envoy loads.

use core::time::Duration;
use std::rc::Rc;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};
use serde_json::Value;

use crate::endpoints::InTurn;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| -> Box<dyn RootContext> { Box::new(Root::default()) });
}}

/// Prefill and decode endpoints.
struct Endpoints {
    prefill: InTurn,
    decode: InTurn,
}

#[derive(Default)]
struct Root {
    endpoints: Option<Rc<Endpoints>>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        let text = self.get_plugin_configuration().unwrap_or_default();
        let config: Value = serde_json::from_slice(&text).unwrap_or_default();
        let of = |role| InTurn::of(&config, role);
        self.endpoints =
            of("prefill").zip(of("decode")).map(|(prefill, decode)| Rc::new(Endpoints { prefill, decode }));
        self.endpoints.is_some()
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream { endpoints: Rc::clone(self.endpoints.as_ref()?), headers: Vec::new() }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Stream {
    endpoints: Rc<Endpoints>,
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
            let headers = headers.chain([("x-pd-destination", self.endpoints.prefill.next_address())]).collect();
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
        self.set_property(vec!["pd.destination"], Some(self.endpoints.decode.next_address().as_bytes()));
        self.set_http_request_body(0, 1, format!("{{\"prefilled\":{},", answer.len()).as_bytes());
        self.resume_http_request();
    }
}
