//! One chat request through a gateway, its text and its times.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;

/// Longest answer that is waited for.
const LIMIT: Duration = Duration::from_secs(600);

/// A client of one gateway.
#[derive(Clone)]
pub struct Gateway {
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
}

/// What came of a request.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Status, or 0 without one.
    pub status: u16,
    /// Why there is no text: the filter's reason header, the error's code, or what broke.
    pub reason: String,
    /// The text.
    pub text: String,
    /// Tokens of the prompt by the engine's count.
    pub prompt_tokens: u64,
    /// From the first byte sent to the first piece of text; of streams only.
    pub first: Option<Duration>,
    /// From the first byte sent to the end.
    pub whole: Duration,
}

impl Answer {
    /// Whether all of the text is there.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.status == 200 && self.reason.is_empty()
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Piece {
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<ErrorBody>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Choice {
    message: Text,
    delta: Text,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Text {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ErrorBody {
    #[serde(rename = "type")]
    kind: Option<String>,
}

impl Gateway {
    /// A client of the gateway at a base URL.
    #[must_use]
    pub fn new(base: &str) -> Self {
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(4_096).build_http();
        Self { client, url: format!("{}/v1/chat/completions", base.trim_end_matches('/')) }
    }

    /// Sends a body and waits for the end of the answer. Never fails: what goes wrong is the answer's reason.
    pub async fn ask(&self, body: Vec<u8>, id: u64) -> Answer {
        let begun = Instant::now();
        let mut answer = Answer::default();
        match tokio::time::timeout(LIMIT, self.exchange(body, id, begun, &mut answer)).await {
            Ok(Ok(())) => {}
            Ok(Err(why)) => answer.reason = why,
            Err(_) => answer.reason = "timeout".to_owned(),
        }
        answer.whole = begun.elapsed();
        answer
    }

    async fn exchange(&self, body: Vec<u8>, id: u64, begun: Instant, answer: &mut Answer) -> Result<(), String> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(&self.url)
            .header(CONTENT_TYPE, "application/json")
            .header("x-request-id", format!("replay-{id}"))
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| error.to_string())?;
        let response = self.client.request(request).await.map_err(|_| "no answer".to_owned())?;
        answer.status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let streams = header("content-type").is_some_and(|value| value.starts_with("text/event-stream"));
        let reason = header("x-pd-reason").map(str::to_owned);
        let flags = response.headers().get("x-envoy-response-flags").map(HeaderValue::as_bytes).unwrap_or_default();
        let flags = String::from_utf8_lossy(flags).into_owned();
        let ok = response.status() == StatusCode::OK;
        let body = response.into_body();
        if streams && ok {
            return read_events(body, begun, answer).await;
        }
        let bytes = body.collect().await.map_err(|_| "broken answer".to_owned())?.to_bytes();
        let piece: Option<Piece> = serde_json::from_slice(&bytes).ok();
        match piece {
            Some(piece) if ok => {
                answer.prompt_tokens = piece.usage.map_or(0, |usage| usage.prompt_tokens);
                let choice = piece.choices.into_iter().next().ok_or("no choice")?;
                answer.text = choice.message.content.ok_or("no text")?;
                Ok(())
            }
            piece => Err(reason
                .or_else(|| piece?.error?.kind)
                .or_else(|| Some(flags).filter(|flags| !flags.is_empty()))
                .unwrap_or_else(|| String::from_utf8_lossy(&bytes).chars().take(60).collect())),
        }
    }
}

async fn read_events(mut body: Incoming, begun: Instant, answer: &mut Answer) -> Result<(), String> {
    let mut rest: Vec<u8> = Vec::new();
    let mut done = false;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| "stream broken".to_owned())?;
        let Ok(data) = frame.into_data() else { continue };
        rest.extend_from_slice(&data);
        while let Some(end) = rest.windows(2).position(|window| window == b"\n\n") {
            let event: Vec<u8> = rest.drain(..end + 2).collect();
            let Some(data) = event.strip_prefix(b"data: ") else { continue };
            if data == b"[DONE]\n\n" {
                done = true;
                continue;
            }
            let piece: Piece = serde_json::from_slice(data).map_err(|_| "broken event".to_owned())?;
            if let Some(error) = piece.error {
                return Err(error.kind.unwrap_or_else(|| "error event".to_owned()));
            }
            if let Some(usage) = piece.usage {
                answer.prompt_tokens = usage.prompt_tokens;
            }
            let text = piece.choices.into_iter().next().and_then(|choice| choice.delta.content).unwrap_or_default();
            if !text.is_empty() {
                answer.first.get_or_insert_with(|| begun.elapsed());
                answer.text.push_str(&text);
            }
        }
    }
    if done { Ok(()) } else { Err("stream ended early".to_owned()) }
}
