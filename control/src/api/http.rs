//! The HTTP API.
//!
//! | path | answer |
//! |---|---|
//! | `GET /v1/watch` | 200 snapshot, 304 no change in time, 400 bad query, 401 bad token |
//! | `POST /v1/exchange` | 200 records of other Envoys, 400 no message of the exchange, 401 bad token, 403 no token set or records of other Envoys without the replicas' token, 408 it did not come in time, 413 too large, 503 too much in flight |
//! | `GET /v1/endpoints` | 200 the list in force for people, 401 bad token |
//! | `GET /v1/status` | 200 list, pods, engines and Envoys, for the status page and the terminal, 401 bad token |
//! | `PUT /v1/log-level` | 204 the body is the log level from now on, 400 no such level, 401 no operator's token, 403 no token set |
//! | `GET /` | 200 status page, which asks the person for the token |
//! | `GET /healthz` | 200 while the process answers |
//! | `GET /readyz` | 200 once a list is in force (`degraded: …` while the newest one is refused), else 503 |
//! | `GET /metrics` | 200 OpenMetrics text |
//!
//! `/v1/endpoints`, `/v1/status` and `/metrics` answer 503 while a host asks for too many of them at a time.
//!
//! `/readyz` stays at 200 while pd-control refuses a list: it serves the last good one, which a restart would lose.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use pd_core::envoys::message::{EXCHANGE_PATH, ExchangeRequest, MAX_MESSAGE_BYTES};
use pd_core::wire::{Endpoint, WATCH_PATH};
use prometheus_client::metrics::gauge::Gauge;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};

use crate::access::rights::{LOG_LEVEL_PATH, Refusal};
use crate::api::app::{App, ClientAddress};
use crate::api::in_flight::Held;
use crate::api::metrics;
use crate::api::status;

/// Time that a poll without `wait_ms` waits.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);
/// Longest time that a poll waits. Proxies cut longer requests.
pub const MAX_WAIT: Duration = Duration::from_secs(60);
/// Time limit within which a message of the exchange must arrive. A filter gives up after a second.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes that each message of the exchange counts for at least: its head and its task.
const LEAST_HELD: usize = 16 << 10;
/// Bytes that a waiting message counts for each Envoy that it names.
const HELD_PER_ITEM: usize = 160;
/// Answer to a body that is no message of the exchange.
const NO_MESSAGE: (StatusCode, &str) = (StatusCode::BAD_REQUEST, "no message of the exchange");
/// Longest body of `PUT /v1/log-level`, in bytes.
const MAX_LEVEL_BYTES: usize = 1 << 10;
/// The status page. It loads nothing from elsewhere.
const PAGE: &str = include_str!("page.html");
/// Content security policy of the status page: it may ask pd-control alone.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                           connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

/// Query of the long poll; see [`pd_core::wire`].
#[derive(Debug, Deserialize)]
struct Watch {
    #[serde(default)]
    epoch: String,
    #[serde(default)]
    since: u64,
    wait_ms: Option<u64>,
}

/// Query of `POST /v1/exchange`.
#[derive(Debug, Deserialize)]
struct Exchanged {
    wait_ms: Option<u64>,
}

#[derive(Serialize)]
struct EndpointsView<'a> {
    epoch: &'a str,
    version: u64,
    age_ms: u64,
    source: &'a str,
    degraded: Option<String>,
    endpoints: &'a [Endpoint],
}

#[derive(Serialize)]
struct Failure<'a> {
    error: &'a str,
}

/// Whether a client of the exchange speaks for other Envoys.
#[derive(Clone, Copy, Debug)]
struct MayRelay(bool);

/// Bytes that count as in flight until they are written.
struct HeldBytes {
    bytes: Bytes,
    _held: Held,
}

impl AsRef<[u8]> for HeldBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Counts a poll while it waits. Dropping it ends the count, also when the client disconnects.
struct Waiting<'a>(&'a Gauge);

