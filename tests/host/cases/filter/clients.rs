//! What real clients send beside plain chats, on every path of an inference API.

use pd_host::{Request, Stream};

use crate::gateway::*;

/// Paths whose requests have a prompt, with what stands before the prompt in a short body and behind it.
const WITH_PROMPT: [(&str, &str); 5] = [
    (CHAT, r#""messages":[{"role":"user","content":"PROMPT"}],"max_tokens":8"#),
    ("/v1/completions", r#""prompt":"PROMPT","max_tokens":8"#),
    ("/v1/responses", r#""input":"PROMPT","max_output_tokens":8"#),
    ("/v1/messages", r#""messages":[{"role":"user","content":"PROMPT"}],"max_tokens":8"#),
    ("/inference/v1/generate", r#""token_ids":[1,2,3],"sampling_params":{"max_tokens":8}"#),
];

/// Paths whose requests have none, and one that the operator allows.
const WITHOUT_PROMPT: [&str; 24] = [
    "/v1/embeddings",
    "/embeddings",
    "/encode",
    "/pooling",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/classify",
    "/v1/classify",
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/batch",
    "/v1/audio/speech",
    "/v1/images/generations",
    "/v1/videos",
    "/generate",
    "/invocations",
    "/vertex_generate",
    "/api/chat",
    "/v2/embed",
    "/own/api",
];

const FORMS: [&str; 4] =
    ["/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits", "/v1/images/variations"];

/// Members by which engines take hand-over parameters: vLLM's, SGLang's, TensorRT-LLM's.
const FORBIDDEN: [&str; 18] = [
    "kv_transfer_params",
    "ec_transfer_params",
    "kv_hints",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "decode_tp_size",
    "encoder_urls",
    "need_wait_for_mm_inputs",
    "num_items_assigned",
    "http_worker_ipc",
    "data_parallel_rank",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
    "disaggregated_params",
    "disagg_prefill_resp",
    "prompt_token_ids_b64",
];

/// One prefill endpoint and one decode endpoint of the model `m`, which `gpt` stands for; another decode endpoint.
fn of_models(top: &str) -> String {
    format!(
        r#"{{"allowed_paths":["/own/*"],"models":{{"gpt":{{"targets":[{{"model":"m"}}]}},"asleep":{{"targets":[{{"model":"gone"}}]}}}},{top}"endpoints":[
            {{"address":"{P1}","role":"prefill","models":["m"]}},
            {{"address":"{D1}","role":"decode","models":["other"]}},
            {{"address":"{D2}","role":"decode","models":["m"]}}]}}"#
    )
}

fn body_of(members: &str, prompt: &str) -> String {
    format!(r#"{{"model":"m",{}}}"#, members.replace("PROMPT", prompt))
}

fn form(path: &str, model: &str) -> Request {
    form_of(path, &[("model", model)])
}

/// A form with a file in front of these fields.
fn form_of(path: &str, fields: &[(&str, &str)]) -> Request {
    let part = |head: &str, value: &str| format!("--b\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n");
    let file = part("name=\"file\"; filename=\"a.wav\"", &"RIFF".repeat(1_000));
    let fields = fields.iter().map(|(name, value)| part(&format!("name=\"{name}\""), value)).collect::<String>();
    let mut request = Request::post(path, format!("{file}{fields}--b--\r\n"));
    request.headers.retain(|(name, _)| name != b"content-type");
    request.header("content-type", "multipart/form-data; boundary=b")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Status and reason of an answer of the filter's own.
#[track_caller]
fn refusal(stream: &Stream) -> (u32, String) {
    let client = stream.client();
    let reason = client.header("x-pd-reason").map(text).unwrap_or_default();
    assert!(stream.forwarded().is_none(), "{client:?}");
    (client.status().expect("an answer"), reason)
}

/// Where a request goes that one endpoint serves, and its body there.
#[track_caller]
fn sent(stream: &Stream) -> (String, String) {
    let forwarded = forwarded(stream);
    let got = (destinations(&forwarded).remove(0), text(&forwarded.body));
    respond(stream);
    got
}

#[test]
fn no_hand_over_parameter_of_a_client_reaches_an_engine_on_any_path() {
    let gateway = Gateway::new(&of_models(""));
    let bodies = WITH_PROMPT.map(|(path, members)| (path, body_of(members, "hello")));
    let others = WITHOUT_PROMPT.map(|path| (path, r#"{"model":"m","a":1}"#.to_owned()));
    for (path, body) in bodies.into_iter().chain(others) {
        for name in FORBIDDEN {
            for (dirty, clean) in [
                (format!(r#""{name}":{{"remote_host":"evil"}},"#), ""),
                (format!(r#""vllm_xargs":{{"{name}":"evil", "b" : 1e5}},"#), r#""vllm_xargs":{ "b" : 1e5},"#),
                (
                    format!(r#""x":[{{"extra_args":{{"b":[ ],"{name}":["evil"]}}}}],"#),
                    r#""x":[{"extra_args":{"b":[ ]}}],"#,
                ),
            ] {
                let with = |members: &str| body.replacen('{', &format!("{{{members}"), 1);
                let stream = Request::post(path, with(&dirty)).send(&gateway);
                assert_eq!(sent(&stream).1, with(clean), "{path} {name}");
            }
        }
    }
    gateway.assert_idle();
}

#[test]
fn no_form_brings_a_hand_over_parameter() {
    let gateway = Gateway::new(&of_models(""));
    for path in FORMS {
        for name in FORBIDDEN {
            let json = format!(r#"{{"a":[{{"{name}":"evil"}}], "b" : 1e5}}"#);
            let dirty = form_of(path, &[(name, "evil"), ("model", "m"), ("vllm_xargs", &json), ("prompt", &json)]);
            let clean = [("model", "m"), ("vllm_xargs", r#"{"a":[{}], "b" : 1e5}"#), ("prompt", &json)];
            let (_, body) = sent(&dirty.send(&gateway));
            assert_eq!(body.as_bytes(), form_of(path, &clean).chunks.concat(), "{path} {name}");
        }
    }
    gateway.assert_idle();
}

#[test]
fn neither_leg_carries_a_clients_hand_over_parameters() {
    for (path, members) in WITH_PROMPT.into_iter().take(4) {
        for name in FORBIDDEN {
            let gateway = Gateway::new(&of_models(""));
            let body = body_of(members, &"a b c ".repeat(500));
            let dirty = format!(r#"{{"{name}":"evil","vllm_xargs":{{"{name}":"evil"}},"#);
            let stream = Request::post(path, body.replacen('{', &dirty, 1)).send(&gateway);
            assert!(!text(&leg(&gateway).body).contains("evil"), "{path} {name}");
            answer_leg(&gateway);
            let expected = format!(r#"{{"kv_transfer_params":{PARAMS},"vllm_xargs":{{}},{}"#, &body[1..]);
            assert_eq!(sent(&stream).1, expected, "{path} {name}");
        }
    }
}

#[test]
fn clients_do_not_choose_the_phase_unless_the_operator_says_so() {
    let gateway = Gateway::new(&of_models(""));
    for phase in ["prefill", "decode", "nonsense"] {
        let stream = short_chat(1).header("x-pd-phase", phase).send(&gateway);
        assert_eq!(sent(&stream).0, D2);
        assert_eq!(decision(&stream), ("decode_only".into(), "short".into()));
    }
}

#[test]
fn the_model_decides_on_every_path() {
    let gateway = Gateway::new(&of_models(""));
    for path in WITHOUT_PROMPT {
        for model in ["m", "gpt"] {
            let stream = Request::post(path, format!(r#"{{"a" : 1,"model":"{model}"}}"#)).send(&gateway);
            assert_eq!(sent(&stream), (D2.to_owned(), r#"{"a" : 1,"model":"m"}"#.to_owned()), "{path} {model}");
        }
        for (model, expected) in [("never", (404, "unknown_model")), ("asleep", (503, "no_endpoint"))] {
            let stream = Request::post(path, format!(r#"{{"model":"{model}"}}"#)).send(&gateway);
            assert_eq!(refusal(&stream), (expected.0, expected.1.to_owned()), "{path} {model}");
            assert_eq!(stream.client().header("retry-after").is_some(), expected.0 == 503, "{path} {model}");
        }
        for body in [r#"{"input":"a"}"#, r#"["a"]"#, ""] {
            let stream = Request::post(path, body).send(&gateway);
            assert!([D1, D2].contains(&sent(&stream).0.as_str()), "{path} {body}: an endpoint that only prefills");
        }
    }
    for path in FORMS {
        for model in ["m", "gpt"] {
            let (destination, body) = sent(&form(path, model).send(&gateway));
            assert_eq!(destination, D2, "{path} {model}");
            assert_eq!(body.as_bytes(), form(path, "m").chunks.concat(), "{path} {model}");
        }
        assert_eq!(refusal(&form(path, "never").send(&gateway)), (404, "unknown_model".to_owned()), "{path}");
    }
    gateway.assert_idle();
}

#[test]
fn requests_without_a_prompt_count_in_a_pools_limits() {
    for (limits, bytes) in [(r#""max_requests":1"#, 10), (r#""max_tokens":2000"#, 6_000)] {
        let gateway = Gateway::new(&of_models(&format!(r#""pools":{{"default":{{{limits}}}}},"#)));
        let body = format!(r#"{{"model":"m","input":"{}"}}"#, "a".repeat(bytes));
        let first = Request::post("/v1/embeddings", &body).send(&gateway);
        assert_eq!(refusal(&Request::post("/v1/embeddings", &body).send(&gateway)).0, 429, "{limits}");
        respond(&first);
        respond(&Request::post("/v1/embeddings", &body).send(&gateway));
        gateway.assert_idle();
    }
}

#[test]
fn a_prefix_and_a_slash_at_the_end_are_none_of_an_engines_business() {
    let gateway = Gateway::new(&config(&[r#""path_prefixes":["/team"]"#], TWO_AND_TWO, ""));
    let asked =
        [("/team/v1/chat/completions", ""), ("/team/v1/chat/completions/", ""), ("/v1/chat/completions/", "?a=/")];
    for ((path, query), id) in asked.into_iter().zip(1..) {
        let stream = Request::post(&format!("{path}{query}"), chat(id, 3_000)).send(&gateway);
        let leg_path = leg(&gateway).header(":path").map(text);
        assert_eq!(leg_path, Some(format!("{CHAT}{query}")));
        answer_leg(&gateway);
        let sent_path = forwarded(&stream).header(":path").map(text);
        // The route takes the prefix off.
        assert_eq!(sent_path, Some(format!("{}{query}", path.trim_end_matches('/'))));
        respond(&stream);
    }
    let stream = Request::post("/other/v1/chat/completions", chat(9, 3_000)).send(&gateway);
    assert_eq!(refusal(&stream), (404, "unknown_path".to_owned()));
    gateway.assert_idle();
}

#[test]
fn an_endpoint_that_has_not_said_its_models_waits_where_its_peers_have() {
    let endpoints = format!(
        r#"{{"endpoints":[{{"address":"{D1}","role":"both","models":["m"]}},{{"address":"{D2}","role":"both"}}]}}"#
    );
    let gateway = Gateway::new(&endpoints);
    for id in 0..8 {
        assert_eq!(sent(&short_chat(id).send(&gateway)).0, D1);
    }
    let stream = Request::post(CHAT, chat(1, 100).replace(r#""m""#, r#""never""#)).send(&gateway);
    assert_eq!(refusal(&stream), (404, "unknown_model".to_owned()));
}

#[test]
fn lists_of_models_are_the_filters_own_for_get_and_head() {
    let gateway = Gateway::new(&of_models(""));
    let get = |path: &str| {
        let client = Request::get(path).send(&gateway).client();
        (client.status().unwrap(), serde_json::from_slice::<serde_json::Value>(&client.body).unwrap())
    };
    let (status, list) = get("/v1/models");
    let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap()).collect();
    assert_eq!((status, ids), (200, vec!["gpt", "m", "other"]));
    for (name, status) in [("m", 200), ("gpt", 200), ("asleep", 503), ("gone", 503), ("never", 404)] {
        assert_eq!(get(&format!("/v1/models/{name}")).0, status, "{name}");
    }
    let head = |path: &str| {
        let mut request = Request::get(path);
        request.headers.retain(|(name, _)| name != b":method");
        request.header(":method", "HEAD").send(&gateway)
    };
    for path in ["/v1/models", "/v1/models/m"] {
        assert_eq!(head(path).client().status(), Some(200), "{path}");
    }
    let stream = head("/version");
    assert!([D1, D2].contains(&sent(&stream).0.as_str()), "other paths are an engine's");
}

#[test]
fn compressed_bodies_and_upgrades_are_refused_at_once() {
    let gateway = Gateway::new(&of_models(""));
    for path in [CHAT, "/v1/messages", "/v1/embeddings", "/own/api"] {
        for (name, value) in [
            ("content-encoding", "gzip"),
            ("content-encoding", "identity, zstd"),
            ("content-encoding", "BR"),
            ("x-body-compressed", "zstd"),
        ] {
            let stream = Request::post(path, r#"{"model":"m"}"#).header(name, value).send(&gateway);
            assert_eq!(refusal(&stream), (415, "content_encoding".to_owned()), "{path} {name}");
        }
    }
    let upgrade = |path: &str| Request::get(path).header("connection", "Upgrade").header("upgrade", "websocket");
    for path in ["/v1/realtime?model=m", "/v1/responses", CHAT] {
        assert_eq!(refusal(&upgrade(path).send(&gateway)), (501, "upgrade".to_owned()), "{path}");
    }
    let gateway = Gateway::new(&of_models(r#""upgrades":true,"#));
    for (path, expected) in
        [("/v1/realtime?model=m", "/v1/realtime?model=m"), ("/v1/realtime?a&model=gpt", "/v1/realtime?a&model=m")]
    {
        let stream = upgrade(path).send(&gateway);
        let sent = forwarded(&stream);
        assert_eq!((destinations(&sent)[0].as_str(), sent.header(":path").map(text)), (D2, Some(expected.to_owned())));
        respond(&stream);
    }
    assert_eq!(refusal(&upgrade("/v1/realtime?model=never").send(&gateway)).0, 404);
    let post = Request::post(CHAT, chat(1, 100)).header("upgrade", "websocket");
    assert_eq!(refusal(&post.send(&gateway)), (501, "upgrade".to_owned()), "its body would pass unread");
}
