//! What HTTP allows beside plain requests: upgrades, other methods, bodies without a length, trailers, compression.

use std::io::Write as _;
use std::net::SocketAddr;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::stream;
use http::HeaderMap;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use pd_support::body::CHAT;
use pd_support::client::{BOTH, Body, Feed, Http};
use pd_support::config::Config;
use pd_support::wait::PATIENCE;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{assert_rejected, assert_right, long_chat, only, recorded, short_chat, sum};

#[test]
fn other_methods_reach_an_engine() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            rig.engines().for_each(pd_sim::Handle::clear_requests);
            let mut request = client.request("OPTIONS", CHAT);
            request.headers_mut().insert("origin", "http://a.example".parse().unwrap());
            request.headers_mut().insert("access-control-request-method", "POST".parse().unwrap());
            assert_eq!(client.send(request).await.status, 405, "the engine's own answer");
            let got = only(rig.engines());
            assert_eq!((got.method.as_str(), got.path.as_str()), ("OPTIONS", CHAT));
            let answer = client.send(client.request("HEAD", "/.pd-ready")).await;
            assert_eq!((answer.status, answer.body.len()), (200, 0));
        }
    });
}

#[test]
fn a_client_that_waits_for_100_continue_is_told_to_go_on() {
    run(async {
        let rig = shared().await;
        for body in [long_chat(), short_chat()] {
            let mut stream = TcpStream::connect(rig.address()).await.unwrap();
            let head = format!(
                "POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n\
                 content-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut first = [0; 25];
            stream.read_exact(&mut first).await.unwrap();
            assert_eq!(&first, b"HTTP/1.1 100 Continue\r\n\r\n");
            stream.write_all(body.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        }
        assert!(recorded(rig.engines()).iter().all(|request| request.header("expect").is_none()));
    });
}

/// A body in two parts, with trailers if there are some.
fn parts(body: &str, trailers: Option<HeaderMap>) -> Body {
    let (front, behind) = body.split_at(body.len() / 2);
    let data = [front, behind].map(|part| Frame::data(Bytes::from(part.to_owned())));
    let frames = data.into_iter().chain(trailers.map(Frame::trailers)).map(Ok::<_, std::io::Error>);
    StreamBody::new(stream::iter(frames.collect::<Vec<_>>())).boxed_unsync()
}

#[test]
fn bodies_without_a_length_and_with_trailers_are_read() {
    run(async {
        let rig = shared().await;
        let trailers = || HeaderMap::from_iter([("x-checksum".parse().unwrap(), "1".parse().unwrap())]);
        for http in BOTH {
            let mut client = rig.client(http).await;
            for body in [long_chat(), short_chat()] {
                for trailers in [None, Some(trailers())] {
                    rig.engines().for_each(pd_sim::Handle::clear_requests);
                    let mut request = client.json(CHAT, Bytes::new(), &[]);
                    *request.body_mut() = parts(&body, trailers);
                    assert_right(&client.send(request).await, &body);
                    let got = recorded(rig.engines());
                    assert!(!got.is_empty());
                    assert!(got.iter().all(|request| request.header("x-checksum").is_none()));
                }
            }
        }
    });
}

/// A server that takes every upgrade and then sends back what it gets. It records the request lines.
async fn echo_server() -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (lines, seen) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let lines = lines.clone();
            tokio::spawn(async move {
                let head = read_head(&mut stream).await;
                let _ = lines.send(head.lines().next().unwrap_or_default().to_owned());
                let answer = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n";
                stream.write_all(answer.as_bytes()).await.unwrap();
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    (address, seen)
}

async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(head).unwrap()
}

async fn handshake(rig: &Rig, path: &str) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(rig.address()).await.unwrap();
    let head = format!(
        "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let head = tokio::time::timeout(PATIENCE, read_head(&mut stream)).await.expect("an answer, at once");
    (stream, head)
}

/// Codex tries `/v1/responses` before it falls back (BYK/loreai#515, NVIDIA/NeMo-Relay#994).
#[test]
fn an_upgrade_is_refused_at_once_where_it_is_not_allowed() {
    run(async {
        let rig = shared().await;
        for path in ["/v1/realtime?model=sim", "/v1/responses", CHAT] {
            let (_, head) = handshake(&rig, path).await;
            assert!(head.starts_with("HTTP/1.1 501") && head.contains("x-pd-reason: upgrade"), "{head}");
        }
        let (_, head) = handshake(&rig, "/tokenize").await;
        assert!(head.starts_with("HTTP/1.1 403"), "Envoy's own answer, without upgrade_configs: {head}");
        let (answer, _) = rig.client(Http::Two).await.web_socket("/v1/realtime?model=sim").await.unwrap();
        assert_rejected(&answer, 501, "upgrade");
    });
}

#[test]
fn an_upgrade_that_is_allowed_reaches_an_endpoint_of_the_model() {
    run(async {
        let (voice, mut seen) = echo_server().await;
        let rig = Rig::builder()
            .other(voice, "both")
            .list(move |list| {
                for entry in list {
                    let is_voice = entry["address"] == voice.to_string();
                    entry["models"] = if is_voice { json!(["voice/1"]) } else { json!(["sim"]) };
                }
            })
            .plugin(json!({"upgrades": true, "models": {"talk": {"targets": [{"model": "voice/1"}]}}}))
            .start()
            .await;
        for (path, line) in [
            ("/v1/realtime?model=voice/1", "/v1/realtime?model=voice/1"),
            ("/v1/realtime?a=b&model=talk", "/v1/realtime?a=b&model=voice%2F1"),
        ] {
            let (stream, head) = handshake(&rig, path).await;
            assert!(head.starts_with("HTTP/1.1 101"), "{head}");
            assert_eq!(seen.recv().await.unwrap(), format!("GET {line} HTTP/1.1"));
            assert_echoes(stream).await;
            let (answer, stream) = rig.client(Http::Two).await.web_socket(path).await.unwrap();
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert_eq!(seen.recv().await.unwrap(), format!("GET {line} HTTP/1.1"));
            assert_echoes(stream.unwrap()).await;
        }
        let (_, head) = handshake(&rig, "/v1/realtime?model=never").await;
        assert!(head.starts_with("HTTP/1.1 404"), "{head}");
        // A body that an engine could read, if it does not upgrade.
        let mut stream = TcpStream::connect(rig.address()).await.unwrap();
        let body = r#"{"model":"sim","kv_transfer_params":{"do_remote_prefill":true},"messages":[]}"#;
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let head = tokio::time::timeout(PATIENCE, read_head(&mut stream)).await.expect("an answer, at once");
        assert!(head.starts_with("HTTP/1.1 501"), "{head}");
        let (answer, _) = rig.client(Http::Two).await.web_socket("/v1/realtime?model=never").await.unwrap();
        assert_rejected(&answer, 404, "unknown_model");
        assert!(recorded(rig.engines()).is_empty());
    });
}

/// Sends bytes to the server that sends them back.
async fn assert_echoes(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    for part in [&b"\x81\x85frame"[..], &[7; 100_000]] {
        stream.write_all(part).await.unwrap();
        let mut back = vec![0; part.len()];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(back, part);
    }
}

/// Java's HttpClient offers h2c with each request, Apache's HttpClient TLS (envoyproxy/envoy#36305, vllm-project/vllm#57203).
/// Engines lose the body of a request that offers either.
#[test]
fn offers_of_other_protocols_are_ignored_and_reach_no_engine() {
    run(async {
        let rig = shared().await;
        for offer in [
            "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAA\r\n",
            "connection: Upgrade\r\nupgrade: TLS/1.2\r\n",
        ] {
            for body in [long_chat(), short_chat()] {
                rig.engines().for_each(pd_sim::Handle::clear_requests);
                let mut stream = TcpStream::connect(rig.address()).await.unwrap();
                let head = format!(
                    "POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{offer}\
                     transfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
                    body.len()
                );
                stream.write_all(head.as_bytes()).await.unwrap();
                let head = tokio::time::timeout(PATIENCE, read_head(&mut stream)).await.expect("an answer");
                assert!(head.starts_with("HTTP/1.1 200"), "{offer}: {head}");
                let got = recorded(rig.engines());
                assert!(!got.is_empty());
                for leg in got {
                    let offered = ["upgrade", "connection", "http2-settings"].map(|name| leg.header(name).is_some());
                    assert_eq!((offered, leg.body.is_empty()), ([false; 3], false), "{offer}");
                }
            }
        }
    });
}

fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

/// A frame of Zstandard with one block as it is (RFC 8878).
fn zstd(body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap();
    let block = (len << 3 | 1).to_le_bytes();
    [&[0x28, 0xb5, 0x2f, 0xfd, 0xa0], &len.to_le_bytes()[..], &block[..3], body].concat()
}

/// Envoy's decompressors in front of the filter, for requests only.
fn decompress(config: &mut Config) {
    let filter = |name: &str, library: &str| {
        json!({"name": format!("decompress-{name}"), "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.decompressor.v3.Decompressor",
            "decompressor_library": {"name": name, "typed_config": {
                "@type": format!("type.googleapis.com/envoy.extensions.compression.{name}.decompressor.v3.{library}")
            }},
            "request_direction_config": {"advertise_accept_encoding": false},
            "response_direction_config": {"common_config": {"enabled": {"default_value": false, "runtime_key": "none"}}}
        }})
    };
    let filters = config.http_filters();
    filters.insert(0, filter("zstd", "Zstd"));
    filters.insert(0, filter("gzip", "Gzip"));
}

#[test]
fn compressed_bodies_are_read_where_envoy_decompresses_them_first() {
    run(async {
        let rig = Rig::builder().envoy(decompress).start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for body in [long_chat(), short_chat()] {
                for (coding, bytes) in [("gzip", gzip(body.as_bytes())), ("zstd", zstd(body.as_bytes()))] {
                    rig.engines().for_each(pd_sim::Handle::clear_requests);
                    let request = client.json(CHAT, bytes, &[("content-encoding", coding.as_bytes())]);
                    assert_right(&client.send(request).await, &body);
                    let got = recorded(rig.engines());
                    assert!(got.iter().all(|leg| leg.header("content-encoding").is_none()));
                    assert!(got.iter().all(|leg| leg.header("accept-encoding").is_none()));
                }
            }
            let bomb = gzip(format!("{{{}}}", " ".repeat(12 << 20)).as_bytes());
            let request = client.json(CHAT, bomb, &[("content-encoding", b"gzip")]);
            let answer = client.send(request).await;
            assert!((400..500).contains(&answer.status), "{}: {}", answer.status, answer.text());
            for coding in ["br", "deflate", "x-gzip"] {
                let request = client.json(CHAT, short_chat(), &[("content-encoding", coding.as_bytes())]);
                assert_rejected(&client.send(request).await, 415, "content_encoding");
            }
        }
        assert!(sum(&rig.prefill, |stats| stats.prefill_legs) > 0);
        rig.until_idle().await;
    });
}

