//! Arbitrary sequences of events on a worker and its requests, and what must hold after each of them.

use std::time::Duration;

use hashbrown::HashSet;

use pd_core::body::{FORBIDDEN, KeySet, scan};
use pd_core::headers::Headers;
use pd_core::metrics::Metric;
use pd_core::request::upstream::Answerer;
use pd_core::request::{DESTINATION, Effect, Flow, Outcome, PrefillAnswer, Request};
use pd_core::time::Monotonic;
use pd_core::workers::worker::Worker;

/// Bytes that drive everything: each choice takes from the front, and zeros follow the end.
pub struct Choices<'a>(pub &'a [u8]);

impl<'a> Choices<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, bound: u8) -> u8 {
        self.byte() % bound
    }

    fn bytes(&mut self) -> &'a [u8] {
        let len = usize::from(self.byte()).min(self.0.len());
        let (bytes, rest) = self.0.split_at(len);
        self.0 = rest;
        bytes
    }
}

const CONFIGS: [&str; 8] = [
    r#"{"trusted_headers":["x-pd-phase","x-prefiller-host-port"],"max_body_bytes":4096,"prefix":{"block_bytes":64},
        "pools":{"default":{"split":{"uncached_tokens":1}}},"endpoints":[
        {"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.1:2","role":"prefill"},
        {"address":"10.0.0.2:1","role":"decode"},{"address":"10.0.0.2:2","role":"both"}]}"#,
    r#"{"prefix":{"block_bytes":64,"index_bytes":65536},"pools":{"default":{"on_prefill_failure":"fail","split":{"mode":"always"},
        "cache_tokens":100,"queue":{"enabled":true,"lead_ms":1,"max_wait_ms":2000,"max_requests":3,"no_endpoint_ms":1500}}},"endpoints":[{"address":"10.0.0.1:1","role":"prefill","models":["m"],"group":"g"},
        {"address":"10.0.0.2:1","role":"decode","models":["m"],"group":"g"},{"address":"10.0.0.2:2","role":"decode","models":["m"]}]}"#,
    r#"{"pools":{"default":{"engine":"vllm-shared","split":{"mode":"always"},"prefill_attempts":8,"alternates":0}},
        "endpoints":[{"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.2:1","role":"decode"}]}"#,
    "",
    r#"{"prefix":{"block_bytes":64},"max_body_bytes":1024,"pools":{"default":{"engine":"sglang"}},"endpoints":[
        {"address":"10.0.0.1:1","role":"prefill","rank":0},{"address":"10.0.0.1:1","role":"prefill","rank":1},
        {"address":"10.0.0.2:1","role":"decode","rank":0},{"address":"10.0.0.2:2","role":"decode","rank":1}]}"#,
    r#"{"prefix":{"block_bytes":64},"pools":{"default":{"engine":"mooncake","split":{"uncached_tokens":1}}},"endpoints":[
        {"address":"10.0.0.1:1","role":"prefill","bootstrap_port":9},{"address":"10.0.0.1:2","role":"prefill"},
        {"address":"10.0.0.2:1","role":"decode"},{"address":"10.0.0.2:2","role":"decode"}]}"#,
    r#"{"prefix":{"block_bytes":64},"pools":{"default":{"engine":"trtllm","split":{"mode":"always"},"queue":{"enabled":true,"lead_ms":1}}},"endpoints":[
        {"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.2:1","role":"decode"},
        {"address":"10.0.0.1:2","role":"prefill","engine":"neuron"},{"address":"10.0.0.2:2","role":"decode","engine":"neuron"}]}"#,
    r#"{"prefix":{"block_bytes":64},"pools":{"default":{"engine":"sidecar","split":{"uncached_tokens":1},"queue":{"enabled":true,"lead_ms":1}}},"endpoints":[
        {"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.2:1","role":"decode","rank":3}]}"#,
];
const BODIES: [&str; 13] = [
    r#"{"model":"m","messages":[{"role":"user","content":"a rather long prompt that fills more than one block of the index, twice and more"}],"stream":true}"#,
    r#"{"kv_transfer_params":{"do_remote_prefill":true},"model":"m","prompt":"p","kv_transfer\u005fparams":1}"#,
    r#"{"model":"x","input":[],"max_tokens":18446744073709551615}"#,
    r#"{"model":"m","prompt":["a rather long prompt that fills more than one block of the index","b"],"n":3}"#,
    r#"{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAjAAAAK8CAIAAAAA"}},{"type":"input_audio","input_audio":{"data":"UklGRg=="}}]}],"stream":"x"}"#,
    r#"{"model":"m","input":[{"type":"input_image","image_url":"https://a"},{"source":{"source":{"type":"base64","data":"/9j/4AAQ"}}}],"previous_response_id":"resp_1"}"#,
    r#"{"model":"m","input":"a rather long prompt that fills more than one block of the index","stream":true,"vllm_xargs":{"kv_transfer_params":[]}}"#,
    r#"{"model":"m","prompt":"a rather long prompt that fills more than one block of the index","echo":true,"logprobs":1,"min_tokens":17}"#,
    r#"{"model":"m","messages":[{"content":"a rather long prompt that fills more than one block of the index"}],"sampling_params":{"extra_args":{"kv_transfer_params":0},"stop":5}}"#,
    "--B\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--B\r\nContent-Disposition: form-data; name=\"kv_transfer_params\"\r\n\r\n{}\r\n--B--\r\n",
    r#"{"model":"m","max_tokens":900,"truncate_prompt_tokens":-1,"messages":[{"content":[{"type":"text","text":"a rather long prompt that fills more than one block of the index","cache_control":{}}]}]}"#,
    "{}",
    "",
];
const ANSWERS: [&str; 6] = [
    r#"{"kv_transfer_params":{"do_remote_prefill":true,"remote_block_ids":[[1]],"remote_request_id":"r"}}"#,
    r#"{"kv_transfer_params":null}"#,
    r#"{"0":{"engine_id":"e"},"1":{"engine_id":1}}"#,
    r#"{"disaggregated_params":{"request_type":"context_only"},"prompt_token_ids":[1]}"#,
    "upstream connect error",
    "",
];
const PATHS: [&str; 9] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses?x",
    "/v1/models",
    "/other",
    "/v1/responses/resp_1/cancel",
    "/v1/messages",
    "/inference/v1/generate",
    "/v1/audio/transcriptions",
];
const HEADERS: [(&str, &str); 6] = [
    ("x-pd-phase", "prefill"),
    ("x-pd-phase", "decode"),
    ("x-prefiller-host-port", "10.0.0.1:2,10.0.0.1:1"),
    ("x-pd-destination", "6.6.6.6:6"),
    ("content-length", "17"),
    ("content-type", "multipart/form-data; boundary=B"),
];
const LISTS: [&str; 4] = [
    r#"{"wire":1,"epoch":"e","version":1,"endpoints":[{"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.3:3","role":"both"}]}"#,
    r#"{"wire":1,"epoch":"e","version":2,"base":1,"endpoints":[{"address":"10.0.0.2:1","role":"decode","state":"draining"}],"removed":["10.0.0.1:1"]}"#,
    r#"{"wire":1,"epoch":"f","version":1,"endpoints":[{"address":"10.0.0.2:1","role":"prefill","weight":0.01},{"address":"10.0.0.1:1","role":"decode"}]}"#,
    r#"{"wire":1,"epoch":"g","version":1,"models":[{"id":"m","max_model_len":40}]}"#,
];

