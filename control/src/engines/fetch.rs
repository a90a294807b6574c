//! Fetches the metrics and the models of one engine over HTTP.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pd_core::wire::{MAX_MODELS, MAX_NAME_BYTES};
use serde::Deserialize;
use tokio::time::timeout;

use crate::engines::answers::Outcome;
use crate::engines::metrics::{EngineLoad, Reader};

/// Time limit of one request, and of connecting.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of metrics that pd-control reads; vLLM sends a hundred thousand.
const MAX_METRICS_BYTES: usize = 8 << 20;
/// Bytes of a list of models that pd-control reads.
const MAX_MODELS_BYTES: usize = 1 << 20;

/// A client that keeps one connection to each engine open.
pub type EngineClient = Client<HttpConnector, Empty<Bytes>>;

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

/// A client without open connections.
#[must_use]
pub fn client() -> EngineClient {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(TIMEOUT));
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).pool_max_idle_per_host(1).build(connector)
}

/// Asks one engine for its metrics, and for its models if `wants_models`.
pub async fn ask(client: EngineClient, address: SocketAddr, wants_models: bool) -> (SocketAddr, Outcome) {
    let outcome = timeout(TIMEOUT, async {
        let load = metrics_of(&client, address).await?;
        // An engine may require an API key for its models. That is no failure.
        let models = if wants_models { models_of(&client, address).await.ok() } else { None };
        Ok((load, models))
    });
    (address, outcome.await.unwrap_or_else(|_| Err(format!("no answer in {TIMEOUT:?}"))))
}

/// TensorRT-LLM serves its metrics at a path of its own; at `/metrics` it serves other data.
async fn metrics_of(client: &EngineClient, address: SocketAddr) -> Result<EngineLoad, String> {
    let usual = metrics_at(client, address, "/metrics").await;
    if usual.as_ref().is_ok_and(EngineLoad::is_known) {
        return usual;
    }
    let other = metrics_at(client, address, "/prometheus/metrics").await;
    if other.as_ref().is_ok_and(EngineLoad::is_known) { other } else { usual }
}

async fn metrics_at(client: &EngineClient, address: SocketAddr, path: &str) -> Result<EngineLoad, String> {
    let mut body = get(client, address, path).await?;
    let (mut reader, mut len) = (Reader::default(), 0_usize);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| error.to_string())?;
        if let Some(data) = frame.data_ref() {
            len = len.saturating_add(data.len());
            if len > MAX_METRICS_BYTES {
                return Err(format!("more than {MAX_METRICS_BYTES} bytes of metrics"));
            }
            reader.push(data);
        }
    }
    Ok(reader.finish())
}

async fn models_of(client: &EngineClient, address: SocketAddr) -> Result<Vec<String>, String> {
    let body = Limited::new(get(client, address, "/v1/models").await?, MAX_MODELS_BYTES);
    let bytes = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
    let models: Models = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    let mut ids: Vec<_> = models.data.into_iter().map(|model| model.id).collect();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() > MAX_MODELS || ids.iter().any(|id| id.is_empty() || id.len() > MAX_NAME_BYTES) {
        return Err("names that the list cannot hold".to_owned());
    }
    Ok(ids)
}

async fn get(client: &EngineClient, address: SocketAddr, path: &str) -> Result<hyper::body::Incoming, String> {
    let request =
        Request::get(format!("http://{address}{path}")).body(Empty::new()).map_err(|error| error.to_string())?;
    let response = client.request(request).await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        format!("{error}{cause}")
    })?;
    match response.status() {
        StatusCode::OK => Ok(response.into_body()),
        other => Err(format!("{path} answers {other}")),
    }
}
