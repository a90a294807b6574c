//! The HTTP API.
//!
//! | path | answer |
//! |---|---|
//! | `GET /v1/watch` | 200 snapshot, 304 no change in time, 400 bad query, 401 bad token |
//! | `POST /v1/exchange` | 200 records of other Envoys, 400 no message of the exchange, 401 bad token, 403 no token set, 413 too large |
//! | `GET /v1/endpoints` | 200 the list in force for people, 401 bad token |
//! | `GET /v1/status` | 200 list, pods, engines and Envoys, for the status page and the terminal, 401 bad token |
//! | `PUT /v1/log-level` | 204 the body is the log level from now on, 400 no such level, 401 no operator's token, 403 no token set |
//! | `GET /` | 200 status page, which asks the person for the token |
//! | `GET /healthz` | 200 while the process answers |
//! | `GET /readyz` | 200 once a list is in force (`degraded: …` while the newest one is refused), else 503 |
//! | `GET /metrics` | 200 OpenMetrics text |
//!
//! `/readyz` stays at 200 while pd-control refuses a list: it serves the last good one, which a restart would lose.

use std::sync::Arc;
use std::time::Duration;

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
use tokio::time::Instant;

use crate::access::rights::{LOG_LEVEL_PATH, Refusal};
use crate::api::app::{App, ClientAddress};
use crate::api::metrics;
use crate::api::status;

/// Time that a poll without `wait_ms` waits.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);
/// Longest time that a poll waits. Proxies cut longer requests.
pub const MAX_WAIT: Duration = Duration::from_secs(60);
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
    let v1 = Router::new()
        .route(WATCH_PATH, get(watch))
        .route(EXCHANGE_PATH, post(exchange).layer(DefaultBodyLimit::max(MAX_MESSAGE_BYTES)))
        .route("/v1/endpoints", get(endpoints))
        .route("/v1/status", get(status))
        .route(LOG_LEVEL_PATH, put(log_level).layer(DefaultBodyLimit::max(MAX_LEVEL_BYTES)))
        .layer(middleware::from_fn_with_state(app.clone(), authorize));
    Router::new()
        .merge(v1)
        .route("/", get(page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_text))
        .fallback(|| async { failure(StatusCode::NOT_FOUND, "no such path") })
        .method_not_allowed_fallback(|| async { failure(StatusCode::METHOD_NOT_ALLOWED, "this method is not allowed") })
        .with_state(app)
}

async fn authorize(
    State(app): State<App>,
    peer: Option<Extension<ClientAddress>>,
    request: Request,
    next: Next,
) -> Response {
    let is_local = peer.is_none_or(|Extension(ClientAddress(address))| address.to_canonical().is_loopback());
    let (path, authorization) = (request.uri().path(), request.headers().get(header::AUTHORIZATION));
    let Err(refusal) = app.rights.check(request.method(), path, authorization, is_local) else {
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
    peer: Option<Extension<ClientAddress>>,
    query: Result<Query<Watch>, QueryRejection>,
) -> Response {
    let answer = match query {
        Err(rejection) => failure(StatusCode::BAD_REQUEST, &rejection.body_text()),
        Ok(Query(query)) => {
            if let Some(Extension(ClientAddress(address))) = peer {
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

async fn exchange(State(app): State<App>, query: Result<Query<Exchanged>, QueryRejection>, body: Bytes) -> Response {
    let request = query.ok().and_then(|Query(query)| Some((query, ExchangeRequest::from_bytes(&body)?)));
    let answer = match request {
        None => failure(StatusCode::BAD_REQUEST, "no message of the exchange"),
        Some((query, request)) => {
            let wait = query.wait_ms.map_or(Duration::ZERO, Duration::from_millis);
            let response = app.hub.answer(&request, wait, app.polls.watching(), app.stopping.clone()).await;
            ([(header::CONTENT_TYPE, "application/octet-stream")], response.to_bytes()).into_response()
        }
    };
    app.counters.exchanged(answer.status().as_u16());
    answer
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
