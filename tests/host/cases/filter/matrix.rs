//! The fault matrix: engine × fault × streaming or not. Each cell says what the client gets, what each
//! server did and how long it takes. In every cell the ledger is back at zero, no parameters are sent twice, nothing hangs.
//!
//! `matrix.txt` is the whole of it. `PD_GOLDENS=write` writes it anew: read the difference before you commit it.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use pd_host::{Callout, Forwarded, Request, Stream};

use crate::gateway::*;

const ENGINES: [&str; 7] = ["vllm-nixl", "vllm-shared", "sglang", "trtllm", "mooncake", "neuron", "sidecar"];

/// What goes wrong, and in which phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Nothing,
    /// The prefill endpoint refuses the connection: once, or all of them do.
    PrefillRefusesOnce,
    PrefillRefuses,
    /// The connection is reset without an answer.
    PrefillResets,
    Prefill500,
    Prefill429,
    Prefill400,
    /// No answer within the pool's limit.
    PrefillHangs,
    /// The host does not start the call-out.
    PrefillNotStarted,
    /// An answer without parameters, with unusable ones, and one that ends early.
    ParamsMissing,
    ParamsUnusable,
    ParamsTruncated,
    /// The prefill endpoint, or every one, leaves the list during the leg.
    PrefillLeaves,
    EveryoneLeaves,
    /// The client goes during the prefill leg.
    ClientGoesInPrefill,
    /// The decode endpoint refuses the connection, and Envoy goes on to the next; or all do.
    DecodeRefusesOnce,
    DecodeRefuses,
    Decode503,
    Decode400,
    /// Envoy's own limit for the first byte passes.
    DecodeHangs,
    /// An error event in a 200 stream.
    DecodeErrorEvent,
    /// The connection ends in mid-stream.
    DecodeDies,
    DecodeLeaves,
    ClientGoesBeforeFirstByte,
    ClientGoesInStream,
}

use Fault::*;

const FAULTS: [Fault; 25] = [
    Nothing,
    PrefillRefusesOnce,
    PrefillRefuses,
    PrefillResets,
    Prefill500,
    Prefill429,
    Prefill400,
    PrefillHangs,
    PrefillNotStarted,
    ParamsMissing,
    ParamsUnusable,
    ParamsTruncated,
    PrefillLeaves,
    EveryoneLeaves,
    ClientGoesInPrefill,
    DecodeRefusesOnce,
    DecodeRefuses,
    Decode503,
    Decode400,
    DecodeHangs,
    DecodeErrorEvent,
    DecodeDies,
    DecodeLeaves,
    ClientGoesBeforeFirstByte,
    ClientGoesInStream,
];

/// Limit of a prefill leg here.
const LEG: Duration = Duration::from_secs(2);

/// What an engine's prefill endpoint answers when all is well.
fn good(engine: &str) -> String {
    match engine {
        "vllm-nixl" => prefilled(),
        "trtllm" => r#"{"choices":[{"finish_reason":"length","disaggregated_params":{"request_type":"context_only","ctx_request_id":7}}],"prompt_token_ids":[1,2]}"#.to_owned(),
        "neuron" => r#"{"id":"x","choices":[]}"#.to_owned(),
        _ => "{}".to_owned(),
    }
}

fn is_question(call: &Callout) -> bool {
    call.header(":path") == Some(b"/query")
}

struct Cell<'a> {
    engine: &'a str,
    fault: Fault,
    gateway: Gateway,
    legs: Vec<Callout>,
}

