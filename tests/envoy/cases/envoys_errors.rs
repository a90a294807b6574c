//! Errors that Envoy answers itself reach clients in the form of their API.

use pd_sim::FAULT_HEADER;
use pd_support::body::{CHAT, chat, words};
use pd_support::client::{Answer, BOTH, Feed, Http};
use pd_support::wait::PATIENCE;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::blame::{CASE, own_errors};
use crate::support::{long_chat, short_chat};

/// Checks that an answer of Envoy's own is an error of the API of that path, and returns its message.
#[track_caller]
fn message_of_envoy(path: &str, answer: &Answer, status: u16) -> String {
    let text = answer.text();
    assert_eq!((answer.status, answer.reason()), (status, Some("envoy")), "{path}: {text}");
    assert_eq!(answer.header("content-type"), Some("application/json"), "{path}: {text}");
    let body = answer.json();
    let error = &body["error"];
    let is_type = |kind: &str| kind.ends_with("_error") || kind == "request_too_large";
    assert!(error["type"].as_str().is_some_and(is_type), "{path}: {text}");
    if path.starts_with("/v1/messages") {
        assert_eq!(body["type"], "error", "{path}: {text}");
    } else {
        assert_eq!((&body["type"], &error["code"]), (&json!(null), &json!("envoy")), "{path}: {text}");
    }
    error["message"].as_str().unwrap_or_else(|| panic!("no message: {text}")).to_owned()
}

#[test]
fn errors_that_envoy_answers_itself_have_the_form_of_the_api() {
    run(async {
        let rig = Rig::builder().envoy(own_errors).start().await;
        let body = short_chat();
        for http in BOTH {
            let mut client = rig.client(http).await;
            // The bucket has one token, whichever request takes it.
            client.send(client.json(CHAT, body.clone(), &[(CASE, b"limited")])).await;
            for path in [CHAT, "/v1/messages", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize"] {
                for (case, status, text) in [
                    ("limited", 429, "local_rate_limited"),
                    ("denied", 403, "RBAC: access denied"),
                    ("without_jwt", 401, "Jwt is missing"),
                    ("full", 503, "overflow"),
                    ("empty", 503, "no healthy upstream"),
                    ("direct", 404, "the gateway answered with status 404"),
                ] {
                    let request = client.json(path, body.clone(), &[(CASE, case.as_bytes())]);
                    let answer = client.send(request).await;
                    let message = message_of_envoy(path, &answer, status);
                    assert!(message.contains(text), "{case}: {message}");
                    let challenge = answer.header("www-authenticate");
                    assert_eq!(challenge.is_some(), case == "without_jwt", "Envoy's own headers stay");
                }
            }
            for path in [CHAT, "/v1/messages"] {
                for (case, status, fault, text) in [
                    ("timeout", 504, "hang", "upstream request timeout"),
                    ("try_timeout", 504, "hang", "upstream request timeout"),
                    ("idle", 504, "hang", "stream timeout"),
                    ("", 503, "reset", "reset before headers"),
                ] {
                    let headers: [(&str, &[u8]); 2] = [(CASE, case.as_bytes()), (FAULT_HEADER, fault.as_bytes())];
                    let sent = short_chat();
                    let answer = client.send(client.json(path, sent, &headers)).await;
                    let message = message_of_envoy(path, &answer, status);
                    assert!(message.contains(text), "{case} {fault}: {message}");
                }
            }
            // The filter has not forwarded it yet: its prefill leg is in flight.
            let headers: [(&str, &[u8]); 2] = [(CASE, b"idle"), (FAULT_HEADER, b"prefill:hang")];
            let answer = client.send(client.json(CHAT, long_chat(), &headers)).await;
            message_of_envoy(CHAT, &answer, 504);
            // Requests without a body, and an answer that may have none.
            let mut request = client.request("GET", "/version");
            request.headers_mut().insert(CASE, "denied".parse().unwrap());
            assert!(message_of_envoy("/version", &client.send(request).await, 403).contains("RBAC"));
            let mut request = client.request("HEAD", "/version");
            request.headers_mut().insert(CASE, "denied".parse().unwrap());
            let answer = client.send(request).await;
            assert_eq!((answer.status, answer.reason()), (403, Some("envoy")));
            assert_eq!((answer.header("content-type"), answer.body.len()), (Some("application/json"), 0));
            let mut request = client.request("HEAD", "/version");
            request.headers_mut().insert(CASE, "direct".parse().unwrap());
            assert_eq!((client.send(request).await.status), 404);
        }
        rig.until_idle().await;
    });
}

#[test]
fn errors_that_others_put_into_a_form_stay_as_they_are() {
    run(async {
        let form = json!({"body_format": {"json_format": {"own": "%RESPONSE_CODE%"}}});
        let rig = Rig::builder()
            .envoy(move |config| {
                own_errors(config);
                config.http()["local_reply_config"] = form;
            })
            .start()
            .await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let answer = client.send(client.json(CHAT, short_chat(), &[(CASE, b"denied")])).await;
            assert_eq!((answer.status, answer.reason()), (403, None), "{}", answer.text());
            assert_eq!(answer.json(), json!({"own": 403}), "the operator's form");
            let answer = client.send(client.json(CHAT, short_chat(), &[(FAULT_HEADER, b"500")])).await;
            assert_eq!((answer.status, answer.reason()), (500, None), "{}", answer.text());
            assert!(answer.json()["error"].is_object() || answer.json()["message"].is_string(), "the engine's words");
        }
    });
}

