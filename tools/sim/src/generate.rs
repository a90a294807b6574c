//! Answers of generation requests, streamed or whole.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use tokio::time::Instant;

use crate::answer::{self, Body, Choice, json};
use crate::api_error::ApiError;
use crate::engine::Pod;
use crate::failure::Failure;
use crate::fault::{FaultKind, Leg, Malformed};
use crate::guard::Guard;
use crate::handoff::tokenise;
use crate::head::{Head, quote};
use crate::request::Generation;
use crate::role::Engine;
use crate::run::Run;
use crate::stream::{Streaming, cut_after};

/// Header that names a request.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const ORCA_FORMAT: HeaderName = HeaderName::from_static("endpoint-load-metrics-format");
const ORCA: HeaderName = HeaderName::from_static("endpoint-load-metrics");

/// Computes and answers a generation request.
pub(crate) async fn generate(
    pod: &Arc<Pod>,
    headers: &HeaderMap,
    mut generation: Generation,
    mut guard: Guard,
    spoilt: Vec<FaultKind>,
) -> Response<Body> {
    generation.recomputes = spoilt.contains(&FaultKind::Recompute);
    generation.stall =
        spoilt.iter().find_map(|kind| if let FaultKind::Stall(time) = kind { Some(*time) } else { None });
    let since = Instant::now();
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let request_id = match headers.get(REQUEST_ID) {
        Some(id) => String::from_utf8_lossy(id.as_bytes()).into_owned(),
        None => format!("{:016x}{:016x}", pod.ticket(), pod.ticket()),
    };
    let mut head = Head::new(generation.api, &request_id, created, &generation.model);
    head.shape = generation.shape.clone();
    if generation.store {
        let prompts: Vec<u8> = generation.prompts.iter().flat_map(|prompt| prompt.rendered.clone()).collect();
        pod.stored.insert(&head.id, &prompts);
    }
    let ending = spoilt.iter().copied().find(|kind| matches!(kind, FaultKind::Die(_) | FaultKind::ErrorEvent(_)));
    if generation.stream {
        pod.stats.add(&pod.stats.streams, 1);
        let stream = Streaming { pod: Arc::clone(pod), generation, head, guard, spoilt: ending, since };
        return typed_body("text/event-stream; charset=utf-8", stream.into_body());
    }
    let mut run = match pod.admit(&generation, since).await {
        Ok(run) => run,
        Err(Failure::Error(error)) => {
            guard.finish();
            return answer::error(&error);
        }
        Err(Failure::Hang) => std::future::pending().await,
    };
    while run.advance().await {}
    if let Some(FaultKind::ErrorEvent(_)) = ending {
        guard.finish();
        return answer::error(&ApiError::internal("Internal server error"));
    }
    let mut response = whole(pod, &generation, &mut run, &head, &spoilt);
    drop(run);
    if let Some(report) = headers.get(ORCA_FORMAT).and_then(|format| orca(pod, format)) {
        response.headers_mut().insert(ORCA, report);
    }
    guard.finish();
    response
}

/// The whole answer of a request whose tokens have all come.
fn whole(pod: &Pod, generation: &Generation, run: &mut Run, head: &Head, spoilt: &[FaultKind]) -> Response<Body> {
    let params = run.finish(generation, &head.id);
    // Empty where nothing is to be repeated: a long prompt takes a while to check.
    let echoes: Vec<_> = generation
        .prompts
        .iter()
        .filter(|_| generation.echo)
        .map(|prompt| String::from_utf8_lossy(&prompt.rendered))
        .collect();
    let choices: Vec<Choice<'_>> = run
        .outputs()
        .enumerate()
        .map(|(index, output)| Choice { output, echo: echoes.get(index / generation.n as usize).map(|echo| &**echo) })
        .collect();
    let malformed = spoilt.iter().find_map(|kind| match kind {
        FaultKind::MalformedParams(how) => Some(*how),
        _ => None,
    });
    let params = params.unwrap_or_else(|| "null".to_owned());
    let is_context = pod.config.engine == Engine::Trtllm && generation.leg() == Leg::Prefill;
    let ids = generation.prompts.first().filter(|_| is_context).map(|prompt| tokenise(&prompt.rendered));
    let body = malform(malformed, &params, |kv| match &ids {
        Some(ids) => context_answer(&head.whole(&choices, run.usage, None), kv, ids),
        None => head.whole(&choices, run.usage, kv),
    });
    if !spoilt.iter().any(|kind| matches!(kind, FaultKind::Die(_))) {
        return json(StatusCode::OK, body);
    }
    let body = Bytes::from(body);
    let mut response = typed_body("application/json", cut_after(&body, body.len() / 2));
    response.headers_mut().insert(CONTENT_LENGTH, body.len().into());
    response
}

/// The answer to a `context_only` request: parameters in the first choice, the prompt's ids at the end.
fn context_answer(whole: &str, params: Option<&str>, ids: &str) -> String {
    const IDS: &str = r#""prompt_token_ids":"#;
    let (front, end) = whole.rsplit_once(IDS).unwrap_or((whole, "null}"));
    let choice = r#"{"index":0,"#;
    let params = params.map(|params| format!("\"disaggregated_params\":{params},")).unwrap_or_default();
    let front = front.replacen(choice, &format!("{choice}{params}"), 1);
    format!("{front}{IDS}{}", end.replacen("null", ids, 1))
}

/// The body around good or spoilt parameters.
fn malform(how: Option<Malformed>, params: &str, body: impl Fn(Option<&str>) -> String) -> String {
    let rebuilt = |change: fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let mut map = serde_json::from_str(params).unwrap_or_default();
        change(&mut map);
        serde_json::Value::Object(map).to_string()
    };
    match how {
        None => body(Some(params)),
        Some(Malformed::Missing) => body(None),
        Some(Malformed::Null) => body(Some("null")),
        Some(Malformed::String) => body(Some(&quote(params))),
        Some(Malformed::NoRequestId) => body(Some(&rebuilt(|map| {
            map.remove("remote_request_id");
        }))),
        Some(Malformed::NullBlocks) => body(Some(&rebuilt(|map| {
            map.insert("remote_block_ids".to_owned(), serde_json::Value::Null);
        }))),
        Some(Malformed::Truncated) => {
            let mut body = body(Some(params));
            // The closing brace of the answer and the second half of the object go.
            body.truncate(body.len().saturating_sub(1 + params.len() / 2));
            body
        }
    }
}

/// The load report that a client asked for, as vLLM writes it.
fn orca(pod: &Pod, format: &HeaderValue) -> Option<HeaderValue> {
    let format = format.to_str().ok()?;
    let (usage, waiting) = (pod.cache.usage(), pod.waiting.load(Relaxed) as f64);
    let report = if format.eq_ignore_ascii_case("text") {
        format!("TEXT named_metrics.kv_cache_usage_perc={usage:?}, named_metrics.num_requests_waiting={waiting:?}")
    } else if format.eq_ignore_ascii_case("json") {
        format!(
            r#"JSON {{"named_metrics": {{"kv_cache_usage_perc": {usage:?}, "num_requests_waiting": {waiting:?}}}}}"#
        )
    } else {
        return None;
    };
    HeaderValue::try_from(report).ok()
}

fn typed_body(content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
