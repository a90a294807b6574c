//! The state machine, event by event.

use core::time::Duration;

use super::route::TRIES;
use super::*;
use crate::body::splice::HeadEdit;
use crate::config::{PHASE_HEADER, PREFILLER_HEADER};
use crate::metrics::Metric;
use crate::time::Monotonic;

mod admission;
mod beliefs;
mod decisions;
mod engines;
mod failures;
mod handover;
mod headers;
mod kv_lease;
mod media;
mod models;
mod refusals;
mod revisions;
mod stored;
mod waiting;

const CONFIG: &str = r#"{
    "trusted_headers": ["x-pd-phase", "x-prefiller-host-port"],
    "endpoints": [
        {"address": "10.0.0.1:1", "role": "prefill", "models": ["m"]},
        {"address": "10.0.0.1:2", "role": "prefill", "models": ["m"]},
        {"address": "10.0.0.2:1", "role": "decode", "models": ["m"]},
        {"address": "10.0.0.2:2", "role": "decode", "models": ["m"]}
    ]
}"#;

const PARAMS: &str =
    r#"{"do_remote_prefill":true,"remote_block_ids":[[1]],"remote_request_id":"r","n":18446744073709551617}"#;

struct Fixture {
    worker: Worker,
    request: Request,
    now: Monotonic,
}

fn fixture() -> Fixture {
    configured(CONFIG)
}

fn configured(config: &str) -> Fixture {
    let mut worker = Worker::default();
    worker.configure(config.as_bytes()).unwrap();
    Fixture { worker, request: Request::default(), now: Monotonic::from_secs(5) }
}

fn long_body() -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}],"stream":true}}"#, "word ".repeat(600))
}

impl Fixture {
    fn headers(&mut self, extra: &[(&str, &str)]) -> Outcome {
        let pseudo =
            [(":method", "POST"), (":path", "/v1/chat/completions"), (":authority", "a"), ("content-length", "9")];
        let headers = Headers::from_pairs(pseudo.iter().chain(extra).map(|(name, value)| (*name, *value)));
        self.request.headers(&mut self.worker, headers, false, self.now)
    }

    fn body(&mut self, body: &str) -> Outcome {
        self.request.body(&mut self.worker, body.as_bytes(), self.now)
    }

    fn answer(&mut self, status: u16, body: &str) -> Outcome {
        let answer = PrefillAnswer::Answered { status, content_type: Some(b"application/json"), body: body.as_bytes() };
        self.request.prefill_answer(&mut self.worker, answer, || Some(long_body()), self.now)
    }

    fn done(&mut self) {
        self.request.done(&mut self.worker, self.now);
    }

    /// Whether nothing is in flight, anywhere.
    fn is_idle(&self) -> bool {
        let gauges = [Metric::PrefillInFlight, Metric::DecodeInFlight, Metric::DecodeTokensInFlight];
        gauges.iter().all(|gauge| self.worker.counts.pending(*gauge) == 0)
            && self.worker.state.table.iter().all(|(_, state)| state.prefill.is_empty() && state.decode.requests == 0)
    }
}

fn state<'a>(outcome: &'a Outcome, path: &str) -> &'a str {
    let value = outcome.effects.iter().find_map(|effect| match effect {
        Effect::SetState(key, value) if *key == path => Some(value),
        _ => None,
    });
    value.map_or("", |value| core::str::from_utf8(value).unwrap())
}

/// The only endpoint that the destination names, for each of Envoy's tries; empty where it names none or several.
fn only_destination(outcome: &Outcome) -> &str {
    let destination = state(outcome, DESTINATION);
    let first = destination.split(',').next().unwrap_or_default();
    if destination == [first; TRIES].join(",") { first } else { "" }
}

fn call(outcome: &Outcome) -> &Call {
    let call =
        outcome.effects.iter().find_map(|effect| if let Effect::Call(call) = effect { Some(call) } else { None });
    call.unwrap_or_else(|| panic!("no call in {outcome:?}"))
}

fn leg_destination(outcome: &Outcome) -> String {
    String::from_utf8(call(outcome).headers.get("x-pd-destination").unwrap().to_vec()).unwrap()
}

fn reply(outcome: &Outcome) -> (u16, &'static str) {
    let reply =
        outcome.effects.iter().find_map(|effect| if let Effect::Reply(reply) = effect { Some(reply) } else { None });
    let reply = reply.unwrap_or_else(|| panic!("no reply in {outcome:?}"));
    (reply.status, reply.reason)
}

fn edited(outcome: &Outcome, body: &str) -> String {
    let mut body = body.as_bytes().to_vec();
    for effect in &outcome.effects {
        if let Effect::EditBody(edit) = effect {
            body.splice(..edit.drain as usize, edit.head.iter().copied());
        }
    }
    String::from_utf8(body).unwrap()
}

/// A gateway of that engine, whose long prompts are split.
fn of_engine(engine: &str) -> Fixture {
    configured(&CONFIG.replacen('{', &format!(r#"{{"pools":{{"default":{{"engine":"{engine}"}}}},"#), 1))
}

fn text(body: &[u8]) -> &str {
    core::str::from_utf8(body).unwrap()
}

/// The value of a member of a JSON object.
fn member<'a>(body: &'a str, key: &str) -> &'a str {
    let value = crate::body::json::raw_member(body.as_bytes(), &[key]).unwrap();
    text(value.unwrap_or_else(|| panic!("no {key} in {body}")))
}