struct Live {
    request: Request,
    body: Vec<u8>,
}

/// A worker with the requests that live there.
struct Run<'a> {
    choices: Choices<'a>,
    worker: Worker,
    live: Vec<Live>,
    /// Every address that a list or the configuration has named so far.
    known: HashSet<String>,
    now: Monotonic,
}

/// Runs the events that `input` spells and checks what must hold.
///
/// # Panics
/// When something does not.
pub fn run(input: &[u8]) {
    let mut choices = Choices(input);
    let mut worker = Worker::default();
    let _ = worker.configure(CONFIGS[usize::from(choices.below(8))].as_bytes());
    let known = addresses(&worker);
    let mut run = Run { choices, worker, live: Vec::new(), known, now: Monotonic::from_secs(1) };
    for _ in 0..256 {
        if run.choices.0.is_empty() {
            break;
        }
        run.event();
    }
    run.end();
}

impl Run<'_> {
    fn event(&mut self) {
        let event = self.choices.below(12);
        if event == 0 || self.live.is_empty() {
            return self.arrive();
        }
        let index = usize::from(self.choices.byte()) % self.live.len();
        match event {
            1 | 2 => self.body(index),
            3 | 4 => self.prefill_answer(index),
            5 => {
                let bytes = usize::from(self.choices.byte()) << 5;
                let outcome = self.live[index].request.body_part(&mut self.worker, bytes);
                check(&outcome, b"", &self.known);
            }
            6 => self.response_headers(index),
            7 => self.response_part(index),
            8 => {
                let mut live = self.live.remove(index);
                live.request.done(&mut self.worker, self.now);
            }
            9 => self.list(),
            10 => self.now += Duration::from_millis(u64::from(self.choices.byte()) * 8),
            _ => self.worker.prune(self.now),
        }
        self.take_turns();
    }

    fn arrive(&mut self) {
        let Self { choices, worker, .. } = self;
        let mut headers = vec![(":method", "POST"), (":path", PATHS[usize::from(choices.below(9))])];
        let extra = choices.byte();
        headers.extend((0..6).filter(|bit| extra & (1 << bit) != 0).map(|bit| HEADERS[bit]));
        let headers = match choices.below(8) {
            0 => Headers::from_wire(choices.bytes().to_vec()),
            _ => Headers::from_pairs(headers),
        };
        let mut request = Request::default();
        let outcome = request.headers(worker, headers, choices.below(8) == 0, self.now);
        check(&outcome, b"", &self.known);
        self.live.push(Live { request, body: Vec::new() });
    }

    fn body(&mut self, index: usize) {
        let Self { choices, worker, live, .. } = self;
        let Live { request, body } = &mut live[index];
        let text = match choices.below(8) {
            0 => choices.bytes(),
            n => BODIES[usize::from(choices.byte().wrapping_add(n)) % BODIES.len()].as_bytes(),
        };
        let wanted = request.wants_body();
        let outcome = request.body(worker, text, self.now);
        if wanted {
            *body = text.to_vec();
            check(&outcome, body, &self.known);
        } else {
            assert_eq!(outcome.effects, []);
        }
    }

    fn prefill_answer(&mut self, index: usize) {
        let Self { choices, worker, live, .. } = self;
        let Live { request, body } = &mut live[index];
        let text = match choices.below(6) {
            0 => choices.bytes(),
            n => ANSWERS[usize::from(n) % 6].as_bytes(),
        };
        let status = [200, 200, 200, 400, 429, 500, 503, 504][usize::from(choices.below(8))];
        let answer = match choices.below(8) {
            0 => PrefillAnswer::None,
            1 => PrefillAnswer::NotStarted,
            _ => PrefillAnswer::Answered { status, content_type: None, body: text },
        };
        let waiting = request.awaits_call();
        let again = (choices.below(8) > 0).then(|| body.clone());
        let outcome = request.prefill_answer(worker, answer, || again, self.now);
        if waiting {
            check(&outcome, body, &self.known);
        } else {
            assert_eq!(outcome, Outcome { flow: Flow::Pause, effects: vec![] });
        }
    }

    fn response_headers(&mut self, index: usize) {
        let Self { choices, worker, live, .. } = self;
        let request = &mut live[index].request;
        let host = ["10.0.0.2:1", "10.0.0.2:2", "10.0.0.1:1"][usize::from(choices.below(3))].as_bytes();
        let answerers =
            [Answerer::Host(host), Answerer::FailedAttempt(Some(host)), Answerer::FailedConnect(None), Answerer::Envoy];
        let answerer = answerers[usize::from(choices.below(4))];
        let status = [Some(200), Some(503), None][usize::from(choices.below(3))];
        let Outcome { flow, effects } = request.response_headers(worker, answerer, status, self.now);
        // A server that only prefills must not generate: the filter answers in its place.
        let is_replaced = matches!(effects.last(), Some(Effect::Reply(_)));
        let is_held = flow == Flow::Pause;
        assert!(!is_held || is_replaced || request.awaits_call(), "nothing will let the response go");
        if let (None, Some(status)) = (answerer.host(), status) {
            let types: [Option<&[u8]>; 3] = [None, Some(b"text/plain"), Some(b"application/json")];
            let content_type = types[usize::from(choices.below(3))];
            let outcome = request.envoys_error(status, content_type, choices.below(2) == 0);
            check(&outcome, b"", &self.known);
            assert!(!is_replaced || outcome.effects.is_empty(), "two answers");
        }
    }

    fn response_part(&mut self, index: usize) {
        let Self { choices, worker, live, .. } = self;
        let request = &mut live[index].request;
        request.first_byte(worker, self.now);
        let text = match choices.below(4) {
            0 => choices.bytes(),
            n => ANSWERS[usize::from(n) % 6].as_bytes(),
        };
        let reads = request.wants_response_body();
        let outcome = request.response_part(worker, text, choices.below(2) == 0, self.now);
        assert!(reads || outcome.effects.is_empty());
    }

    fn list(&mut self) {
        let _ = match self.choices.below(6) {
            0 => self.worker.apply(self.choices.bytes()),
            n => self.worker.apply(LISTS[usize::from(n) % 4].as_bytes()),
        };
        self.known.extend(addresses(&self.worker));
    }

    /// Passes turns to the requests that they are for. A turn ends the wait, or begins another one.
    fn take_turns(&mut self) {
        for _ in 0..64 {
            let Some(turn) = self.worker.next_turn(self.now) else { return };
            let waiting = self.live.iter_mut().find(|live| live.request.waiting_id() == Some(turn.id));
            let Live { request, body } = waiting.expect("a turn of a request that waits");
            let outcome = request.turn(&mut self.worker, turn, || Some(body.clone()), self.now);
            check(&outcome, body, &self.known);
            assert_ne!(request.waiting_id(), Some(turn.id));
        }
        panic!("turns without end");
    }

    /// Ends every request: nothing may be left of any.
    fn end(self) {
        let Self { mut worker, live, now, .. } = self;
        for Live { mut request, .. } in live {
            request.done(&mut worker, now);
        }
        assert!(worker.state.waiting.is_empty() && !worker.has_waiting(), "a request waits that is over");
        worker.prune(now + Duration::from_secs(7_200));
        for (_, state) in worker.state.table.iter() {
            assert!(state.prefill.is_empty(), "prefill work is left at {}", state.address);
            assert_eq!(
                (state.decode.requests, state.decode.tokens),
                (0, 0),
                "decode work is left at {}",
                state.address
            );
        }
        for gauge in [Metric::PrefillInFlight, Metric::DecodeInFlight, Metric::DecodeTokensInFlight] {
            assert_eq!(worker.counts.pending(gauge), 0, "{gauge:?}");
        }
    }
}

