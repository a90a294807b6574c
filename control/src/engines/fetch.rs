//! Fetches the metrics and the models of one engine over HTTP.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pd_core::wire::{MAX_CARD_BYTES, MAX_MODELS, ModelCard};
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;

use crate::engines::answers::{Outcome, Told};
use crate::engines::metrics::{EngineLoad, Reader};

/// Time limit of one question, and of connecting.
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

/// A card as engines send it. What they do not have, or have in another form, is left out.
#[derive(Deserialize)]
struct Model {
    id: String,
    #[serde(default)]
    max_model_len: Value,
    #[serde(default)]
    root: Value,
    #[serde(default)]
    parent: Value,
    #[serde(default)]
    owned_by: Value,
}

impl Model {
    /// The card; `None` for a name that the list cannot hold.
    fn card(self) -> Option<ModelCard> {
        let text = |value: Value| {
            value.as_str().filter(|text| !text.is_empty() && text.len() <= MAX_CARD_BYTES).map(str::to_owned)
        };
        let card = ModelCard {
            id: self.id,
            max_model_len: self.max_model_len.as_u64().filter(|len| *len > 0),
            root: text(self.root),
            parent: text(self.parent),
            owned_by: text(self.owned_by),
        };
        card.is_valid().then_some(card)
    }
}

/// A client without open connections.
#[must_use]
pub fn client() -> EngineClient {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(TIMEOUT));
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).pool_max_idle_per_host(1).build(connector)
}

/// Asks one engine for its metrics and its models.
pub async fn ask(client: EngineClient, address: SocketAddr) -> (SocketAddr, Outcome) {
    let limited = timeout(TIMEOUT, metrics_of(&client, address)).await;
    let outcome = match limited.unwrap_or_else(|_| Err(format!("no answer in {TIMEOUT:?}"))) {
        Err(reason) => Err(reason),
        // Without its models an engine is up all the same.
        Ok(load) => {
            let told = timeout(TIMEOUT, models_of(&client, address)).await;
            Ok((load, told.ok().and_then(Result::ok)))
        }
    };
    (address, outcome)
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

/// An engine may require an API key for its models, or have no such path. That is an answer, too.
async fn models_of(client: &EngineClient, address: SocketAddr) -> Result<Told, String> {
    let response = send(client, address, "/v1/models").await?;
    match response.status() {
        StatusCode::OK => {}
        refused if refused.is_client_error() => return Ok(Told::Nothing),
        other => return Err(format!("/v1/models answers {other}")),
    }
    let body = Limited::new(response.into_body(), MAX_MODELS_BYTES);
    let bytes = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
    let models: Models = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    let mut cards: Vec<_> = models.data.into_iter().filter_map(Model::card).collect();
    cards.sort_by(|one, other| one.id.cmp(&other.id));
    cards.dedup_by(|one, other| one.id == other.id);
    cards.truncate(MAX_MODELS);
    Ok(Told::Models(cards))
}

async fn get(client: &EngineClient, address: SocketAddr, path: &str) -> Result<Incoming, String> {
    let response = send(client, address, path).await?;
    match response.status() {
        StatusCode::OK => Ok(response.into_body()),
        other => Err(format!("{path} answers {other}")),
    }
}

async fn send(client: &EngineClient, address: SocketAddr, path: &str) -> Result<Response<Incoming>, String> {
    let request =
        Request::get(format!("http://{address}{path}")).body(Empty::new()).map_err(|error| error.to_string())?;
    client.request(request).await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        format!("{error}{cause}")
    })
}
