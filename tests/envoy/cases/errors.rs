//! Bad input: a clear answer, and nothing else breaks.

use bytes::Bytes;
use pd_support::body::CHAT;
use pd_support::client::{Answer, BOTH, Client, Feed, Http, raw};
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::{Value, json};

use crate::support::{ask, assert_rejected, assert_right, long_chat, short_chat, sum};

#[test]
fn what_is_no_request_is_refused_and_the_connection_goes_on() {
    run(async {
        let rig = shared().await;
        let cases: [(&[u8], u16, &str); 11] = [
            (b"", 400, "invalid_json"),
            (b"{", 400, "invalid_json"),
            (b"[]", 400, "invalid_json"),
            (b"null", 400, "invalid_json"),
            (b"{\"model\":\"sim\",}", 400, "invalid_json"),
            (b"{\"model\":\"sim\"} x", 400, "invalid_json"),
            (b"{\"model\":\"\xff\"}", 400, "invalid_json"),
            (b"\xef\xbb\xbf{\"model\":\"sim\"}", 400, "invalid_json"),
            (b"{}", 400, "missing_model"),
            (b"{\"model\":5,\"messages\":[]}", 400, "missing_model"),
            (b"{\"model\":null}", 400, "missing_model"),
        ];
        for http in BOTH {
            for client in &mut rig.client_of_each_worker(http).await {
                for (body, status, reason) in cases {
                    let answer = client.post(CHAT, body).await;
                    assert_rejected(&answer, status, reason);
                    ask(client, &short_chat()).await;
                }
                // Envoy closes an HTTP/1.1 connection after every 400, and says so.
                assert!(http == Http::One || client.connections() == 1);
            }
        }
    });
}

#[test]
fn an_unknown_model_is_answered_with_the_known_ones() {
    run(async {
        let models = |list: &mut [Value]| list.iter_mut().for_each(|entry| entry["models"] = json!(["sim", "other"]));
        let rig = Rig::builder().list(models).start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let answer = client.post(CHAT, short_chat().replace("\"sim\"", "\"gpt-\\u00e9\"")).await;
            assert_rejected(&answer, 404, "unknown_model");
            let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
            for name in ["gpt-é", "sim", "other"] {
                assert!(message.contains(name), "{message}");
            }
            ask(&mut client, &long_chat()).await;
        }
    });
}

#[test]
fn a_compressed_body_is_refused() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let answer = client.send(client.json(CHAT, short_chat(), &[("content-encoding", b"gzip")])).await;
            assert_rejected(&answer, 415, "content_encoding");
            let request = client.json(CHAT, short_chat(), &[("content-encoding", b"identity")]);
            assert_eq!(client.send(request).await.status, 200);
        }
    });
}

/// A chat of that many bytes.
fn chat_of(bytes: usize) -> String {
    let frame = r#"{"model":"sim","max_tokens":2,"messages":[{"role":"user","content":""}]}"#;
    frame.replace("\"\"", &format!("{:?}", "a".repeat(bytes - frame.len())))
}

async fn send_in_parts(client: &mut Client, body: &[u8], part_bytes: usize) -> Answer {
    let (feed, stream) = Feed::new();
    let mut request = client.json(CHAT, Bytes::new(), &[]);
    *request.body_mut() = stream;
    for part in body.chunks(part_bytes) {
        feed.send(part.to_vec());
    }
    drop(feed);
    client.send(request).await
}

#[test]
fn a_body_beyond_the_filters_limit_is_refused() {
    run(async {
        let limit = 100_000;
        let rig = Rig::builder().plugin(json!({"max_body_bytes": limit})).start().await;
        for http in BOTH {
            for bytes in [limit, limit + 1, 3 * limit] {
                let body = chat_of(bytes);
                for part_bytes in [None, Some(bytes), Some(7_001)] {
                    let mut client = rig.client(http).await;
                    let answer = match part_bytes {
                        None => client.post(CHAT, body.clone()).await,
                        Some(part_bytes) => send_in_parts(&mut client, body.as_bytes(), part_bytes).await,
                    };
                    if bytes == limit {
                        assert_right(&answer, &body);
                    } else {
                        assert_rejected(&answer, 413, "too_large");
                    }
                }
            }
            // A length that is declared is enough; HTTP/2 allows to send less than that before the answer.
            for client in &mut rig.client_of_each_worker(http).await {
                ask(client, &long_chat()).await;
            }
        }
        rig.until_idle().await;
    });
}

