//! The HTTP interface: vLLM's endpoints, and the simulator's own beside them.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, SERVER};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use crate::answer::{self, Body, detail, json, typed};
use crate::api_error::ApiError;
use crate::connection::Connection;
use crate::engine::Pod;
use crate::fault::{FAULT_HEADER, Fault, FaultKind, Leg, parse_list};
use crate::generate::{REQUEST_ID, generate};
use crate::guard::Guard;
use crate::head::quote;
use crate::metrics;
use crate::nixl::{ENGINE_HEADER, PAIR_HEADER, PULL_PATH, REVISION_HEADER, Refusal};
use crate::plain;
use crate::request::Generation;
use crate::role::{Engine, Role};
use crate::rooms::{QUERY_PATH, ROOM_PATH};
use crate::rules::{Api, Rules};
use crate::tokens::Prompt;

/// Version of vLLM whose behaviour this is.
const VLLM_VERSION: &str = "0.32.0";
/// The same of SGLang.
const SGLANG_VERSION: &str = "0.5.23";

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
    if !is_authorised(&pod, &parts) {
        pod.stats.status(StatusCode::UNAUTHORIZED.as_u16());
        return json(StatusCode::UNAUTHORIZED, r#"{"error":"Unauthorized"}"#);
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

/// Whether a request may be served: vLLM asks for its API key below these paths only.
fn is_authorised(pod: &Pod, parts: &Parts) -> bool {
    let Some(key) = &pod.config.api_key else { return true };
    let is_guarded = ["/v1", "/inference"].iter().any(|prefix| parts.uri.path().starts_with(prefix));
    let given = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.split_once(' '));
    !is_guarded || given.is_some_and(|(scheme, given)| scheme.eq_ignore_ascii_case("bearer") && given == key)
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
    let revision = parts.headers.get(REVISION_HEADER).map(HeaderValue::as_bytes);
    if revision != pod.config.revision.as_deref().map(str::as_bytes) {
        return typed(StatusCode::UPGRADE_REQUIRED, "text/plain", "compatibility hash mismatch");
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
        Err(refusal) => {
            if refusal == Refusal::Expired {
                pod.lifetime.late_pulls.fetch_add(1, Relaxed);
            }
            typed(StatusCode::CONFLICT, "text/plain", refusal.name())
        }
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
) -> Result<Vec<FaultKind>, Response<Body>> {
    let mut asked = Vec::new();
    for value in parts.headers.get_all(FAULT_HEADER) {
        match parse_list(&String::from_utf8_lossy(value.as_bytes())) {
            Ok(faults) => asked.extend(faults),
            Err(error) => return Err(answer::error(&ApiError::bad_request(error.to_string()))),
        }
    }
    let mut spoilt = Vec::new();
    for kind in pod.faults.hit(asked, pod.config.role, leg, parts.uri.path(), generates) {
        if matches!(kind, FaultKind::MalformedParams(_)) && leg != Leg::Prefill {
            continue;
        }
        pod.stats.fault(&kind.name());
        match kind {
            FaultKind::Delay(time) => tokio::time::sleep(time).await,
            FaultKind::Status(status) => {
                let message = format!("fault: {status}");
                let kind = if status < 500 { "BadRequestError" } else { "InternalServerError" };
                return Err(answer::error(&ApiError { status, kind, message, param: None }));
            }
            FaultKind::Hang | FaultKind::Reset | FaultKind::Refuse(_) | FaultKind::Exit => {
                match kind {
                    FaultKind::Reset => connection.reset(),
                    FaultKind::Refuse(time) => {
                        pod.refuse_for(time);
                        connection.reset();
                    }
                    FaultKind::Exit => pod.crash(),
                    _ => {}
                }
                if kind != FaultKind::Hang
                    && let Some(guard) = guard.take()
                {
                    // Not the client's doing.
                    guard.finish();
                }
                std::future::pending::<()>().await;
            }
            FaultKind::Die(_)
            | FaultKind::ErrorEvent(_)
            | FaultKind::MalformedParams(_)
            | FaultKind::Recompute
            | FaultKind::Stall(_) => {
                spoilt.push(kind);
            }
        }
    }
    Ok(spoilt)
}

/// The engine's endpoints that generate nothing. Routers tell SGLang from vLLM by those that only one of them has.
fn serve_plain(pod: &Pod, parts: &Parts) -> Response<Body> {
    let get = parts.method == Method::GET;
    let is_sglang = pod.config.engine == Engine::Sglang;
    match parts.uri.path() {
        "/server_info" | "/get_server_info" if get && is_sglang => json(StatusCode::OK, sglang_server(pod)),
        "/model_info" | "/get_model_info" if get && is_sglang => {
            let model = quote(pod.config.models.first().map_or("", String::as_str));
            json(StatusCode::OK, format!(r#"{{"model_path":{model},"is_generation":true}}"#))
        }
        "/version" if is_sglang => detail(StatusCode::NOT_FOUND),
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

/// What SGLang says of its process, as far as routers read it.
fn sglang_server(pod: &Pod) -> String {
    serde_json::json!({
        "version": SGLANG_VERSION,
        "served_model_name": pod.config.models.first(),
        "disaggregation_mode": match pod.config.role {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::Both => "null",
        },
        "max_running_requests": pod.config.max_num_seqs,
        "max_total_num_tokens": pod.config.cache_tokens,
    })
    .to_string()
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
            "owned_by": if pod.config.engine == Engine::Sglang { "sglang" } else { "vllm" },
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
            kind: FaultKind::Refuse(time),
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