#[test]
fn a_body_beyond_envoys_buffer_is_an_error_in_the_form_of_the_api() {
    run(async {
        let small = |config: &mut pd_support::config::Config| {
            for filter in config.http_filters() {
                if let Some(limit) = filter["typed_config"].get_mut("max_request_bytes") {
                    *limit = json!(100_000);
                }
            }
        };
        let rig = Rig::builder().envoy(small).start().await;
        for http in BOTH {
            for path in [CHAT, "/v1/messages", "/v1/embeddings"] {
                let mut client = rig.client(http).await;
                let body = chat(&[&words("beyond", 2_000_000)], r#","max_tokens":4"#);
                let answer = client.try_send(client.json(path, body, &[])).await;
                message_of_envoy(path, &answer.expect("an answer"), 413);
            }
        }
        rig.until_idle().await;
    });
}

#[test]
fn a_body_that_does_not_come_is_an_error_in_the_form_of_the_api() {
    run(async {
        let rig = Rig::builder().envoy(|config| config.http()["request_timeout"] = json!("0.3s")).start().await;
        for http in BOTH {
            for path in [CHAT, "/v1/messages", "/v1/embeddings"] {
                let mut client = rig.client(http).await;
                let (feed, stream) = Feed::new();
                let mut request = client.json(path, "", &[]);
                *request.body_mut() = stream;
                feed.send(b"{".to_vec());
                let answer = client.send(request).await;
                assert_eq!(message_of_envoy(path, &answer, 408), "request timeout");
                drop(feed);
            }
        }
        let mut client = rig.client(Http::One).await;
        assert_eq!(client.post(CHAT, short_chat()).await.status, 200);
        rig.until_idle().await;
    });
}

/// Sends these bytes, and returns status line and headers, and the body, of Envoy's answer.
async fn answer_to(rig: &Rig, bytes: &[u8]) -> (String, Value) {
    let mut stream = TcpStream::connect(rig.address()).await.unwrap();
    // Envoy may reset the connection behind its answer, if it has not read all.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an answer");
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
    (head.to_owned(), serde_json::from_str(body).unwrap_or_else(|_| panic!("{answer}")))
}

/// The error that clients of both APIs read.
fn refused(details: &str) -> Value {
    let message = format!("Envoy refused the request: {details}");
    json!({"type": "error", "error": {"type": "invalid_request_error", "message": message, "param": null, "code": "envoy"}})
}

#[test]
fn what_envoy_refuses_before_the_filter_sees_it_is_an_error_that_clients_read() {
    run(async {
        let rig = shared().await;
        let post = |headers: &str| format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{headers}\r\n\r\n");
        let large = format!("a: {}", "x".repeat(70_000));
        let many = (0..120).map(|i| format!("a{i}: x\r\n")).collect::<String>();
        let websocket = "connection: Upgrade\r\nupgrade: websocket";
        for (bytes, status, details) in [
            ("\u{16}\u{3}\u{1}garbage\r\n\r\n".to_owned(), 400, "http1.codec_error"),
            (post("bad header"), 400, "http1.codec_error"),
            (post("content-length: abc"), 400, "http1.codec_error"),
            (
                post("content-length: 5\r\ntransfer-encoding: chunked"),
                400,
                "http1.content_length_and_chunked_not_allowed",
            ),
            (post("transfer-encoding: gzip"), 501, "http1.invalid_transfer_encoding"),
            (post(&large), 431, "http1.headers_too_large"),
            (post(many.trim_end()), 431, "http1.too_many_headers"),
            (format!("GET /tokenize HTTP/1.1\r\nhost: a\r\n{websocket}\r\n\r\n"), 403, "upgrade_failed"),
            (format!("POST {CHAT} HTTP/1.0\r\n\r\n"), 426, "low_version"),
            (format!("POST {CHAT} HTTP/1.1\r\nconnection: close\r\n\r\n"), 400, "missing_host_header"),
            (
                "GET /v1/%00 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".to_owned(),
                400,
                "path_normalization_failed",
            ),
        ] {
            let (head, body) = answer_to(&rig, bytes.as_bytes()).await;
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{details}: {head}");
            assert!(head.contains("content-type: application/json"), "{details}: {head}");
            assert!(head.contains("x-pd-reason: envoy"), "{details}: {head}");
            assert_eq!(body, refused(details));
        }
        let (answer, _) = rig.client(Http::Two).await.web_socket("/tokenize").await.unwrap();
        assert_eq!((answer.status, answer.json()), (403, refused("upgrade_failed")));
        // What the filter answers stays as it is, and so does what it puts into a form.
        let mut client = rig.client(Http::One).await;
        let answer = client.post(CHAT, "{").await;
        assert_eq!((answer.reason(), &answer.json()["type"]), (Some("invalid_json"), &Value::Null));
        let answer = client.send(client.json(CHAT, short_chat(), &[(FAULT_HEADER, b"reset")])).await;
        message_of_envoy(CHAT, &answer, 503);
    });
}

#[test]
fn headers_that_do_not_come_are_an_error_that_clients_read() {
    run(async {
        let rig = Rig::builder().envoy(|config| config.http()["request_headers_timeout"] = json!("0.3s")).start().await;
        let (head, body) = answer_to(&rig, format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\n").as_bytes()).await;
        assert!(head.starts_with("HTTP/1.1 408 "), "{head}");
        assert_eq!(body, refused("request_header_timeout"));
    });
}
