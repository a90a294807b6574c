//! What the tests drive: the built filter as an Envoy has it, its endpoints, bodies and answers.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use pd_host::{Callout, Fleet, Forwarded, Module, Request, SharedStore, Stream, Worker, WorkerConfig};
pub use pd_support::body::CHAT;
use pd_support::places;

pub const ENGINES: &str = "engines";
pub const CONTROL: &str = "pd-control";

pub const P1: &str = "10.0.0.1:8000";
pub const P2: &str = "10.0.0.2:8000";
pub const D1: &str = "10.0.1.1:8000";
pub const D2: &str = "10.0.1.2:8000";
/// What most tests have: two endpoints for each leg.
pub const TWO_AND_TWO: &[(&str, &str)] = &[(P1, "prefill"), (P2, "prefill"), (D1, "decode"), (D2, "decode")];

/// Four to choose from for prefill.
pub const FOUR_AND_ONE: &[(&str, &str)] = &[
    ("10.0.1.1:8000", "prefill"),
    ("10.0.1.2:8000", "prefill"),
    ("10.0.1.3:8000", "prefill"),
    ("10.0.1.4:8000", "prefill"),
    ("10.0.2.1:8000", "decode"),
];

/// What a prefill engine hands over: nested ids, a number beyond 64 bits, a key nobody knows.
pub const PARAMS: &str = r#"{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2],[3]],"remote_engine_id":"e","remote_request_id":"r-1","remote_host":"10.0.0.1","remote_port":5600,"unknown":18446744073709551617}"#;

/// Limit of Envoy's buffer filter.
pub const REQUEST_LIMIT_BYTES: usize = 16 << 20;
/// Longer than any prefill leg may take.
pub const LONGEST_LEG: Duration = Duration::from_secs(60);
/// Gauges that every request leaves as it found them.
pub const GAUGES: &[&str] = &["pd_prefill_in_flight", "pd_decode_in_flight", "pd_decode_tokens_in_flight"];

/// The built module, compiled once.
///
/// # Panics
/// It was not built.
pub fn module() -> &'static Module {
    static MODULE: LazyLock<Module> =
        LazyLock::new(|| Module::load(places::wasm()).unwrap_or_else(|error| panic!("{error:#}")));
    &MODULE
}

/// Envoy around the filter, as `envoy/local.yaml` has it.
pub fn envoy(plugin_configuration: &str) -> WorkerConfig {
    WorkerConfig {
        vm_id: "pd".into(),
        root_id: "pd".into(),
        plugin_configuration: plugin_configuration.into(),
        clusters: vec![ENGINES.into(), CONTROL.into()],
        request_limit_bytes: Some(REQUEST_LIMIT_BYTES),
        route_headers: vec![
            ("x-pd-destination".into(), "wasm.pd.destination".into()),
            ("x-data-parallel-rank".into(), "wasm.pd.rank".into()),
            ("x-prefiller-host-port".into(), "wasm.pd.prefiller".into()),
        ],
        ..WorkerConfig::default()
    }
}