impl<'a> Waiting<'a> {
    fn new(gauge: &'a Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The routes of the API.
pub fn router(app: App) -> Router {
    let views = || middleware::from_fn_with_state(app.clone(), bound_views);
    let v1 = Router::new()
        .route(WATCH_PATH, get(watch))
        .route(EXCHANGE_PATH, post(exchange))
        .route("/v1/endpoints", get(endpoints).layer(views()))
        .route("/v1/status", get(status).layer(views()))
        .route(LOG_LEVEL_PATH, put(log_level).layer(DefaultBodyLimit::max(MAX_LEVEL_BYTES)))
        .layer(middleware::from_fn_with_state(app.clone(), authorize));
    Router::new()
        .merge(v1)
        .route("/", get(page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_text).layer(views()))
        .fallback(|| async { failure(StatusCode::NOT_FOUND, "no such path") })
        .method_not_allowed_fallback(|| async { failure(StatusCode::METHOD_NOT_ALLOWED, "this method is not allowed") })
        .with_state(app)
}

async fn authorize(
    State(app): State<App>,
    client: Option<Extension<ClientAddress>>,
    mut request: Request,
    next: Next,
) -> Response {
    let is_local = client.is_none_or(|Extension(ClientAddress(address))| address.to_canonical().is_loopback());
    let (path, authorization) = (request.uri().path(), request.headers().get(header::AUTHORIZATION));
    let Err(refusal) = app.rights.check(request.method(), path, authorization, is_local) else {
        let may_relay = MayRelay(app.rights.may_relay(authorization));
        request.extensions_mut().insert(may_relay);
        return next.run(request).await;
    };
    let answer = match refusal {
        Refusal::TokenNeeded => {
            let answer = failure(StatusCode::UNAUTHORIZED, "a bearer token with that right is needed");
            ([(header::WWW_AUTHENTICATE, "Bearer")], answer).into_response()
        }
        Refusal::NoTokenSet => failure(StatusCode::FORBIDDEN, "without a token set, only the same host may write"),
    };
    match path {
        WATCH_PATH => app.counters.watch_answered(answer.status().as_u16()),
        EXCHANGE_PATH => app.counters.exchanged(answer.status().as_u16()),
        _ => {}
    }
    answer
}

async fn watch(
    State(app): State<App>,
    client: Option<Extension<ClientAddress>>,
    query: Result<Query<Watch>, QueryRejection>,
) -> Response {
    let answer = match query {
        Err(rejection) => failure(StatusCode::BAD_REQUEST, &rejection.body_text()),
        Ok(Query(query)) => {
            if let Some(Extension(ClientAddress(address))) = client {
                let is_ours = query.epoch == app.registry.current().epoch();
                app.polls.seen(address, if is_ours { query.since } else { 0 });
            }
            match next_answer(&app, &query).await {
                Some(snapshot) => {
                    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
                    (headers, snapshot).into_response()
                }
                None => StatusCode::NOT_MODIFIED.into_response(),
            }
        }
    };
    app.counters.watch_answered(answer.status().as_u16());
    answer
}

async fn exchange(
    State(app): State<App>,
    client: Option<Extension<ClientAddress>>,
    Extension(MayRelay(may_relay)): Extension<MayRelay>,
    query: Result<Query<Exchanged>, QueryRejection>,
    request: Request,
) -> Response {
    let host = host(client);
    let answer = match query {
        Err(_) => Err(NO_MESSAGE),
        Ok(Query(query)) => exchanged(&app, host, may_relay, &query, request).await,
    };
    let answer = match answer {
        Ok(answer) => ([(header::CONTENT_TYPE, "application/octet-stream")], answer).into_response(),
        Err((status, error)) => failure(status, error),
    };
    app.counters.exchanged(answer.status().as_u16());
    answer
}

/// Reads a message of the exchange, takes its records and answers it. Its bytes, and those of the answer until that is
/// written, count for the host.
async fn exchanged(
    app: &App,
    host: IpAddr,
    may_relay: bool,
    query: &Exchanged,
    request: Request,
) -> Result<Bytes, (StatusCode, &'static str)> {
    let busy = (StatusCode::SERVICE_UNAVAILABLE, "too many messages of the exchange are in flight");
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let length: usize = length.unwrap_or(MAX_MESSAGE_BYTES);
    if length > MAX_MESSAGE_BYTES {
        return Err((StatusCode::PAYLOAD_TOO_LARGE, "the message is too large"));
    }
    // The bytes of the message, its parsed form, and what grows while pd-control reads it.
    let mut held = app.exchanges.hold(host, length.saturating_mul(3).saturating_add(LEAST_HELD)).ok_or(busy)?;
    let body = timeout(READ_TIMEOUT, to_bytes(request.into_body(), length)).await;
    let body = body.map_err(|_| (StatusCode::REQUEST_TIMEOUT, "the message did not come in time"))?;
    let message = body.ok().and_then(|body| ExchangeRequest::from_bytes(&body)).ok_or(NO_MESSAGE)?;
    if !may_relay && message.records.iter().any(|record| record.gateway != message.from) {
        return Err((StatusCode::FORBIDDEN, "only the replicas' token lets a client send records of other Envoys"));
    }
    app.hub.count_only(&app.registry.current());
    let message = app.hub.take(message, host);
    let _ = held.resize((message.known.len() + message.records.len()) * HELD_PER_ITEM + LEAST_HELD);
    let wait = query.wait_ms.map_or(Duration::ZERO, Duration::from_millis);
    let response = app.hub.answer(&message, wait, app.polls.watching(), app.stopping.clone()).await;
    let bytes = response.to_bytes();
    if !held.resize(bytes.len().saturating_add(LEAST_HELD)) {
        return Err(busy);
    }
    Ok(Bytes::from_owner(HeldBytes { bytes: bytes.into(), _held: held }))
}

/// Holds a place for an answer until that is written.
async fn bound_views(
    State(app): State<App>,
    client: Option<Extension<ClientAddress>>,
    request: Request,
    next: Next,
) -> Response {
    let Some(held) = app.views.hold(host(client), 1) else {
        return failure(StatusCode::SERVICE_UNAVAILABLE, "too many of these answers are in flight");
    };
    let (parts, body) = next.run(request).await.into_parts();
    // The body is in memory already.
    let bytes = to_bytes(body, usize::MAX).await.unwrap_or_default();
    Response::from_parts(parts, Body::from(Bytes::from_owner(HeldBytes { bytes, _held: held })))
}

fn host(client: Option<Extension<ClientAddress>>) -> IpAddr {
    client.map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), |Extension(ClientAddress(address))| address.to_canonical())
}