#[test]
fn a_declared_length_beyond_the_limit_is_refused_before_the_body() {
    run(async {
        let rig = shared().await;
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\
             connection: close\r\n\r\n{{"
        );
        let answer = String::from_utf8_lossy(&raw(rig.address(), head.as_bytes()).await).into_owned();
        assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("x-pd-reason: too_large"), "{answer}");
    });
}

#[test]
fn a_body_beyond_the_gateways_buffer_is_refused() {
    run(async {
        let rig = shared().await;
        let body = chat_of((16 << 20) + 4_096);
        for http in BOTH {
            let mut client = rig.client(http).await;
            let answer = send_in_parts(&mut client, body.as_bytes(), 1 << 20).await;
            assert_eq!(answer.status, 413, "{}", answer.text());
            // The filter's own error, or Envoy's, whichever is first.
            let code = answer.json()["error"]["code"].clone();
            assert!(code == "too_large" || code == "envoy", "{}", answer.text());
            for client in &mut rig.client_of_each_worker(http).await {
                ask(client, &long_chat()).await;
            }
        }
    });
}

#[test]
fn without_endpoints_there_is_a_clear_answer() {
    run(async {
        let text = json!({"cluster": "engines", "endpoints": []}).to_string();
        let rig = Rig::builder().plugin_text(&text).without_control().start().await;
        for http in BOTH {
            for client in &mut rig.client_of_each_worker(http).await {
                assert_rejected(&client.post(CHAT, long_chat()).await, 503, "no_endpoint");
                assert_rejected(&client.get("/v1/models").await, 503, "no_endpoint");
                assert_rejected(&client.post("/tokenize", "{}").await, 503, "no_endpoint");
            }
        }
    });
}

#[test]
fn without_a_decode_endpoint_there_is_a_clear_answer() {
    run(async {
        let rig = Rig::builder().engines(1, 0).start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            assert_rejected(&client.post(CHAT, short_chat()).await, 503, "no_endpoint");
            assert_rejected(&client.post(CHAT, long_chat()).await, 503, "no_endpoint");
            assert_eq!(client.get("/v1/models").await.status, 200);
        }
        rig.until_idle().await;
        assert_eq!(rig.prefill[0].stats().prefill_legs, 0, "no prompt is computed that nobody can use");
    });
}

#[test]
fn hostile_headers_harm_nothing() {
    run(async {
        let rig = shared().await;
        let body = short_chat();
        let request = |headers: &[u8], path: &str| {
            let head = format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n", body.len());
            let rest: &[u8] = b"content-type: application/json\r\nconnection: close\r\n\r\n";
            [head.as_bytes(), headers, rest, body.as_bytes()].concat()
        };
        let cases: [&[u8]; 9] = [
            b"x-pd-phase: \xff\xfe\r\n",
            b"x-pd-phase: prefill\r\nx-pd-phase: decode\r\n",
            b"x-prefiller-host-port: \x80\x81:\xff\r\n",
            b"x-pd-destination: \xff\r\nx-pd-\xff: 1\r\n",
            b"content-encoding: \xff\r\n",
            b"content-length: 3\r\n",
            b"transfer-encoding: chunked\r\n",
            b"x-request-id: \xc3\x28\r\nauthorization: \xff\r\n",
            b"content-type: \xff/\xfe\r\n",
        ];
        for headers in cases {
            let answer = raw(rig.address(), &request(headers, CHAT)).await;
            assert!(answer.starts_with(b"HTTP/1.1 "), "{headers:?}: {answer:?}");
        }
        for path in ["/%ff%fe%00", "/v1/chat/completions%00", "/v1/chat/completions?%ff", "/\u{e9}", "*"] {
            let answer = raw(rig.address(), &request(b"", path)).await;
            assert!(answer.starts_with(b"HTTP/1.1 "), "{path}: {answer:?}");
        }
        for client in &mut rig.client_of_each_worker(Http::One).await {
            ask(client, &long_chat()).await;
        }
        assert_eq!(rig.final_metric("pd_host_errors_total").await, 0.0);
        assert_eq!(sum(rig.engines(), |stats| u64::from(stats.crashed)), 0);
    });
}