fn addresses(worker: &Worker) -> HashSet<String> {
    let both = |state: &pd_core::endpoints::endpoint_state::EndpointState| {
        [state.address.to_string(), state.bootstrap.to_string()]
    };
    worker.state.table.iter().flat_map(|(_, state)| both(state)).collect()
}

/// Endpoints come from a list, nothing forbidden leaves, and a paused request has somebody to wait for.
fn check(outcome: &Outcome, body: &[u8], known: &HashSet<String>) {
    let named = |value: &[u8]| {
        for address in core::str::from_utf8(value).unwrap().split(',') {
            assert!(known.contains(address), "{address:?} was never in the list");
        }
    };
    let forbidden = |body: &[u8]| scan(body).map_or(KeySet::EMPTY, |scan| scan.keys().intersection(FORBIDDEN));
    let mut sent = body.to_vec();
    let (mut calls, mut replies, mut splices, mut is_sent) = (0, 0, false, false);
    for effect in &outcome.effects {
        match effect {
            Effect::SetState(path, value) if *path == DESTINATION => {
                is_sent = true;
                named(value);
            }
            Effect::SetState(..)
            | Effect::RemoveHeader(_)
            | Effect::SetPath(_)
            | Effect::SetHeader(..)
            | Effect::AddResponseHeader(..)
            | Effect::RemoveResponseHeader(_)
            | Effect::EditResponse(_)
            | Effect::Warn(_)
            | Effect::ResumeResponse => {}
            Effect::EditBody(edit) => {
                let head = String::from_utf8_lossy(&edit.head);
                let ours = ["kv_transfer_params", "bootstrap_room", "disaggregated_params", "disagg_prefill_resp"];
                splices = ours.iter().any(|key| head.contains(key));
                sent.splice(..edit.drain as usize, edit.head.iter().copied());
                // What is edited is JSON, or a form.
                let is_form = body.starts_with(b"--B");
                assert!(scan(&sent).is_ok() || is_form, "{}", String::from_utf8_lossy(&sent));
            }
            Effect::Call(call) => {
                calls += 1;
                named(call.headers.get("x-pd-destination").unwrap());
                assert!(scan(&call.body).is_ok() || call.body.is_empty());
                assert!(!String::from_utf8_lossy(&call.body).contains("\"do_remote_prefill\":true"));
            }
            Effect::Reply(reply) => {
                replies += 1;
                assert!((400..600).contains(&reply.status));
            }
        }
    }
    assert!(calls + replies <= 1);
    if calls + replies > 0 && !(is_sent && replies == 0) {
        assert_eq!(outcome.flow, Flow::Pause);
    } else if outcome.flow == Flow::Continue && !splices {
        assert!(forbidden(&sent).is_empty(), "{}", String::from_utf8_lossy(&sent));
    }
}
