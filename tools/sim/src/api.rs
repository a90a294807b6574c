//! The HTTP interface: vLLM's endpoints, and the simulator's own beside them.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, SERVER};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::answer::{self, Body, Choice, Head, detail, json, quote, typed};
use crate::config::Engine;
use crate::engine::{Failure, Pod};
use crate::fault::{FAULT_HEADER, Fault, Kind, Leg, Malformed, parse_list};
use crate::handoff::tokenise;
use crate::metrics;
use crate::nixl::{ENGINE_HEADER, PAIR_HEADER, PULL_PATH};
use crate::plain;
use crate::request::{Api, ApiError, Generation, Rules};
use crate::rooms::{QUERY_PATH, ROOM_PATH};
use crate::server::Connection;
use crate::stream::{Streaming, cut_after};
use crate::tokens::Prompt;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const ORCA_FORMAT: HeaderName = HeaderName::from_static("endpoint-load-metrics-format");
const ORCA: HeaderName = HeaderName::from_static("endpoint-load-metrics");
/// Version of vLLM whose behaviour this is.
const VLLM_VERSION: &str = "0.32.0";

/// Counts a generation request as in flight, and as left by its client unless it is finished.
pub(crate) struct Guard {
    pod: Arc<Pod>,
    finished: bool,
}

impl Guard {
    fn new(pod: &Arc<Pod>) -> Self {
        pod.stats.add(&pod.stats.in_flight, 1);
        Self { pod: Arc::clone(pod), finished: false }
    }

    pub(crate) fn finish(&mut self) {
        self.finished = true;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let stats = &self.pod.stats;
        stats.in_flight.fetch_sub(1, Relaxed);
        if !self.finished {
            stats.client_disconnects.fetch_add(1, Relaxed);
        }
        stats.touch();
    }
}

/// Answers one request of the API.
pub(crate) async fn serve(pod: Arc<Pod>, connection: Arc<Connection>, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    let own = matches!(path, "/stats" | "/stats/reset" | "/requests" | "/fault");
    let body = match read(body, &parts.headers, pod.config.max_body_bytes).await {
        Ok(body) => body,
        Err(error) => return answer::error(&error),
    };
    if own {
        return serve_own(&pod, &parts, &body);
    }
    pod.stats.request(match path {
        "/v1/models" | "/health" | "/metrics" | "/version" => path,
        _ if Api::of_path(path).is_some() => path,
        _ => "other",
    });
    // Probes and scrapes would push the requests out that a test looks for.
    if !matches!(path, "/health" | "/metrics") {
        pod.recorder.record(&parts, &body);
    }
    let api = Api::of_path(path).filter(|_| parts.method == Method::POST);
    let mut guard = api.is_some().then(|| Guard::new(&pod));
    let parsed = api.map(|api| parse(&pod, api, &parts.headers, &body));
    let plain = plain::serve(&pod, &parts, &body);
    drop(body);
    let leg = match &parsed {
        Some(Ok(generation)) => generation.leg(),
        _ => Leg::Plain,
    };
    let mut response = match faults(&pod, &connection, &parts, leg, api.is_some(), guard.as_mut()).await {
        Err(response) => response,
        Ok(spoilt) => match parsed {
            None => plain.unwrap_or_else(|| serve_plain(&pod, &parts)),
            Some(Err(error)) => answer::error(&error),
            Some(Ok(generation)) => {
                let guard = guard.take().unwrap_or_else(|| Guard::new(&pod));
                generate(&pod, &parts.headers, generation, guard, spoilt).await
            }
        },
    };
    if let Some(guard) = &mut guard {
        guard.finish();
    }
    if let Some(id) = parts.headers.get(REQUEST_ID) {
        response.headers_mut().insert(REQUEST_ID, id.clone());
    }
    response.headers_mut().insert(SERVER, HeaderValue::from_static("uvicorn"));
    pod.stats.status(response.status().as_u16());
    response
}

