use super::*;
use crate::role::{Engine, Role};

const RULES: Rules = Rules { max_model_len: 1_000, engine: Engine::VllmNixl, role: Role::Both };

fn chat(fields: &str) -> Result<Generation, ApiError> {
    let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}]{fields}}}"#);
    Generation::parse(Api::Chat, body.as_bytes(), RULES)
}

fn rendered(body: &str) -> String {
    String::from_utf8(Generation::parse(Api::Chat, body.as_bytes(), RULES).unwrap().prompts[0].rendered.clone())
        .unwrap()
}

#[test]
fn renders_as_a_template_would() {
    assert_eq!(
        rendered(
            r#"{"tools": [ {"a": "b c"} ], "messages":[{"content":[{"type":"text","text":"x\ny"}],"role":"system"},
                {"role":"assistant","content":null,"tool_calls":[ 1 ]},{"role":"user","content":"é\u00e9"}],"model":"m"}"#
        ),
        "<|tools|>[{\"a\":\"b c\"}]\n<|system|>x\ny\n<|assistant|>[1]\n<|user|>éé\n<|assistant|>"
    );
    let image = |data: &str| {
        rendered(&format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"{data}"}}}}]}}]}}"#
        ))
    };
    assert!(image("data:1").starts_with("<|user|><|image_url:"));
    assert_ne!(image("data:1"), image("data:2"));
}

