//! Both legs of every engine and API, byte for byte, as files under `goldens/`. `PD_GOLDENS=write` writes them anew: read
//! the difference before you commit it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use pd_core::headers::Headers;
use pd_core::request::{Call, DECISION, DESTINATION, Effect, Outcome, PREFILLER, PrefillAnswer, RANK, REASON, Request};
use pd_core::time::Monotonic;
use pd_core::wire::Engine;
use pd_core::worker::Worker;

/// Client requests: name, path, body. Key order, white space, numbers and unknown members are what a client may send.
const REQUESTS: &[(&str, &str, &str)] = &[
    (
        "chat",
        "/v1/chat/completions",
        r#"{"model":"m","messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Why?","x":1}],"max_tokens":64}"#,
    ),
    (
        "chat-stream",
        "/v1/chat/completions",
        r#"{ "stream" : true, "stream_options":{"include_usage":true},"model":"m","messages":[{"role":"user","content":"a \"b\" \u00e9 é"}],"max_completion_tokens":64,"stop":["\n\n"],"min_tokens":3,"seed":9007199254740993,"temperature":0.70,"vendor":{"k":[1.0e5,-0]} }"#,
    ),
    (
        "chat-multimodal",
        "/v1/chat/completions",
        r#"{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"What is this?"},{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0KGgo=","detail":"low"}},{"type":"input_audio","input_audio":{"data":"UklGRg==","format":"wav"}}]}]}"#,
    ),
    (
        "chat-tools",
        "/v1/chat/completions",
        r#"{"model":"m","tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"max_tokens":{"type":"integer"}}}}}],"tool_choice":"auto","parallel_tool_calls":false,"messages":[{"role":"user","content":"Call f"},{"role":"assistant","tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\"stream\":true}"}}]},{"role":"tool","tool_call_id":"1","content":"2"}]}"#,
    ),
    (
        "chat-schema",
        "/v1/chat/completions",
        r#"{"model":"m","messages":[{"role":"user","content":"JSON"}],"response_format":{"type":"json_schema","json_schema":{"name":"s","strict":true,"schema":{"type":"object","properties":{"stop":{"type":"string"}},"required":["stop"]}}},"logprobs":true,"top_logprobs":2}"#,
    ),
    (
        "chat-several",
        "/v1/chat/completions",
        r#"{"n":3,"model":"m","messages":[{"role":"user","content":"Three answers"}]}"#,
    ),
    (
        "chat-forged",
        "/v1/chat/completions",
        r#"{"kv_transfer_params":{"do_remote_prefill":true},"model":"m","bootstrap_room":1,"messages":[],"disaggregated_params":{},"disagg_prefill_resp":{},"bootstrap\u005fhost":"evil"}"#,
    ),
    ("completions", "/v1/completions", r#"{"model":"m","prompt":"Once","max_tokens":5,"echo":false,"logprobs":1}"#),
    ("completions-token-ids", "/v1/completions", r#"{"model":"m","prompt":[1, 2, 3],"stream":true}"#),
    ("completions-batch", "/v1/completions", r#"{"model":"m","prompt":["One","Two"],"max_tokens":5,"stop":"."}"#),
    ("completions-batch-token-ids", "/v1/completions", r#"{"model":"m","prompt":[[1,2],[3]],"best_of":1}"#),
    (
        "responses",
        "/v1/responses",
        r#"{"model":"m","instructions":"Be brief.","input":[{"role":"user","content":[{"type":"input_text","text":"Hi"}]}],"tools":[],"max_output_tokens":64,"stream":true,"store":true,"background":false,"previous_response_id":null,"reasoning":{"effort":"low"}}"#,
    ),
    (
        "messages",
        "/v1/messages",
        r#"{"model":"m","system":[{"type":"text","text":"Be brief.","cache_control":{"type":"ephemeral"}}],"messages":[{"role":"user","content":"Hi"}],"max_tokens":64,"stop_sequences":["END"],"stream":true,"thinking":{"type":"disabled"}}"#,
    ),
    (
        "generate",
        "/inference/v1/generate",
        r#"{"model":"m","token_ids":[1,2,3],"sampling_params":{"max_tokens":64,"stop":["END"],"temperature":0.0,"seed":18446744073709551615,"min_tokens":2},"stream":true,"cache_salt":"s"}"#,
    ),
];

const CONFIG: &str = r#"{"pools":{"default":{"engine":"ENGINE","split":{"mode":"always"},"bootstrap_port":8998}},"endpoints":[
    {"address":"10.0.0.1:8000","role":"prefill","rank":2},{"address":"10.0.1.1:8000","role":"decode","rank":5}]}"#;

/// What a prefill endpoint of that engine answers: text that nobody can parse and rebuild without a trace.
fn answer(engine: Engine) -> &'static str {
    match engine {
        Engine::VllmNixl => {
            r#"{"id":"x","choices":[{"finish_reason":"length"}],"kv_transfer_params" : { "do_remote_prefill":true,"do_remote_decode":false, "remote_block_ids":[[1,2], [ ]],"remote_engine_id":"e\/1","remote_request_id":"r-1","remote_host":"10.0.0.1","remote_port":5600,"new":18446744073709551617 }}"#
        }
        Engine::Trtllm => {
            r#"{"id":"x","choices":[{"finish_reason":"length","disaggregated_params":{"request_type" : "context_only","first_gen_tokens":[9],"ctx_request_id":18446744073709551617,"opaque_state":"a\/b=="}}],"prompt_token_ids":[ 101,102 ]}"#
        }
        Engine::Neuron => " {\"id\":\"x\", \"choices\":[{\"finish_reason\":\"length\"}],\"n\":1.0e-7}\n",
        Engine::VllmShared | Engine::Sglang | Engine::Mooncake | Engine::Sidecar => r#"{"id":"x"}"#,
    }
}

/// What a request becomes.
struct Legs {
    worker: Worker,
    request: Request,
    text: String,
}

impl Legs {
    fn note(&mut self, outcome: &Outcome, body: &str) -> Option<Call> {
        let state = |path: &str| {
            let value = outcome.effects.iter().find_map(|effect| match effect {
                Effect::SetState(key, value) if *key == path => Some(value.as_slice()),
                _ => None,
            });
            String::from_utf8(value.unwrap_or_default().to_vec()).unwrap()
        };
        let (mut call, mut sent) = (None, body.as_bytes().to_vec());
        for effect in &outcome.effects {
            match effect {
                Effect::Call(leg) => call = Some(leg.clone()),
                Effect::EditBody(edit) => drop(sent.splice(..edit.drain as usize, edit.head.iter().copied())),
                Effect::Reply(reply) => panic!("{reply:?}"),
                _ => {}
            }
        }
        if let Some(Call { headers, body, .. }) = &call {
            let shown = [":method", ":path", "x-pd-destination", "x-data-parallel-rank"];
            let shown = shown.iter().filter_map(|name| Some(format!("{name}: {}", text(headers.get(name)?))));
            let _ = write!(self.text, "== call\n{}\n{}\n", shown.collect::<Vec<_>>().join("\n"), text(body));
        }
        if !state(DESTINATION).is_empty() {
            let _ = write!(self.text, "== forwarded\ndecision: {} {}\n", state(DECISION), state(REASON));
            for (name, path) in [
                ("x-pd-destination", DESTINATION),
                ("x-data-parallel-rank", RANK),
                ("x-prefiller-host-port", PREFILLER),
            ] {
                if !state(path).is_empty() {
                    let _ = writeln!(self.text, "{name}: {}", state(path));
                }
            }
            let _ = writeln!(self.text, "{}", text(&sent));
        }
        call
    }
}

fn text(bytes: &[u8]) -> &str {
    core::str::from_utf8(bytes).unwrap()
}

fn legs(engine: Engine, path: &str, body: &str) -> String {
    let now = Monotonic::from_secs(1);
    let mut worker = Worker::default();
    let name = serde_json::to_value(engine).unwrap();
    worker.configure(CONFIG.replace("ENGINE", name.as_str().unwrap()).as_bytes()).unwrap();
    let mut legs = Legs { worker, request: Request::default(), text: format!("== client\n:path: {path}\n{body}\n") };
    let headers = [(":method", "POST"), (":path", path), ("x-request-id", "golden")];
    legs.request.headers(&mut legs.worker, Headers::from_pairs(headers), false, now);
    let outcome = legs.request.body(&mut legs.worker, body.as_bytes(), now);
    let mut call = legs.note(&outcome, body);
    while let Some(Call { headers, .. }) = call.take().filter(|_| legs.request.is_prefilling()) {
        let is_question = headers.get(":method") == Some(b"GET");
        let answer = if is_question { r#"{"2":{"engine_id":"e-2"}}"# } else { answer(engine) };
        let answer = PrefillAnswer::Answered { status: 200, content_type: None, body: answer.as_bytes() };
        let outcome = legs.request.prefill_answer(&mut legs.worker, answer, || Some(body), now);
        call = legs.note(&outcome, body);
    }
    legs.text
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

#[test]
fn every_leg_of_every_engine_and_api_is_what_it_was() {
    let writes = std::env::var("PD_GOLDENS").is_ok_and(|value| value == "write");
    let mut differ = Vec::new();
    for engine in Engine::ALL {
        let name = serde_json::to_value(engine).unwrap();
        let mut all = String::new();
        for (request, path, body) in REQUESTS {
            let _ = write!(all, "#### {request}\n{}\n", legs(*engine, path, body));
        }
        let file = directory().join(format!("{}.txt", name.as_str().unwrap()));
        if writes {
            std::fs::create_dir_all(directory()).unwrap();
            std::fs::write(&file, &all).unwrap();
        } else if std::fs::read_to_string(&file).unwrap_or_default() != all {
            differ.push(file);
        }
    }
    assert!(differ.is_empty(), "changed: {differ:?}; PD_GOLDENS=write writes them anew");
}

#[test]
fn both_legs_are_json_and_hold_what_the_client_sent() {
    for engine in Engine::ALL {
        for (request, path, body) in REQUESTS {
            let text = legs(*engine, path, body);
            let sent: serde_json::Value = serde_json::from_str(body).unwrap();
            let bodies = text.lines().filter(|line| line.starts_with('{')).skip(1);
            let mut count = 0;
            for leg in bodies {
                let leg: serde_json::Value = serde_json::from_str(leg).unwrap_or_else(|error| panic!("{error}: {leg}"));
                for key in ["messages", "tools", "input", "system", "token_ids", "response_format", "seed", "vendor"] {
                    assert_eq!(leg.get(key), sent.get(key), "{engine:?} {request} {key}");
                }
                count += 1;
            }
            assert!((1..=2).contains(&count), "{engine:?} {request}: {text}");
            assert!(!text.split("== call").skip(1).any(|leg| leg.contains("evil")), "{text}");
        }
    }
}