/// Answers one request of the side channel.
pub(crate) async fn serve_side(pod: Arc<Pod>, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let engine_id = parts.headers.get(ENGINE_HEADER).map(HeaderValue::as_bytes);
    if parts.uri.path() == QUERY_PATH && pod.config.engine == Engine::Mooncake {
        pod.stats.request(QUERY_PATH);
        let engine_id = quote(&pod.engine_id);
        return json(StatusCode::OK, format!(r#"{{"0":{{"engine_id":{engine_id},"worker_addr":{{"0":{{}}}}}}}}"#));
    }
    if let Some(key) = parts.uri.path().strip_prefix(ROOM_PATH)
        && engine_id.is_none_or(|id| id == pod.engine_id.as_bytes())
    {
        return match pod.rooms.take(key, pod.config.lease).await {
            Some(Ok(digest)) => {
                pod.stats.add(&pod.stats.leases_pulled, 1);
                typed(StatusCode::OK, "text/plain", digest.to_string())
            }
            Some(Err(())) => typed(StatusCode::CONFLICT, "text/plain", "reused"),
            None => typed(StatusCode::NOT_FOUND, "text/plain", "nobody came"),
        };
    }
    if parts.uri.path() != PULL_PATH || engine_id != Some(pod.engine_id.as_bytes()) {
        return typed(StatusCode::NOT_FOUND, "text/plain", "no such engine here");
    }
    let raw = match read(body, &parts.headers, pod.config.max_body_bytes).await {
        Ok(raw) => raw,
        Err(error) => return answer::error(&error),
    };
    pod.end_leases(false);
    let pair = parts.headers.get(PAIR_HEADER).and_then(|value| value.to_str().ok());
    if !pod.leases.pairs(&raw, pair) {
        return typed(StatusCode::PRECONDITION_FAILED, "text/plain", "another request's");
    }
    match pod.leases.pull(&raw) {
        Ok(digest) => {
            pod.stats.add(&pod.stats.leases_pulled, 1);
            typed(StatusCode::OK, "text/plain", digest.to_string())
        }
        Err(refusal) => typed(StatusCode::CONFLICT, "text/plain", refusal.name()),
    }
}

async fn read(mut body: Incoming, headers: &HeaderMap, limit: usize) -> Result<Bytes, ApiError> {
    let broken = |_| ApiError::bad_request("There was an error parsing the body: it ends early");
    let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        if whole.len() + data.len() > limit {
            let message = format!("The body is larger than {limit} bytes");
            return Err(ApiError { status: 413, ..ApiError::bad_request(message) });
        }
        if whole.is_empty() {
            // Most bodies are one frame: no copy.
            if length == Some(data.len()) {
                return Ok(data);
            }
            whole.reserve(length.unwrap_or(0).min(limit));
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

fn parse(pod: &Pod, api: Api, headers: &HeaderMap, body: &Bytes) -> Result<Generation, ApiError> {
    let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case("application/json") {
        return Err(ApiError::bad_request("Unsupported Media Type: Only 'application/json' is allowed"));
    }
    let mut generation = Generation::parse(api, body, Rules::of(&pod.config))?;
    generation.request_id = headers.get(REQUEST_ID).map(|id| String::from_utf8_lossy(id.as_bytes()).into_owned());
    if let Some(id) = &generation.previous {
        let whole =
            [pod.stored.prompt(id)?, generation.prompts.iter().flat_map(|prompt| prompt.rendered.clone()).collect()];
        generation.prompts = vec![Prompt::new(&generation.model, None, whole.concat())];
    }
    let loras = pod.loras();
    let models = &mut pod.config.models.iter().chain(&loras);
    if !models.any(|model| *model == generation.model) {
        return Err(ApiError::unknown_model(&generation.model));
    }
    Ok(generation)
}

/// Applies the faults that hit: those that replace the answer at once, the rest for the answer to apply.
async fn faults(
    pod: &Arc<Pod>,
    connection: &Connection,
    parts: &Parts,
    leg: Leg,
    generates: bool,
    mut guard: Option<&mut Guard>,
) -> Result<Vec<Kind>, Response<Body>> {
    let mut asked = Vec::new();
    for value in parts.headers.get_all(FAULT_HEADER) {
        match parse_list(&String::from_utf8_lossy(value.as_bytes())) {
            Ok(faults) => asked.extend(faults),
            Err(error) => return Err(answer::error(&ApiError::bad_request(error.to_string()))),
        }
    }
    let mut spoilt = Vec::new();
    for kind in pod.faults.hit(asked, pod.config.role, leg, parts.uri.path(), generates) {
        if matches!(kind, Kind::MalformedParams(_)) && leg != Leg::Prefill {
            continue;
        }
        pod.stats.fault(&kind.name());
        match kind {
            Kind::Delay(time) => tokio::time::sleep(time).await,
            Kind::Status(status) => {
                let message = format!("fault: {status}");
                let kind = if status < 500 { "BadRequestError" } else { "InternalServerError" };
                return Err(answer::error(&ApiError { status, kind, message, param: None }));
            }
            Kind::Hang | Kind::Reset | Kind::Refuse(_) | Kind::Exit => {
                match kind {
                    Kind::Reset => connection.reset(),
                    Kind::Refuse(time) => {
                        pod.refuse_for(time);
                        connection.reset();
                    }
                    Kind::Exit => pod.crash(),
                    _ => {}
                }
                if kind != Kind::Hang
                    && let Some(guard) = guard.take()
                {
                    // Not the client's doing.
                    guard.finish();
                }
                std::future::pending::<()>().await;
            }
            Kind::Die(_) | Kind::ErrorEvent(_) | Kind::MalformedParams(_) => spoilt.push(kind),
        }
    }
    Ok(spoilt)
}

async fn generate(
    pod: &Arc<Pod>,
    headers: &HeaderMap,
    generation: Generation,
    mut guard: Guard,
    spoilt: Vec<Kind>,
) -> Response<Body> {
    let since = Instant::now();
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let request_id = match headers.get(REQUEST_ID) {
        Some(id) => String::from_utf8_lossy(id.as_bytes()).into_owned(),
        None => format!("{:016x}{:016x}", pod.ticket(), pod.ticket()),
    };
    let head = Head::new(generation.api, &request_id, created, &generation.model);
    if generation.store {
        let prompts: Vec<u8> = generation.prompts.iter().flat_map(|prompt| prompt.rendered.clone()).collect();
        pod.stored.insert(&head.id, &prompts);
    }
    let ending = spoilt.iter().copied().find(|kind| matches!(kind, Kind::Die(_) | Kind::ErrorEvent(_)));
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
    if let Some(Kind::ErrorEvent(_)) = ending {
        guard.finish();
        return answer::error(&ApiError::internal("Internal server error"));
    }
    let params = run.finish(&generation, &head.id);
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
        Kind::MalformedParams(how) => Some(*how),
        _ => None,
    });
    let params = params.unwrap_or_else(|| "null".to_owned());
    let is_context = pod.config.engine == Engine::Trtllm && generation.leg() == Leg::Prefill;
    let ids = generation.prompts.first().filter(|_| is_context).map(|prompt| tokenise(&prompt.rendered));
    let body = malform(malformed, &params, |kv| match &ids {
        Some(ids) => context_answer(&head.whole(&choices, run.usage, None), kv, ids),
        None => head.whole(&choices, run.usage, kv),
    });
    let mut response = match ending {
        Some(Kind::Die(_)) => {
            let body = Bytes::from(body);
            let mut response = typed_body("application/json", cut_after(&body, body.len() / 2));
            response.headers_mut().insert(CONTENT_LENGTH, body.len().into());
            response
        }
        _ => json(StatusCode::OK, body),
    };
    drop(run);
    if let Some(report) = headers.get(ORCA_FORMAT).and_then(|format| orca(pod, format)) {
        response.headers_mut().insert(ORCA, report);
    }
    guard.finish();
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

/// vLLM's endpoints that generate nothing.
fn serve_plain(pod: &Pod, parts: &Parts) -> Response<Body> {
    let get = parts.method == Method::GET;
    match parts.uri.path() {
        "/v1/models" if get => json(StatusCode::OK, models(pod)),
        "/health" if get => Response::new(answer::full(Bytes::new())),
        "/version" if get => json(StatusCode::OK, format!(r#"{{"version":"{VLLM_VERSION}"}}"#)),
        "/metrics" if get => typed(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics::render(pod)),
        "/v1/models" | "/health" | "/version" | "/metrics" => detail(StatusCode::METHOD_NOT_ALLOWED),
        path if Api::of_path(path).is_some() => detail(StatusCode::METHOD_NOT_ALLOWED),
        path if path.starts_with("/v1/responses/") => stored(pod, path, get),
        _ => detail(StatusCode::NOT_FOUND),
    }
}

/// A kept response, asked for again or cancelled.
fn stored(pod: &Pod, path: &str, get: bool) -> Response<Body> {
    let id = path.split('/').nth(3).unwrap_or_default();
    match pod.stored.prompt(id) {
        Err(error) => answer::error(&error),
        Ok(_) if get => {
            json(StatusCode::OK, format!(r#"{{"id":{},"object":"response","status":"completed"}}"#, quote(id)))
        }
        Ok(_) => answer::error(&ApiError::bad_field("response_id", "Cannot cancel a synchronous response.")),
    }
}

fn models(pod: &Pod) -> String {
    let base = pod.config.models.first().map_or("", String::as_str);
    let card = |name: &String, parent: Option<&str>| {
        serde_json::json!({
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "vllm",
            "root": name,
            "parent": parent,
            "max_model_len": parent.is_none().then_some(pod.config.max_model_len),
            "permission": [],
        })
    };
    let bases = pod.config.models.iter().map(|name| card(name, None));
    let loras = pod.loras();
    let adapters = loras.iter().map(|name| card(name, Some(base)));
    serde_json::json!({"object": "list", "data": bases.chain(adapters).collect::<Vec<_>>()}).to_string()
}

/// The simulator's own endpoints; no fault reaches them.
fn serve_own(pod: &Arc<Pod>, parts: &Parts, body: &Bytes) -> Response<Body> {
    match (&parts.method, parts.uri.path()) {
        (&Method::GET, "/stats") => {
            json(StatusCode::OK, serde_json::to_vec_pretty(&pod.snapshot()).unwrap_or_default())
        }
        (&Method::POST, "/stats/reset") => {
            pod.stats.reset();
            json(StatusCode::OK, "{}")
        }
        (&Method::GET, "/requests") => json(StatusCode::OK, pod.recorder.to_json().to_string()),
        (&Method::DELETE, "/requests") => {
            pod.recorder.clear();
            json(StatusCode::OK, "{}")
        }
        (&Method::GET, "/fault") => fault_list(pod),
        (&Method::DELETE, "/fault") => {
            pod.faults.set(Vec::new());
            fault_list(pod)
        }
        (&Method::POST, "/fault") => match parse_list(&String::from_utf8_lossy(body)) {
            Ok(faults) => {
                set_faults(pod, faults);
                fault_list(pod)
            }
            Err(error) => answer::error(&ApiError::bad_request(error.to_string())),
        },
        _ => detail(StatusCode::METHOD_NOT_ALLOWED),
    }
}

fn fault_list(pod: &Pod) -> Response<Body> {
    let faults: Vec<String> = pod.faults.list().iter().map(Fault::to_string).collect();
    json(StatusCode::OK, serde_json::json!({ "faults": faults }).to_string())
}

/// Puts faults in force in place of the earlier ones. `refuse` without conditions happens now, not at a request.
pub(crate) fn set_faults(pod: &Arc<Pod>, mut faults: Vec<Fault>) {
    faults.retain(|fault| match fault {
        Fault {
            kind: Kind::Refuse(time),
            role: None,
            is_handover: false,
            probability: 1.0,
            count: None,
            path: None,
        } => {
            pod.stats.fault("refuse");
            pod.refuse_for(*time);
            false
        }
        _ => true,
    });
    pod.faults.set(faults);
}