/// The answer to a poll, as soon as there is a change; `None` when the poll's time is over or pd-control stops.
async fn next_answer(app: &App, query: &Watch) -> Option<Bytes> {
    let wait = query.wait_ms.map_or(DEFAULT_WAIT, Duration::from_millis).min(MAX_WAIT);
    let deadline = Instant::now() + wait;
    let mut published = app.registry.subscribe();
    let mut stopping = app.stopping.clone();
    let _waiting = Waiting::new(&app.counters.pollers);
    loop {
        let current = Arc::clone(&published.borrow_and_update());
        if let Some(answer) = current.answer(&query.epoch, query.since) {
            return Some(answer);
        }
        tokio::select! {
            changed = published.changed() => changed.ok()?,
            _ = stopping.wait_for(|is_stopping| *is_stopping) => return None,
            () = tokio::time::sleep_until(deadline) => return None,
        }
    }
}

async fn endpoints(State(app): State<App>) -> Response {
    let published = app.registry.current();
    let age = published.changed_at().elapsed().unwrap_or_default();
    let view = EndpointsView {
        epoch: published.epoch(),
        version: published.version(),
        age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        source: app.health.source(),
        degraded: app.health.degraded(),
        endpoints: published.endpoints(),
    };
    // serde_json cannot fail on strings, integers and finite floats.
    let text = serde_json::to_string_pretty(&view).unwrap_or_default() + "\n";
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

async fn status(State(app): State<App>) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], Json(status::view(&app))).into_response()
}

async fn log_level(State(app): State<App>, body: String) -> Response {
    let level = body.trim();
    match app.log.as_ref().map(|log| log.set(level)) {
        Some(Ok(())) => {
            tracing::warn!("the log level is {level} from now on");
            StatusCode::NO_CONTENT.into_response()
        }
        Some(Err(error)) => failure(StatusCode::BAD_REQUEST, &error),
        None => failure(StatusCode::NOT_FOUND, "the log is not pd-control's own"),
    }
}

async fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, PAGE_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, PAGE).into_response()
}

async fn readyz(State(app): State<App>) -> Response {
    if app.registry.current().version() == 0 {
        let why = app.health.degraded().map_or(String::new(), |reason| format!(": {reason}"));
        return (StatusCode::SERVICE_UNAVAILABLE, format!("no endpoint list yet{why}\n")).into_response();
    }
    match app.health.degraded() {
        None => "ok\n".into_response(),
        Some(reason) => format!("degraded: {reason}\n").into_response(),
    }
}

async fn metrics_text(State(app): State<App>) -> Response {
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], app.metrics.encode()).into_response()
}

fn failure(status: StatusCode, error: &str) -> Response {
    (status, Json(Failure { error })).into_response()
}
