//! Conversations of agents and chat clients: where their turns go, how long their prompts are, and how errors reach them.

use std::collections::BTreeSet;

use pd_host::{Request, Stream};
use serde_json::{Value, json};

use crate::gateway::*;

fn chat_of(parts: &str, members: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":{parts}}}]{members}}}"#)
}

fn long_text(id: u64) -> String {
    format!("text {id} ").repeat(400)
}

/// Runs a request to its end; the decision and its reason.
fn decided(gateway: &Gateway, path: &str, body: &str) -> (String, String) {
    let stream = Request::post(path, body).send(gateway);
    answer_legs(gateway);
    respond(&stream);
    decision(&stream)
}

#[test]
fn what_only_one_server_can_answer_runs_no_prefill_leg() {
    let gateway = Gateway::new(&two_and_two());
    for (id, path, members) in [
        (1, CHAT, r#","prompt_logprobs":1"#),
        (2, "/v1/completions", r#","prompt_logprobs":0"#),
        (3, "/v1/completions", r#","echo":true,"logprobs":1"#),
    ] {
        let prompt = json!(long_text(id)).to_string();
        let body = chat_of(&prompt, members).replace("\"messages\"", &format!("\"prompt\":{prompt},\"messages\""));
        let stream = Request::post(path, &body).send(&gateway);
        assert_eq!(legs(&gateway), [], "{members}");
        assert_eq!(decision(&stream), ("decode_only".into(), "prompt_in_answer".into()), "{members}");
        respond(&stream);
    }
    // The server that samples the tokens is asked for their probabilities.
    let body = chat_of(&json!(long_text(4)).to_string(), r#","logprobs":true,"top_logprobs":5"#);
    let stream = Request::post(CHAT, &body).send(&gateway);
    assert!(!String::from_utf8(leg(&gateway).body).unwrap().contains("logprobs"));
    answer_leg(&gateway);
    assert!(String::from_utf8(forwarded(&stream).body).unwrap().contains(r#""logprobs":true,"top_logprobs":5"#));
    respond(&stream);
    gateway.assert_idle();
}

#[test]
fn what_a_decode_server_refuses_goes_there_byte_for_byte_and_runs_no_prefill_leg() {
    let gateway = Gateway::new(&two_and_two());
    let chats = [
        r#","max_tokens":"x""#,
        r#","max_tokens":1.5"#,
        r#","max_tokens":0"#,
        r#","max_tokens":-1"#,
        r#","min_tokens":"x""#,
        r#","max_tokens":4,"min_tokens":5"#,
        r#","stop":5"#,
        r#","stream_options":{"include_usage":true}"#,
        r#","stream":true,"stream_options":5"#,
    ];
    let prompt = json!(long_text(2)).to_string();
    let chats = chats.map(|members| (CHAT, members));
    for (path, members) in chats.into_iter().chain([("/v1/messages", ""), ("/v1/messages", r#","max_tokens":0"#)]) {
        let body = chat_of(&prompt, members);
        let stream = Request::post(path, &body).send(&gateway);
        assert_eq!(legs(&gateway), [], "{path} {members}");
        assert_eq!(forwarded(&stream).body, body.as_bytes(), "{path} {members}");
        assert_eq!(decision(&stream), ("decode_only".into(), "refusable".into()), "{path} {members}");
        stream.set_property("upstream.address", destinations(&forwarded(&stream))[0].as_str());
        stream.response_headers([(":status", "400"), ("content-type", "application/json")], false);
        stream.response_body(r#"{"error":{"message":"the engine's"}}"#, true);
        assert_eq!(stream.client().body, br#"{"error":{"message":"the engine's"}}"#);
    }
    assert_eq!(gateway.counter("pd_kv_stranded_total;reason=refused"), 0);
    gateway.assert_idle();
}

#[test]
fn a_prompt_that_leaves_no_room_for_its_answer_runs_no_prefill_leg() {
    let gateway = Gateway::new(&controlled());
    gateway.tick();
    let cards = r#""models":[{"id":"m","max_model_len":2000}],"endpoints""#;
    push(&gateway, &list("e", 1, TWO_AND_TWO).replacen("\"endpoints\"", cards, 1));
    // Some 1,100 tokens.
    for (id, limit, reason) in [(1, 500, "prefilled"), (2, 1_500, "too_long"), (3, 5_000, "too_long")] {
        let body = chat_of(&json!(long_text(id)).to_string(), &format!(r#","max_tokens":{limit}"#));
        assert_eq!(decided(&gateway, CHAT, &body).1, reason, "{limit}");
    }
}

#[test]
fn a_kept_response_is_asked_of_the_server_that_has_it() {
    let gateway = Gateway::new(&two_and_two());
    let path = "/v1/responses";
    for n in 0..8 {
        let id = format!("resp_{n}");
        let stream = Request::post(path, format!(r#"{{"model":"m","input":"question {n}"}}"#)).send(&gateway);
        let keeper = destinations(&forwarded(&stream)).remove(0);
        stream.set_property("upstream.address", keeper.as_str());
        stream.response_headers([(":status", "200"), ("content-type", "application/json")], false);
        stream.response_body(format!(r#"{{"id":"{id}","output":[]}}"#), true);
        let next = json!({"model": "m", "input": long_text(n), "previous_response_id": id}).to_string();
        for request in [
            Request::get(&format!("{path}/{id}")),
            Request::post(&format!("{path}/{id}/cancel"), ""),
            Request::post(path, next),
        ] {
            let stream = request.send(&gateway);
            assert_eq!(destinations(&forwarded(&stream)), std::slice::from_ref(&keeper), "{:?}", request.headers);
            respond(&stream);
        }
    }
    let stream = Request::get(&format!("{path}/resp_x")).send(&gateway);
    assert_eq!((stream.client().status(), error_of(&stream).1["code"].as_str()), (Some(404), Some("unknown_response")));
    gateway.assert_idle();
}

#[test]
fn a_refusal_behind_a_prefill_leg_is_counted_and_its_prompt_is_not_believed_to_be_held() {
    let gateway = Gateway::new(&two_and_two());
    for count in 1..=2 {
        let stream = long_chat(1).send(&gateway);
        answer_leg(&gateway);
        stream.set_property("upstream.address", destinations(&forwarded(&stream))[0].as_str());
        stream.response_headers([(":status", "400"), ("content-type", "application/json")], false);
        stream.response_body("{}", true);
        assert_eq!(gateway.counter("pd_kv_stranded_total;reason=refused"), count);
    }
    gateway.assert_idle();
}

/// Parts of media in the form of each API, with about this many bytes of data, and the tokens of the configuration below.
fn media(bytes: usize, fill: &str) -> Vec<(&'static str, String, u64)> {
    let data = fill.repeat(bytes / fill.len());
    // 560 by 700 pixels.
    let png = format!("iVBORw0KGgoAAAANSUhEUgAAAjAAAAK8CAIAAAAA{data}");
    let part = |kind: &str, value: Value| json!({"type": kind, kind: value}).to_string();
    let source = |kind: &str, media_type: &str, data: &str| {
        json!({"type": kind, "source": {"type": "base64", "media_type": media_type, "data": data}}).to_string()
    };
    vec![
        (CHAT, part("image_url", json!({"url": format!("data:image/png;base64,{png}")})), 500),
        (CHAT, part("image_url", json!({"url": format!("data:image/x;base64,{data}")})), 1_100),
        (CHAT, part("image_url", json!({"url": "https://images/a.png"})), 1_100),
        (CHAT, part("input_audio", json!({"data": data, "format": "wav"})), 1_200),
        (CHAT, part("audio_url", json!({"url": format!("data:audio/wav;base64,{data}")})), 1_200),
        (CHAT, part("video_url", json!({"url": format!("data:video/mp4;base64,{data}")})), 1_300),
        (CHAT, part("video_url", json!({"url": "https://videos/a.mp4"})), 1_300),
        (CHAT, part("file", json!({"file_data": format!("data:application/pdf;base64,{data}")})), 1_400),
        ("/v1/messages", source("image", "image/png", &png), 500),
        ("/v1/messages", source("document", "application/pdf", &data), 1_400),
        (
            "/v1/responses",
            json!({"type": "input_image", "image_url": format!("data:image/png;base64,{png}")}).to_string(),
            500,
        ),
        (
            "/v1/responses",
            json!({"type": "input_file", "file_data": format!("data:application/pdf;base64,{data}")}).to_string(),
            1_400,
        ),
    ]
}

/// A short question about one part of media.
fn about(path: &str, part: &str, question: &str) -> String {
    let text = if path == "/v1/responses" { "input_text" } else { "text" };
    let body = chat_of(&format!(r#"[{part},{{"type":"{text}","text":"{question}"}}]"#), r#","max_tokens":8"#);
    if path == "/v1/responses" {
        body.replacen("messages", "input", 1).replace("max_tokens", "max_output_tokens")
    } else {
        body
    }
}

const MEDIA: &str =
    r#""media":{"image_tokens":1100,"audio_tokens":1200,"video_tokens":1300,"file_tokens":1400},"max_tokens":4000"#;

#[test]
fn media_count_by_what_they_show_in_the_form_of_each_api() {
    for bytes in [4_000, 4_000_000] {
        for (path, part, tokens) in media(bytes, "ABCD") {
            let gateway = Gateway::new(&config(&[], TWO_AND_TWO, MEDIA));
            // Something is in flight, so that the limit counts.
            let other = short_chat(1).send(&gateway);
            let before = gateway.counter("pd_prompt_tokens_total");
            let request = Request::post(path, about(path, &part, "What is this?")).header("x-pd-deadline-ms", "5000");
            let stream = request.send(&gateway);
            answer_leg(&gateway);
            let counted = gateway.counter("pd_prompt_tokens_total") - before;
            assert!((tokens..tokens + 100).contains(&counted), "{path} {}: {counted}", &part[..60.min(part.len())]);
            respond(&stream);
            respond(&other);
            gateway.assert_idle();
        }
    }
}

#[test]
fn media_are_told_apart_by_their_bytes_and_leave_the_bytes_of_a_token_alone() {
    let gateway = Gateway::new(&config(&[], TWO_AND_TWO, MEDIA));
    let reason = |part: &str, question: &str| decided(&gateway, CHAT, &about(CHAT, part, question)).1;
    for (index, (path, part, _)) in media(9_000, "ABCD").into_iter().enumerate() {
        // A remote one has no bytes here.
        if path == CHAT && !part.contains("https") {
            let other = media(9_000, "DCBA").swap_remove(index).1;
            assert_eq!(reason(&part, "What is this?"), "prefilled", "{part}");
            assert_eq!(reason(&part, "And what is that?"), "cached", "{part}");
            assert_eq!(reason(&other, "What is this?"), "prefilled", "another one with the same text");
        }
    }
    for id in 0..60 {
        let part = media(200_000, &format!("{id:04}")).swap_remove(0).1;
        let stream = Request::post(CHAT, about(CHAT, &part, "What is this?")).send(&gateway);
        let answer = format!(r#"{{"usage":{{"prompt_tokens":1010}},"kv_transfer_params":{PARAMS}}}"#);
        gateway.answer(leg(&gateway).token, [(":status", "200")], answer).unwrap();
        respond(&stream);
    }
    // A text of 300 tokens is long, as before.
    let text = json!("some words ".repeat(115)).to_string();
    assert_eq!(decided(&gateway, CHAT, &chat_of(&text, "")).1, "prefilled");
    // An image is as many tokens as the engine said.
    let before = gateway.counter("pd_prompt_tokens_total");
    decided(&gateway, CHAT, &about(CHAT, &media(200_000, "zzzz").swap_remove(0).1, "What is this?"));
    let counted = gateway.counter("pd_prompt_tokens_total") - before;
    assert!((800..1_100).contains(&counted), "{counted}");
}

/// Headers of well-known clients that the configuration names by default.
const CLIENTS: [&str; 17] = [
    "x-session-id",
    "x-claude-code-session-id",
    "x-session-affinity",
    "session-id",
    "session_id",
    "x-opencode-session",
    "agent-session-id",
    "x-kilocode-taskid",
    "x-client-session-id",
    "x-amp-thread-id",
    "x-coder-chat-id",
    "x-task-id",
    "x-roo-task-id",
    "x-openwebui-chat-id",
    "x-litellm-session-id",
    "x-litellm-trace-id",
    "x-interaction-id",
];

/// The decode endpoints of some new short chats with these headers, while others come and go.
fn served(gateway: &Gateway, headers: &[(&str, &str)], ids: std::ops::Range<u64>) -> BTreeSet<String> {
    let mut endpoints = BTreeSet::new();
    for id in ids {
        let with = |request, (name, value): &(&str, &str)| Request::header(request, name, value);
        let stream = headers.iter().fold(short_chat(id), with).send(gateway);
        endpoints.insert(destinations(&forwarded(&stream)).remove(0));
        respond(&stream);
        respond(&short_chat(id + 1_000_000).send(gateway));
    }
    endpoints
}

#[test]
fn whole_requests_of_a_session_stay_on_one_server() {
    let gateway = Gateway::new(&config(&[r#""session_cookies":["sid"]"#], TWO_AND_TWO, ""));
    for header in CLIENTS {
        assert_eq!(served(&gateway, &[(header, "a")], 0..12).len(), 1, "{header}");
    }
    assert_eq!(served(&gateway, &[("cookie", "theme=dark; sid=a")], 0..12).len(), 1, "a cookie");
    // router-for-me/CLIProxyAPI#3089: a header that is new with each request is no session, and neither is an empty one.
    for header in ["x-client-request-id", "x-request-id", "traceparent"] {
        assert_eq!(served(&gateway, &[(header, "a")], 0..12).len(), 2, "{header}");
    }
    assert_eq!(served(&gateway, &[("x-session-id", " "), ("cookie", "sid=")], 0..12).len(), 2, "empty values");
    gateway.assert_idle();
}

/// llm-d/llm-d-router#2019 asks for a session's id in a header or a cookie, llm-d/llm-d-router#600 for a cookie alone.
#[test]
fn a_header_names_the_session_and_a_cookie_where_no_header_does() {
    let gateway = Gateway::new(&config(&[r#""session_cookies":["sid"]"#], TWO_AND_TWO, ""));
    // Two sessions on two servers.
    let first = |id, headers: &[(&str, &str)]| served(&gateway, headers, id..id + 1).pop_first().unwrap();
    let header = first(100, &[("x-session-id", "0")]);
    let mut cookies = (101..140).map(|id| (id, format!("sid={id}")));
    let (_, cookie) = cookies.find(|(id, cookie)| first(*id, &[("cookie", cookie.as_str())]) != header).unwrap();
    let other = first(140, &[("cookie", cookie.as_str())]);
    assert_ne!(other, header);
    for id in 1..8 {
        let one = |headers: &[(&str, &str)]| first(id, headers);
        assert_eq!(one(&[("cookie", cookie.as_str()), ("x-session-id", "0")]), header, "the header counts first");
        assert_eq!(one(&[("cookie", cookie.as_str())]), other);
        assert_eq!(one(&[("x-session-id", ""), ("cookie", cookie.as_str())]), other, "an empty header is none");
    }
}

#[test]
fn prompts_of_a_session_are_computed_on_one_server_too() {
    for headers in [[("x-session-id", "a")], [("cookie", "sid=a")]] {
        let gateway = Gateway::new(&config(&[r#""session_cookies":["sid"]"#], TWO_AND_TWO, ""));
        let mut seen = BTreeSet::new();
        for id in 0..8 {
            let with = |request, (name, value): &(&str, &str)| Request::header(request, name, value);
            let stream = headers.iter().fold(long_chat(id), with).send(&gateway);
            seen.insert(chosen(&gateway));
            answer_leg(&gateway);
            respond(&stream);
            run_split(&gateway, &long_chat(id + 1_000));
        }
        assert_eq!(seen.len(), 1, "{headers:?}: {seen:?}");
    }
}

/// pytorch/torchtitan#3755: a session was pinned, whatever else its server had to do. SumanthRH's change to
/// vllm-project/router#235: a server that is gone keeps no session.
#[test]
fn a_session_leaves_a_server_that_has_too_much_to_do_or_is_gone() {
    let gateway = Gateway::pushed(TWO_AND_TWO);
    let ask = |id, bytes| Request::post(CHAT, chat(id, bytes)).header("x-session-id", "a").send(&gateway);
    let first = ask(1, 100);
    let home = destinations(&forwarded(&first)).remove(0);
    respond(&first);
    // None of these ends.
    let streams: Vec<_> = (2..200).map(|id| ask(id, 900)).collect();
    let at_home = streams.iter().filter(|stream| destinations(&forwarded(stream))[0] == home).count();
    assert!((100..190).contains(&at_home), "{at_home} of {}", streams.len());
    streams.iter().for_each(respond);
    let others: Vec<_> = TWO_AND_TWO.iter().copied().filter(|(address, _)| *address != home).collect();
    gateway.tick();
    push(&gateway, &list("e", 2, &others));
    assert_ne!(destinations(&forwarded(&ask(300, 100)))[0], home);
}

/// A conversation in the form of Anthropic's API: Claude Code's line in front, marks at these messages.
fn turns(count: usize, nonce: &str, marked: &[usize]) -> String {
    let mark = |text: &str, is_marked: bool| {
        if is_marked {
            json!([{"type": "text", "text": text, "cache_control": {"type": "ephemeral", "ttl": "1h"}}])
        } else {
            json!(text)
        }
    };
    let billing = format!("x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch={nonce};");
    let messages: Vec<_> = (0..count)
        .map(|turn| {
            let role = if turn % 2 == 0 { "user" } else { "assistant" };
            json!({"role": role, "content": mark(&format!("turn {turn} of the talk. ").repeat(60), marked.contains(&turn))})
        })
        .collect();
    json!({
        "model": "m", "max_tokens": 8, "messages": messages,
        "system": [{"type": "text", "text": billing}, {"type": "text", "text": long_text(7), "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "f", "description": "a tool", "input_schema": {"type": "object"}}],
    })
    .to_string()
}

/// The marks of Claude Code roll forward (sgl-project/sglang#36877), with a time to live (cnighswonger/claude-code-cache-fix#31), or
/// vanish (headroomlabs-ai/headroom#2919 puts one in place of several). Its own line is new with each request
/// (anthropics/claude-code#68900, ollama/ollama#14918, vllm-project/vllm#36829).
#[test]
fn marks_that_move_and_claude_codes_own_line_hide_no_prefix() {
    let gateway = Gateway::new(&two_and_two());
    let path = "/v1/messages";
    assert_eq!(decided(&gateway, path, &turns(3, "36ee5", &[0, 2])).1, "prefilled");
    for (count, nonce, marked) in [
        (3, "0aaa9", &[0, 2][..]),
        (3, "0aaa9", &[2]),
        (3, "00000", &[]),
        (5, "11111", &[2, 4]),
        (7, "22222", &[4, 6]),
        (9, "33333", &[8]),
    ] {
        let stream = Request::post(path, turns(count, nonce, marked)).send(&gateway);
        answer_legs(&gateway);
        respond(&stream);
        let matched: u64 = state(&stream, "matched_tokens").parse().unwrap();
        // The last two turns are new.
        assert!(matched > 700 + 300 * (count as u64 - 3), "{count} {nonce} {marked:?}: {matched}");
    }
    // What reaches the model is another prompt.
    let other = turns(9, "33333", &[8]).replace("turn 0 of", "turn X of");
    let stream = Request::post(path, other).send(&gateway);
    answer_legs(&gateway);
    respond(&stream);
    assert!(state(&stream, "matched_tokens").parse::<u64>().unwrap() < 1_200);
    gateway.assert_idle();
}

/// The error in an answer, and whether it has Anthropic's form.
#[track_caller]
fn error_of(stream: &Stream) -> (bool, Value) {
    let client = stream.client();
    assert_eq!(client.header("content-type"), Some(&b"application/json"[..]), "{client:?}");
    let body: Value = serde_json::from_slice(&client.body).unwrap();
    (body["type"] == "error", body["error"].clone())
}

/// Clients of Anthropic's API got OpenAI's form where a model is unknown or a request bad (BerriAI/litellm#39037,
/// vllm-project/vllm#57997), tokens are counted (NVIDIA-NeMo/Switchyard#315), or at all (bricks-cloud/BricksLLM#40,
/// api7/aisix#351).
#[test]
fn errors_have_the_form_of_the_clients_api_whoever_makes_them() {
    let models = format!(
        r#"{{"path_prefixes":["/anthropic"],"pools":{{"default":{{"max_requests":1}}}},"endpoints":[{{"address":"{D1}","role":"both","models":["m"]}}]}}"#
    );
    for (path, is_anthropic) in [
        ("/v1/messages", true),
        ("/v1/messages/count_tokens", true),
        ("/anthropic/v1/messages", true),
        (CHAT, false),
        ("/v1/responses", false),
        ("/v1/embeddings", false),
    ] {
        let gateway = Gateway::new(&models);
        let body = r#"{"model":"m","max_tokens":8,"messages":[],"input":"a"}"#;
        let running = Request::post(path, body).send(&gateway);
        for (request, kind) in [
            (Request::post(path, "{"), "invalid_request_error"),
            (Request::post(path, r#"{"model":"never"}"#), "not_found_error"),
            (Request::post(path, body), "rate_limit_error"),
            (Request::post(path, body).header("content-encoding", "gzip"), "invalid_request_error"),
        ] {
            let (form, error) = error_of(&request.send(&gateway));
            assert_eq!((form, &error["type"]), (is_anthropic, &json!(kind)), "{path}: {error}");
            assert!(error["message"].is_string() && error["code"].is_string() != is_anthropic, "{path}: {error}");
        }
        respond(&running);
        // What Envoy answers itself.
        let stream = Request::post(path, body).send(&gateway);
        stream.set_property("response.code_details", "response_timeout");
        stream.response_headers([(":status", "504"), ("content-type", "text/plain")], false);
        stream.response_body("upstream request timeout", true);
        let (form, error) = error_of(&stream);
        assert_eq!((form, &error["message"]), (is_anthropic, &json!("upstream request timeout")), "{path}");
        gateway.assert_idle();
    }
}
