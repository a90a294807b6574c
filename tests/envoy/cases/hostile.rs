//! Bad bodies, headers and endpoint lists: an answer to each, and every worker alive after it.

use std::time::Duration;

use pd_support::body::CHAT;
use pd_support::client::{Client, Http};
use pd_tests::rig::{Rig, run};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::support::*;

/// Members that mean something to the filter.
const MEMBERS: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "input",
    "token_ids",
    "system",
    "instructions",
    "tools",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "stop",
    "n",
    "best_of",
    "use_beam_search",
    "sampling_params",
    "cache_salt",
    "lora_path",
    "kv_transfer_params",
    "bootstrap_room",
    "data_parallel_rank",
    "disaggregated_params",
    "disagg_prefill_resp",
];
const VALUES: &[&str] = &[
    "null",
    "true",
    "-1",
    "1e308",
    "18446744073709551616",
    "\"\"",
    "\"\\u0000\\ud83d\\ude00\"",
    "[]",
    "{}",
    "[[[{}]]]",
    "[null,{\"role\":[]}]",
    "{\"do_remote_prefill\":true}",
];
const PATHS: &[&str] =
    &[CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate", "/v1/embeddings"];

/// Bodies that are wrong as a whole.
fn bodies() -> Vec<Vec<u8>> {
    let deep = |n: usize| format!(r#"{{"model":"sim","messages":{}{}}}"#, "[".repeat(n), "]".repeat(n)).into_bytes();
    let chat = long_chat().into_bytes();
    let mut bodies = vec![
        deep(126),
        deep(127),
        deep(200_000),
        format!(r#"{{"model":"sim","messages":[{}]}}"#, "null,".repeat(100_000)).into_bytes(),
        format!(r#"{{{}"model":"sim"}}"#, r#""n":1,"#.repeat(1_100)).into_bytes(),
        format!(r#"{{"model":"{}","messages":[]}}"#, "m".repeat(1 << 20)).into_bytes(),
        br#"{"model":"sim","messages":[{"role":"user","content":"\ud800"}]}"#.to_vec(),
        b"{\"model\":\"sim\",\"messages\":\"\0\"}".to_vec(),
        b"\xff\xfe{\0}\0".to_vec(),
        vec![0; 4_096],
        vec![0xff; 4_096],
        b"{\"mod\\u0065l\":\"sim\",\"model\":7}".to_vec(),
    ];
    // Cut anywhere, and with a byte turned over.
    bodies.extend((1..chat.len()).step_by(397).map(|cut| chat[..cut].to_vec()));
    bodies.extend((0..chat.len()).step_by(397).map(|index| {
        let mut body = chat.clone();
        body[index] ^= 0xa5;
        body
    }));
    bodies
}

/// Checks that every worker serves.
async fn alive(clients: &mut [Client], after: &str) {
    for client in clients {
        let body = short_chat();
        let answer = client.try_send(client.json(CHAT, body.clone(), &[])).await;
        let answer = answer.unwrap_or_else(|error| panic!("no answer after {after}: {error}"));
        assert_eq!(answer.status, 200, "after {after}: {}", answer.text());
    }
}

/// Sends what may be anything; an answer must come.
async fn provoke(client: &mut Client, path: &str, body: Vec<u8>, headers: &[(&str, &[u8])]) {
    let request = client.json(path, body, headers);
    let answer = tokio::time::timeout(Duration::from_secs(20), client.try_send(request)).await;
    if let Ok(answer) = answer.unwrap_or_else(|_| panic!("{path} {headers:?}: no answer")) {
        assert_ne!(answer.status, 500, "{path} {headers:?}: {}", answer.text());
    }
}

#[test]
fn no_body_ends_a_worker() {
    run(async {
        let rig = Rig::start().await;
        let mut clients = rig.client_of_each_worker(Http::Two).await;
        for member in MEMBERS {
            for value in VALUES {
                for (i, path) in PATHS.iter().enumerate() {
                    let rest = if *member == "model" { "" } else { r#""model":"sim","# };
                    let body = format!(r#"{{{rest}"messages":[{{"role":"user","content":"a"}}],"{member}":{value}}}"#);
                    let index = i % clients.len();
                    provoke(&mut clients[index], path, body.into_bytes(), &[]).await;
                }
            }
            alive(&mut clients, member).await;
        }
        for (i, body) in bodies().into_iter().enumerate() {
            for client in &mut clients {
                provoke(client, PATHS[i % 3], body.clone(), &[]).await;
            }
            alive(&mut clients, &String::from_utf8_lossy(&body[..body.len().min(100)])).await;
        }
        rig.until_idle().await;
        assert!(rig.engines().all(|engine| !engine.is_crashed()));
    });
}

#[test]
fn no_header_ends_a_worker() {
    const NAMES: &[&str] = &[
        "x-session-id",
        "x-request-id",
        "x-prefiller-host-port",
        "x-pd-phase",
        "x-pd-explain",
        "x-pd-destination",
        "x-gateway-destination-endpoint-subset",
        "test-epp-endpoint-selection",
        "x-llm-d-inference-objective",
        "x-llm-d-inference-fairness-id",
        "x-pd-deadline-ms",
        "x-ai-eg-model",
        "x-gateway-model-name",
        "x-data-parallel-rank",
        "target-pod",
        "content-encoding",
        "content-type",
        "accept-encoding",
        "cookie",
    ];
    run(async {
        let trusted = ["x-pd-phase", "x-prefiller-host-port", "x-pd-explain", "x-gateway-destination-endpoint-subset"];
        let plugin = json!({"trusted_headers": trusted, "pools": {"default": {"max_requests": 100}}});
        let rig = Rig::builder().plugin(plugin).start().await;
        let mut clients = rig.client_of_each_worker(Http::Two).await;
        let long = "x".repeat(8_000);
        let values: [&[u8]; 12] = [
            b"",
            b"\xff\xfe\x80",
            long.as_bytes(),
            b"0",
            b"-1",
            b"99999999999999999999",
            b"NaN",
            b",,,",
            b"[::1]:1",
            b"10.0.0.1:99999",
            b"prefill",
            b"a=b; c",
        ];
        for name in NAMES {
            for value in values {
                for (client, body) in clients.iter_mut().zip([long_chat(), short_chat()]) {
                    provoke(client, CHAT, body.into_bytes(), &[(name, value), (name, value)]).await;
                }
            }
            alive(&mut clients, name).await;
        }
        rig.until_idle().await;
    });
}

/// Answers one poll.
async fn answer(mut poll: TcpStream, status: &str, body: &[u8]) {
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    // The other side may have gone.
    let _ = poll.write_all(&[head.as_bytes(), body].concat()).await;
    let _ = poll.shutdown().await;
}

#[test]
fn no_endpoint_list_ends_a_worker() {
    run(async {
        let mut rig = Rig::start().await;
        let mut clients = rig.client_of_each_worker(Http::Two).await;
        alive(&mut clients, "the beginning").await;
        rig.kill_control();
        let control = TcpListener::bind(rig.control_address()).await.unwrap();
        let of =
            |endpoints: &str| format!(r#"{{"wire":1,"epoch":"x","version":9,"endpoints":{endpoints}}}"#).into_bytes();
        let lists: Vec<Vec<u8>> = vec![
            vec![],
            b"{".to_vec(),
            b"null".to_vec(),
            vec![0xff; 100_000],
            "[".repeat(100_000).into_bytes(),
            of("[]"),
            of(r#"[{"address":"10.0.0.1","role":"prefill"}]"#),
            of(r#"[{"address":"10.0.0.1:1","role":"prefil"}]"#),
            of(r#"[{"address":"10.0.0.1:1","role":"both","weight":0}]"#),
            of(r#"[{"address":"10.0.0.1:1","role":"both"},{"address":"10.0.0.1:1","role":"both"}]"#),
            of(&format!(r#"[{}null]"#, r#"{"address":"10.0.0.1:1"},"#.repeat(10_000))),
            br#"{"wire":99,"epoch":"x","version":1,"endpoints":[]}"#.to_vec(),
            br#"{"wire":1,"epoch":"x","version":18446744073709551615,"base":18446744073709551614,"removed":["?"]}"#
                .to_vec(),
        ];
        for list in lists {
            let shown = String::from_utf8_lossy(&list[..list.len().min(80)]).into_owned();
            let poll = tokio::time::timeout(Duration::from_secs(30), control.accept()).await.expect("a poll");
            answer(poll.unwrap().0, "200 OK", &list).await;
            // The next poll says that this answer was read.
            let next = tokio::time::timeout(Duration::from_secs(30), control.accept()).await.expect("a poll");
            let (mut next, _) = next.unwrap();
            let _ = next.read(&mut [0; 4_096]).await;
            alive(&mut clients, &shown).await;
            answer(next, "304 Not Modified", b"").await;
        }
        rig.until_idle().await;
    });
}
