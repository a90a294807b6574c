//! Every other engine's hand-over: right once, refused in the words of the real one otherwise.

use std::time::Duration;

use pd_sim::{Config, Engine, Handle, Role, WRONG_PREFIX, expected_text, start};

use crate::client::{Answer, CHAT, COMPLETIONS, ask, chat, decode_leg, post, prefill_leg, send};

const PROMPT: &str = "A prompt of more than one block, computed on one server and continued on another one.";

async fn pair(engine: Engine) -> (Handle, Handle) {
    let config = |role| Config { engine, lease: Duration::from_millis(300), ..Config::of(role) };
    (start(config(Role::Prefill)).await.unwrap(), start(config(Role::Decode)).await.unwrap())
}

fn room(prefill: &Handle, room: &str) -> String {
    let address = prefill.bootstrap_addr();
    format!(r#","bootstrap_host":"{}","bootstrap_port":{},"bootstrap_room":{room}"#, address.ip(), address.port())
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, why: &str) {
    assert!(answer.status == status && answer.text.contains(why), "{} {}", answer.status, answer.text);
}

#[tokio::test]
async fn sglangs_legs_meet_in_their_room() {
    let (prefill, decode) = pair(Engine::Sglang).await;
    let body = chat(PROMPT, &format!("{}{}", room(&prefill, "9007199254740993"), r#","max_tokens":9"#));
    let (first, second) = tokio::join!(ask(&prefill, CHAT, &body), ask(&decode, CHAT, &body));
    assert_eq!(first.status, 200);
    assert_eq!(second.choice(0), expected_text("sim", &body));
    assert_eq!((prefill.stats().prefill_legs, decode.stats().decode_legs), (1, 1));
    // A batch has a room for every prompt.
    let address = prefill.bootstrap_addr();
    let (host, port) = (address.ip(), address.port());
    let batch = format!(
        r#"{{"model":"sim","prompt":["{PROMPT} 1","{PROMPT} 2"],"bootstrap_host":["{host}","{host}"],"bootstrap_port":[{port},{port}],"bootstrap_room":[1,2]}}"#
    );
    let (_, second) = tokio::join!(ask(&prefill, COMPLETIONS, &batch), ask(&decode, COMPLETIONS, &batch));
    assert_eq!([second.choice(0), second.choice(1)], pd_sim::expected_texts("sim", &batch)[..]);
    assert_eq!(decode.stats().decode_legs, 3);
}

#[tokio::test]
async fn routers_tell_sglang_from_vllm_by_its_own_endpoints() {
    let (sglang, vllm) = (pair(Engine::Sglang).await.0, pair(Engine::VllmNixl).await.0);
    for (path, of_sglang, of_vllm) in [("/version", 404, 200), ("/server_info", 200, 404), ("/model_info", 200, 404)] {
        let status = async |server: &Handle| pd_support::client::get(server.addr(), path).await.unwrap().status;
        assert_eq!((status(&sglang).await, status(&vllm).await), (of_sglang, of_vllm), "{path}");
    }
    let info = pd_support::client::get(sglang.addr(), "/server_info").await.unwrap().text();
    assert!(info.contains(r#""disaggregation_mode":"prefill""#), "{info}");
}

#[tokio::test]
async fn sglang_refuses_requests_without_a_room_and_gives_up_on_empty_ones() {
    let (prefill, decode) = pair(Engine::Sglang).await;
    for server in [&prefill, &decode] {
        assert_refused(&ask_any(server, &chat(PROMPT, "")).await, 400, "without bootstrap room id");
        let body = chat(PROMPT, r#","bootstrap_room":1"#);
        assert_refused(&ask_any(server, &body).await, 400, "bootstrap_host");
        let list = chat(PROMPT, &room(&prefill, "[1,2]"));
        assert_refused(&ask_any(server, &list).await, 400, "must be a list");
        assert_refused(&ask_any(server, &chat(PROMPT, &room(&prefill, "9223372036854775808"))).await, 400, "range");
    }
    assert_refused(&ask_any(&prefill, &chat(PROMPT, &room(&prefill, "7"))).await, 500, "nobody came");
    assert_refused(&ask_any(&decode, &chat(PROMPT, &room(&prefill, "8"))).await, 500, "KV transfer failed");
    let whole = start(Config { engine: Engine::Sglang, ..Config::of(Role::Both) }).await.unwrap();
    assert_eq!(ask(&whole, CHAT, &chat(PROMPT, "")).await.choice(0), expected_text("sim", chat(PROMPT, "")));
}

async fn ask_any(server: &Handle, body: &str) -> Answer {
    send(post(server, CHAT, body)).await.unwrap()
}

#[tokio::test]
async fn trtllm_generates_from_turned_parameters_and_token_ids() {
    let (prefill, decode) = pair(Engine::Trtllm).await;
    let context =
        |id: u64| format!(r#","disaggregated_params":{{"request_type":"context_only","disagg_request_id":{id}}}"#);
    for body in [
        context(5),
        format!(r#"{},"stream":true"#, context(1 << 42)),
        r#","disaggregated_params":{"request_type":"x"}"#.to_owned(),
    ] {
        assert_refused(&ask_any(&prefill, &chat(PROMPT, &body)).await, 400, "disaggregated_params");
    }
    let answer = ask(&prefill, CHAT, &chat(PROMPT, &format!(r#"{},"max_tokens":1"#, context(1 << 42)))).await;
    let field = |path: &[&str]| {
        let value = raw_value(&answer.text, path);
        value.to_owned()
    };
    let params = field(&["choices", "0", "disaggregated_params"]);
    let turned = params.replace("context_only", "generation_only");
    let ids = field(&["prompt_token_ids"]);
    assert_refused(
        &ask_any(&decode, &chat(PROMPT, &format!(r#","disaggregated_params":{turned}"#))).await,
        400,
        "prompt_token_ids",
    );
    let body = chat(PROMPT, &format!(r#","disaggregated_params":{turned},"prompt_token_ids":{ids},"max_tokens":9"#));
    let right = expected_text("sim", chat(PROMPT, r#","max_tokens":9"#));
    assert_eq!(ask(&decode, CHAT, &body).await.choice(0), right);
    assert!(ask(&decode, CHAT, &body).await.choice(0).starts_with(WRONG_PREFIX), "the second use");
    assert_eq!(ask(&decode, CHAT, &chat(PROMPT, "")).await.choice(0), expected_text("sim", chat(PROMPT, "")));
}

/// The text of a value in a JSON document, as it stands.
fn raw_value<'a>(json: &'a str, path: &[&str]) -> &'a str {
    use serde_json::value::RawValue;
    path.iter().fold(json, |json, key| match key.parse::<usize>() {
        Ok(index) => serde_json::from_str::<Vec<&RawValue>>(json).unwrap()[index].get(),
        Err(_) => serde_json::from_str::<std::collections::HashMap<&str, &RawValue>>(json).unwrap()[key].get(),
    })
}

#[tokio::test]
async fn mooncakes_legs_meet_by_transfer_id_at_the_engine_that_was_named() {
    let (prefill, decode) = pair(Engine::Mooncake).await;
    let server = prefill.bootstrap_addr();
    let query = get_query(server).await;
    assert!(query.contains(&format!(r#""0":{{"engine_id":"{}""#, prefill.engine_id())), "{query}");
    let first = r#","max_tokens":1,"kv_transfer_params":{"do_remote_decode":true,"transfer_id":"xfer-1"}"#;
    assert_eq!(ask(&prefill, CHAT, &chat(PROMPT, first)).await.params(), "null");
    let second = |engine_id: &str| {
        let params = format!(
            r#"{{"do_remote_prefill":true,"transfer_id":"xfer-1","remote_bootstrap_addr":"http://{server}","remote_engine_id":"{engine_id}"}}"#
        );
        decode_leg(PROMPT, &params, "")
    };
    assert_refused(&ask_any(&decode, &second("another")).await, 500, "no such engine");
    assert_eq!(
        ask(&decode, CHAT, &second(prefill.engine_id())).await.choice(0),
        expected_text("sim", chat(PROMPT, ""))
    );
    assert!(ask(&decode, CHAT, &second(prefill.engine_id())).await.choice(0).starts_with(WRONG_PREFIX));
}

async fn get_query(server: std::net::SocketAddr) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(server).await.unwrap();
    stream.write_all(b"GET /query HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn neuron_wants_the_whole_prefill_answer() {
    let (prefill, decode) = pair(Engine::Neuron).await;
    let answer = ask(&prefill, CHAT, &chat(PROMPT, r#","max_tokens":1"#)).await.text;
    let body = |answer: &str| chat(PROMPT, &format!(r#","disagg_prefill_resp":{answer}"#));
    assert_refused(&ask_any(&decode, &body("{}")).await, 400, "Field required");
    assert_eq!(ask(&decode, CHAT, &body(&answer)).await.choice(0), expected_text("sim", chat(PROMPT, "")));
    assert!(ask(&decode, CHAT, &body(&answer)).await.choice(0).starts_with(WRONG_PREFIX));
}

#[tokio::test]
async fn push_mode_pairs_the_legs_by_request_id() {
    let (prefill, decode) = pair(Engine::VllmNixlPush).await;
    let with_id = |server: &Handle, body: &str, id: &'static str| {
        let mut request = post(server, CHAT, body);
        request.headers_mut().insert("x-request-id", http::HeaderValue::from_static(id));
        request
    };
    let params = send(with_id(&prefill, &prefill_leg(PROMPT), "r-1")).await.unwrap().params();
    let other = send(with_id(&decode, &decode_leg(PROMPT, &params, ""), "r-2"));
    assert!(tokio::time::timeout(Duration::from_millis(100), other).await.is_err(), "another request's leg hangs");
    let answer = send(with_id(&decode, &decode_leg(PROMPT, &params, ""), "r-1")).await.unwrap();
    assert_eq!(answer.choice(0), expected_text("sim", chat(PROMPT, "")));
}

#[tokio::test]
async fn the_second_answer_of_one_prompt_reads_blocks_that_are_gone() {
    let (prefill, decode) = pair(Engine::VllmNixl).await;
    let params = ask(&prefill, CHAT, &prefill_leg(PROMPT)).await.params();
    let answer = ask(&decode, CHAT, &decode_leg(PROMPT, &params, r#","n":2"#)).await;
    assert!(answer.choice(1).starts_with(WRONG_PREFIX));
    assert_eq!(decode.stats().wrong_text_by.get("reused"), Some(&1));
}