impl Cell<'_> {
    /// Runs the calls that are in flight until there are none.
    fn run_calls(&mut self, stream: &Stream) {
        for _ in 0..16 {
            let Some(call) = legs(&self.gateway).into_iter().next() else { return };
            if is_question(&call) {
                self.gateway.answer(call.token, [(":status", "200")], r#"{"0":{"engine_id":"e"}}"#).unwrap();
                continue;
            }
            self.legs.push(call.clone());
            self.answer(stream, call.token);
        }
        panic!("calls without end: {:?} {}", self.fault, self.engine);
    }

    fn answer(&self, stream: &Stream, token: u32) {
        let answer = |status: &str, body: &str| {
            self.gateway.answer(token, [(":status", status), ("content-type", "application/json")], body).unwrap();
        };
        let is_first = self.legs.len() == 1;
        match self.fault {
            PrefillRefusesOnce if is_first => self.gateway.refuse(token).unwrap(),
            PrefillRefuses => self.gateway.refuse(token).unwrap(),
            PrefillResets => self.gateway.fail(token).unwrap(),
            Prefill500 => answer("500", r#"{"error":"broken"}"#),
            Prefill429 => answer("429", r#"{"error":"busy"}"#),
            Prefill400 => answer("400", r#"{"error":"too long"}"#),
            PrefillHangs => self.gateway.advance(LEG),
            ParamsMissing => answer("200", "{}"),
            ParamsUnusable => answer("200", r#"{"kv_transfer_params":null,"disaggregated_params":1}"#),
            ParamsTruncated => answer("200", r#"{"kv_transfer_params":{"do_remote_prefill":true,"#),
            PrefillLeaves => {
                push(&self.gateway, &list("e", 2, &[(P2, "prefill"), (D1, "decode"), (D2, "decode")]));
                self.gateway.tick();
                answer("200", &good(self.engine));
            }
            EveryoneLeaves => {
                push(&self.gateway, &list("e", 2, &[("10.9.9.9:1", "prefill")]));
                self.gateway.tick();
                answer("200", &good(self.engine));
            }
            ClientGoesInPrefill => {
                stream.reset();
                answer("200", &good(self.engine));
            }
            _ => answer("200", &good(self.engine)),
        }
    }

    /// What Envoy and the decode endpoint do with a request that reached the router.
    fn decode(&self, stream: &Stream, sent: &Forwarded, is_stream: bool) {
        let to = destinations(sent);
        let content_type = if is_stream { "text/event-stream" } else { "application/json" };
        let headers =
            |status: &str| stream.response_headers([(":status", status), ("content-type", content_type)], false);
        let from = |address: &str| stream.set_property("upstream.address", address);
        let envoys_own = |status: &str, details: &str| {
            stream.set_property("response.code_details", details);
            headers(status);
            stream.response_body("upstream connect error", true);
        };
        match self.fault {
            ClientGoesBeforeFirstByte => stream.reset(),
            DecodeRefusesOnce => {
                from(&to[1]);
                headers("200");
                stream.response_body("{}", true);
            }
            DecodeRefuses => envoys_own("503", "upstream_reset_before_response_started{connection_failure}"),
            DecodeHangs => envoys_own("504", "stream_idle_timeout"),
            Decode503 | Decode400 => {
                from(&to[0]);
                headers(if self.fault == Decode503 { "503" } else { "400" });
                stream.response_body(r#"{"error":"mine"}"#, true);
            }
            _ => {
                from(&to[0]);
                headers("200");
                if self.fault == DecodeLeaves {
                    push(&self.gateway, &list("e", 3, &[(P1, "prefill"), ("10.9.9.9:1", "decode")]));
                    self.gateway.tick();
                }
                stream.response_body("data: {}\n\n", false);
                match self.fault {
                    DecodeDies | ClientGoesInStream => stream.reset(),
                    DecodeErrorEvent => drop(stream.response_body("data: {\"error\":{}}\n\n", true)),
                    _ => drop(stream.response_body("data: [DONE]\n\n", true)),
                }
            }
        }
    }
}

/// `early`: the decode endpoint has begun its answer when the prefill leg ends, where both go out at once.
fn cell(engine: &str, fault: Fault, is_stream: bool, early: bool) -> String {
    let pool = format!(r#""engine":"{engine}","prefill_timeout_ms":{}"#, LEG.as_millis());
    let gateway = Gateway::new(&config(&[r#""control":{"cluster":"pd-control"}"#], TWO_AND_TWO, &pool));
    gateway.tick();
    push(&gateway, &list("e", 1, TWO_AND_TWO));
    gateway.tick();
    let start = gateway.clock().now_ns();
    if fault == PrefillNotStarted {
        gateway.fail_host_call("proxy_http_call", pd_host::Fault::Once(10));
    }
    let body = chat(1, 3_000).replace(r#""stream":true"#, &format!(r#""stream":{is_stream}"#));
    let stream = Request::post(CHAT, &body).send(&gateway);
    let mut cell = Cell { engine, fault, gateway, legs: Vec::new() };
    // A question is answered before both legs go out.
    while let Some(question) = legs(&cell.gateway).into_iter().find(is_question) {
        cell.gateway.answer(question.token, [(":status", "200")], r#"{"0":{"engine_id":"e"}}"#).unwrap();
    }
    let mut is_served = false;
    if early && let Some(sent) = stream.forwarded().filter(|sent| sent.complete) {
        cell.decode(&stream, &sent, is_stream);
        is_served = true;
    }
    cell.run_calls(&stream);
    if !is_served
        && !stream.is_ended()
        && let Some(sent) = stream.forwarded().filter(|sent| sent.complete)
    {
        cell.decode(&stream, &sent, is_stream);
    }
    let took = Duration::from_nanos(cell.gateway.clock().now_ns() - start);
    let client = stream.client();
    assert!(stream.is_ended(), "{engine} {fault:?} hangs: {client:?}");
    assert!(took <= LEG * 2 + Duration::from_secs(1), "{engine} {fault:?}: {took:?}");

    let mut text = match (client.status(), client.complete, client.reset) {
        (Some(status), true, false) => status.to_string(),
        (Some(status), ..) => format!("{status} cut"),
        (None, ..) => "gone".to_owned(),
    };
    let _ = write!(text, " {}/{}", state(&stream, "decision"), state(&stream, "reason"));
    let _ = write!(text, " legs={}", cell.legs.len());
    if let Some(sent) = stream.forwarded().filter(|sent| sent.complete) {
        let sent = String::from_utf8(sent.body).unwrap();
        let keys = ["kv_transfer_params", "bootstrap_room", "disaggregated_params", "disagg_prefill_resp"];
        if keys.iter().any(|key| sent.contains(&format!("\"{key}\""))) {
            text.push_str(" kv");
        }
    }
    if client.header("x-pd-kv").is_some() {
        text.push_str(" x-pd-kv");
    }
    if took >= LEG {
        let _ = write!(text, " {}s", took.as_secs());
    }
    // Both legs name the same endpoint where they must, and a leg is run at each endpoint once.
    let tried: Vec<_> = cell.legs.iter().map(|leg| addresses(leg.header("x-pd-destination")).remove(0)).collect();
    assert!(tried.len() < 2 || tried[0] != tried[1], "{tried:?}");
    drop(stream);
    cell.gateway.tick();
    assert_gauges_are_zero(&cell.gateway.shared);
    assert!(!cell.gateway.is_failed());
    text
}

#[test]
fn every_fault_of_every_engine_ends_as_the_matrix_says() {
    let mut all = String::new();
    for fault in FAULTS {
        let _ = writeln!(all, "{fault:?}");
        for engine in ENGINES {
            let cells: Vec<_> = [false, true].map(|is_stream| cell(engine, fault, is_stream, false)).into();
            assert_eq!(cells[0], cells[1], "{engine} {fault:?}: streaming makes a difference");
            let _ = writeln!(all, "  {engine:12} {}", cells[0]);
            let early = cell(engine, fault, true, true);
            if early != cells[0] {
                let _ = writeln!(all, "  {engine:12} {early} (the answer had begun)");
            }
        }
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases/filter/matrix.txt");
    if std::env::var("PD_GOLDENS").is_ok_and(|value| value == "write") {
        std::fs::write(file, all).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    let differ: Vec<_> = all.lines().filter(|line| !expected.lines().any(|other| other == *line)).collect();
    assert!(all == expected, "other than in {}: {differ:#?}", file.display());
}