#[test]
fn without_a_decompressor_compressed_bodies_are_refused() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for (coding, bytes) in [("gzip", gzip(b"{}")), ("GZIP", gzip(b"{}")), ("zstd", zstd(b"{}"))] {
                let request = client.json(CHAT, bytes, &[("content-encoding", coding.as_bytes())]);
                let answer = client.send(request).await;
                assert_rejected(&answer, 415, "content_encoding");
                assert_eq!(answer.header("accept-encoding"), Some("identity"));
            }
            // SGLang decompresses what this header says, so what is inside would reach it unread.
            for path in [CHAT, "/generate", "/invocations"] {
                let request = client.json(path, zstd(b"{}"), &[("x-body-compressed", b"zstd")]);
                assert_rejected(&client.send(request).await, 415, "content_encoding");
            }
            let (feed, body) = Feed::new();
            let mut request = client.json(CHAT, Bytes::new(), &[("content-encoding", b"gzip")]);
            *request.body_mut() = body;
            assert_eq!(client.open(request).await.status, 415, "before the body is there");
            drop(feed);
            if http == Http::One {
                client = rig.client(http).await;
            }
            let request = client.json(CHAT, short_chat(), &[("content-encoding", b"Identity")]);
            assert_eq!(client.send(request).await.status, 200);
        }
    });
}