/// A plugin configuration: some top-level members, static endpoints, members of the default pool.
pub fn config(top: &[&str], endpoints: &[(&str, &str)], pool: &str) -> String {
    let mut members: Vec<String> = top.iter().map(|member| (*member).to_owned()).collect();
    members.push(format!(r#""endpoints":{}"#, endpoints_json(endpoints)));
    members.push(format!(r#""pools":{{"default":{{{pool}}}}}"#));
    format!("{{{}}}", members.join(","))
}

/// Lets clients say which leg a request is.
pub const TRUSTS_PHASE: &str = r#""trusted_headers":["x-pd-phase"]"#;

/// Two endpoints for each leg and nothing else.
pub fn two_and_two() -> String {
    config(&[], TWO_AND_TWO, "")
}

/// The same by way of `pd-control`.
pub fn controlled() -> String {
    config(&[r#""control":{"cluster":"pd-control"}"#], &[], "")
}

fn endpoints_json(endpoints: &[(&str, &str)]) -> String {
    let endpoint = |(address, role): &(&str, &str)| format!(r#"{{"address":"{address}","role":"{role}"}}"#);
    format!("[{}]", endpoints.iter().map(endpoint).collect::<Vec<_>>().join(","))
}

/// A whole list as `pd-control` sends it.
pub fn list(epoch: &str, version: u64, endpoints: &[(&str, &str)]) -> String {
    let endpoints = endpoints_json(endpoints);
    format!(r#"{{"wire":1,"epoch":"{epoch}","version":{version},"endpoints":{endpoints}}}"#)
}

/// One worker and what it shares with nobody.
pub struct Gateway {
    worker: Worker,
    pub shared: Arc<SharedStore>,
}

impl Gateway {
    pub fn new(plugin_configuration: &str) -> Self {
        Self::within(envoy(plugin_configuration))
    }

    pub fn within(envoy: WorkerConfig) -> Self {
        let shared = SharedStore::new();
        let worker = Worker::new(module(), Arc::clone(&shared), envoy).unwrap();
        Self { worker, shared }
    }

    /// A gateway whose `pd-control` has sent a list.
    pub fn pushed(endpoints: &[(&str, &str)]) -> Self {
        let gateway = Self::new(&controlled());
        gateway.tick();
        push(&gateway, &list("e", 1, endpoints));
        gateway
    }

    /// Counter after the next tick.
    pub fn counter(&self, name: &str) -> u64 {
        self.worker.tick();
        self.shared.counter(name)
    }

    /// Checks that nothing is in flight, no rule was broken and no header was asked for where there is none.
    #[track_caller]
    pub fn assert_idle(&self) {
        self.worker.tick();
        assert_gauges_are_zero(&self.shared);
        self.worker.assert_clean();
        // A call-out without an answer has no headers; its callback asks all the same, and gets none.
        let misses = self.worker.header_misses().into_iter();
        let elsewhere: Vec<_> = misses.filter(|miss| miss.callback != "proxy_on_http_call_response").collect();
        assert_eq!(elsewhere, []);
        assert_eq!(self.worker.open_streams(), 0);
    }
}

impl Deref for Gateway {
    type Target = Worker;

    fn deref(&self) -> &Worker {
        &self.worker
    }
}

/// Several workers of one Envoy.
pub fn fleet(workers: usize, plugin_configuration: &str) -> Fleet {
    Fleet::new(module(), workers, SharedStore::new(), envoy(plugin_configuration)).unwrap()
}

#[track_caller]
pub fn assert_gauges_are_zero(shared: &SharedStore) {
    let values: Vec<_> = GAUGES.iter().map(|name| (*name, shared.gauge(name).cast_signed())).collect();
    assert!(values.iter().all(|(_, value)| *value == 0), "{values:?}");
}

/// A chat request that asks for a stream, with a prompt of about that many bytes; equal only for equal arguments.
pub fn chat(id: u64, prompt_bytes: usize) -> String {
    let words = format!("request {id} ");
    let prompt = words.repeat(prompt_bytes / words.len() + 1);
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{prompt}"}}],"stream":true,"max_tokens":64}}"#)
}

/// A request whose prompt is long enough for a prefill leg.
pub fn long_chat(id: u64) -> Request {
    Request::post(CHAT, chat(id, 3_000))
}

/// A request whose prompt is not.
pub fn short_chat(id: u64) -> Request {
    Request::post(CHAT, chat(id, 100))
}

/// Call-outs to engines.
pub fn legs(worker: &Worker) -> Vec<Callout> {
    worker.callouts().into_iter().filter(|call| call.cluster == ENGINES).collect()
}

/// The prefill leg that is in flight.
#[track_caller]
pub fn leg(worker: &Worker) -> Callout {
    let mut legs = legs(worker);
    assert_eq!(legs.len(), 1, "{legs:?}");
    legs.remove(0)
}

/// The polls of `pd-control` that are in flight.
pub fn polls(worker: &Worker) -> Vec<Callout> {
    asked(worker, b"GET")
}

/// The calls of the exchange that are in flight.
pub fn exchanges(worker: &Worker) -> Vec<Callout> {
    asked(worker, b"POST")
}

fn asked(worker: &Worker, method: &[u8]) -> Vec<Callout> {
    let is_it = |call: &Callout| call.cluster == CONTROL && call.header(":method") == Some(method);
    worker.callouts().into_iter().filter(is_it).collect()
}

/// Answers the one poll with a list.
#[track_caller]
pub fn push(worker: &Worker, list: &str) {
    let polls = polls(worker);
    assert_eq!(polls.len(), 1, "{polls:?}");
    worker.answer(polls[0].token, [(":status", "200")], list).unwrap();
}

/// What a prefill engine answers.
pub fn prefilled() -> String {
    format!(r#"{{"id":"x","choices":[{{"finish_reason":"length"}}],"kv_transfer_params":{PARAMS}}}"#)
}

/// Prefill endpoint of the newest leg that is in flight.
pub fn chosen(worker: &Worker) -> String {
    let legs = legs(worker);
    addresses(legs.last().unwrap().header("x-pd-destination")).swap_remove(0)
}

/// Answers every prefill leg that is in flight.
pub fn answer_legs(worker: &Worker) {
    for leg in legs(worker) {
        worker.answer(leg.token, [(":status", "200"), ("content-type", "application/json")], prefilled()).unwrap();
    }
}

/// Lets the prefill leg succeed.
#[track_caller]
pub fn answer_leg(worker: &Worker) {
    let token = leg(worker).token;
    worker.answer(token, [(":status", "200"), ("content-type", "application/json")], prefilled()).unwrap();
}

/// The whole request as the router has it.
#[track_caller]
pub fn forwarded(stream: &Stream) -> Forwarded {
    let forwarded = stream.forwarded().unwrap_or_else(|| panic!("not forwarded: {:?}", stream.client()));
    assert!(forwarded.complete, "{forwarded:?}");
    forwarded
}

/// Addresses in a destination header, each once: they are repeated to cover every try of Envoy's.
pub fn addresses(header: Option<&[u8]>) -> Vec<String> {
    let text = String::from_utf8(header.expect("a destination").to_vec()).unwrap();
    let mut addresses: Vec<String> = Vec::new();
    for address in text.split(',') {
        if !addresses.iter().any(|seen| seen == address) {
            addresses.push(address.to_owned());
        }
    }
    addresses
}

/// Where Envoy sends a forwarded request.
#[track_caller]
pub fn destinations(forwarded: &Forwarded) -> Vec<String> {
    addresses(forwarded.header("x-pd-destination"))
}

/// Filter state as text; empty if there is none.
pub fn state(stream: &Stream, name: &str) -> String {
    let value = stream.filter_state().remove(&format!("wasm.pd.{name}")).unwrap_or_default();
    String::from_utf8(value).unwrap()
}

/// Decision and reason of a stream.
pub fn decision(stream: &Stream) -> (String, String) {
    (state(stream, "decision"), state(stream, "reason"))
}

/// Lets the endpoint that Envoy chooses answer.
pub fn respond(stream: &Stream) {
    let first = destinations(&forwarded(stream)).remove(0);
    stream.set_property("upstream.address", first.as_str());
    stream.response_headers([(":status", "200"), ("content-type", "text/event-stream")], false);
    stream.response_body("data: {}\n\n", false);
    stream.response_body("data: [DONE]\n\n", true);
}

/// A request that goes through both legs to its end.
#[track_caller]
pub fn run_split(worker: &Worker, request: &Request) -> Stream {
    let stream = request.send(worker);
    answer_leg(worker);
    respond(&stream);
    stream
}

/// Where new requests go: every address that a few of them name.
pub fn reached(worker: &Worker) -> BTreeSet<String> {
    let mut reached = BTreeSet::new();
    for _ in 0..4 {
        let stream = Request::get("/v1/models").send(worker);
        if let Some(forwarded) = stream.forwarded() {
            reached.extend(destinations(&forwarded));
        }
        stream.reset();
    }
    reached
}

pub fn set(addresses: &[&str]) -> BTreeSet<String> {
    addresses.iter().map(|address| (*address).to_owned()).collect()
}