#[test]
fn the_last_of_repeated_keys_counts() {
    assert!(chat(r#","stream":true,"stream":false"#).is_ok_and(|generation| !generation.stream));
}

#[test]
fn refuses_what_vllm_refuses() {
    for (fields, why) in [
        (r#","stream_options":{"include_usage":true}"#, "Stream options"),
        (r#","max_tokens":0"#, "at least 1"),
        (r#","max_tokens":-1"#, "at least 1"),
        (r#","max_tokens":"5""#, "max_tokens"),
        (r#","max_tokens":999"#, "too large"),
        (r#","max_tokens":1,"min_tokens":2"#, "min_tokens"),
        (r#","n":0"#, "n must"),
        (r#","n":2,"temperature":0"#, "greedy"),
        (r#","top_logprobs":2"#, "`logprobs` must be set"),
        (r#","logprobs":true,"top_logprobs":21"#, "top_logprobs"),
        (r#","stop":["a","b","c","d","e"]"#, "at most 4"),
        (r#","stop_token_ids":["a"]"#, "stop_token_ids"),
        (r#","stop":5"#, "stop"),
        (r#","kv_transfer_params":"x""#, "kv_transfer_params"),
        (r#","seed":9223372036854775808"#, "seed"),
        (r#","cache_salt":"""#, "cache_salt"),
        (r#","tools":{}"#, "tools"),
        (r#"},"#, "json_invalid"),
    ] {
        let error = chat(fields).unwrap_err();
        assert_eq!(error.status, 400, "{fields}");
        assert!(error.message.contains(why), "{fields}: {}", error.message);
    }
    for body in [
        r#"{"messages":[{"role":"user","content":"hi"}]}"#,
        r#"{"model":"m"}"#,
        r#"{"model":"m","messages":[]}"#,
        r#"{"model":"m","messages":[{"content":"hi"}]}"#,
        r#"{"model":"m","messages":"hi"}"#,
        r#"{"model":"m","messages":[{"role":"user","content":5}]}"#,
        "[]",
        "",
        "\u{0}",
    ] {
        assert_eq!(Generation::parse(Api::Chat, body.as_bytes(), RULES).unwrap_err().status, 400, "{body}");
    }
    assert!(chat(r#","seed":9223372036854775807,"max_tokens":900,"unknown":{"a":1e400}"#).is_ok());
}

#[test]
fn other_apis_have_their_own_names_for_the_same() {
    let parse = |path: &str, fields: &str| {
        let body = format!(r#"{{"model":"m",{fields}}}"#);
        Generation::parse(Api::of_path(path).unwrap(), body.as_bytes(), RULES).map_err(|error| error.status)
    };
    let rendered =
        |path: &str, fields: &str| String::from_utf8(parse(path, fields).unwrap().prompts[0].rendered.clone()).unwrap();
    assert_eq!(
        rendered("/v1/responses", r#""instructions":"Be brief.","input":"hi""#),
        "<|system|>Be brief.\n<|user|>hi\n<|assistant|>"
    );
    assert_eq!(
        rendered("/v1/responses", r#""input":[{"role":"user","content":[{"type":"input_text","text":"hi"}]}]"#),
        "<|user|>hi\n<|assistant|>"
    );
    let messages = r#""messages":[{"role":"user","content":"hi"}]"#;
    assert_eq!(
        rendered("/v1/messages", &format!(r#""max_tokens":3,"system":"s",{messages}"#)),
        "<|system|>s\n<|user|>hi\n<|assistant|>"
    );
    let ids = parse("/inference/v1/generate", r#""token_ids":[1,2,3],"sampling_params":{"max_tokens":2}"#).unwrap();
    assert_eq!((ids.prompts[0].tokens(), ids.output(0, 0, false).tokens), (3, 2));
    for (path, fields) in [
        ("/v1/responses", r#""messages":[]"#),
        ("/v1/responses", r#""input":5"#),
        ("/v1/messages", messages),
        ("/inference/v1/generate", r#""token_ids":[1]"#),
        ("/inference/v1/generate", r#""token_ids":"a","sampling_params":{}"#),
        ("/inference/v1/generate", r#""token_ids":[[1]],"sampling_params":{}"#),
    ] {
        assert_eq!(parse(path, fields).map(drop), Err(400), "{path} {fields}");
    }
}

#[test]
fn prompts_may_be_text_ids_or_lists() {
    let tokens = |prompt: &str| {
        let body = format!(r#"{{"model":"m","prompt":{prompt}}}"#);
        Generation::parse(Api::Completions, body.as_bytes(), RULES)
            .map(|generation| generation.prompts.iter().map(Prompt::tokens).collect::<Vec<_>>())
            .map_err(|error| error.status)
    };
    assert_eq!(tokens(r#""12345""#), Ok(vec![2]));
    assert_eq!(tokens("[1,2,3]"), Ok(vec![3]));
    assert_eq!(tokens(r#"["1234","12345"]"#), Ok(vec![1, 2]));
    assert_eq!(tokens("[[1],[2,3]]"), Ok(vec![1, 2]));
    for bad in ["[]", "[[]]", "5", r#"[1,"a"]"#, "{}"] {
        assert_eq!(tokens(bad), Err(400), "{bad}");
    }
}

#[test]
fn kv_params_are_read_as_vllm_reads_them() {
    let kv = |params: &str| chat(&format!(r#","kv_transfer_params":{params}"#)).unwrap().kv;
    assert!(matches!(kv("null"), KvParams::None));
    assert!(matches!(kv("{}"), KvParams::None));
    assert!(matches!(kv(r#"{"do_remote_decode":true,"remote_block_ids":null}"#), KvParams::Keep));
    let KvParams::Pull(remote) = kv(r#"{"do_remote_prefill":true, "x":1.0e-7}"#) else { panic!() };
    assert_eq!(&*remote.raw, r#"{"do_remote_prefill":true, "x":1.0e-7}"#);
    assert!(!remote.has_block_ids && remote.source.is_none());
    let full = r#"{"do_remote_prefill":true,"remote_block_ids":[[1]],"remote_engine_id":"e",
            "remote_host":"h","remote_port":1,"remote_request_id":"r"}"#;
    let KvParams::Pull(remote) = kv(full) else { panic!() };
    assert!(remote.has_block_ids && remote.source.is_some());
    let KvParams::Pull(remote) = kv(&full.replace("remote_request_id", "x")) else { panic!() };
    assert!(remote.source.is_none());
}

#[test]
fn expected_text_ignores_what_does_not_change_the_answer() {
    let body = |fields: &str| {
        format!(r#"{{"model":"x","messages":[{{"role":"user","content":"hi"}}],"max_tokens":8{fields}}}"#)
    };
    let text = expected_text("m", body(""));
    assert_eq!(text.len(), 32);
    assert_eq!(text, expected_text("m", body(r#","stream":true,"kv_transfer_params":{"do_remote_prefill":true}"#)));
    assert_ne!(text, expected_text("x", body("")));
    assert_ne!(text, expected_text("m", body(r#","seed":1"#)));
    let choices = expected_texts("m", body(r#","n":2"#));
    assert_eq!((choices.len(), &choices[0]), (2, &text));
    assert_ne!(choices[0], choices[1]);
    assert_eq!(expected_text("m", "{"), "");
}
