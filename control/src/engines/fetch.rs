//! Fetches the metrics and the models of one engine over HTTP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::header::AUTHORIZATION;
use hyper::{Request, Response, StatusCode};
use pd_core::wire::{MAX_CARD_BYTES, MAX_MODELS, ModelCard};
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;

use crate::engines::access::Reach;
use crate::engines::answers::{Answer, ModelsAnswer, Outcome};
use crate::engines::metrics::{EngineLoad, Reader};

/// Time limit of one question, connecting included.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of metrics that pd-control reads; vLLM sends a hundred thousand.
const MAX_METRICS_BYTES: usize = 8 << 20;
/// Bytes of a list of models that pd-control reads.
const MAX_MODELS_BYTES: usize = 1 << 20;

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

/// A card as engines send it. Fields that are missing or have another form are left out.
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

/// Why a question was not answered.
enum Fault {
    /// The engine wants other credentials. It works.
    Refused(String),
    /// Any other fault.
    Failed(String),
}

/// Asks one engine for its metrics and its models.
pub(super) async fn ask(reach: Arc<Reach>, address: SocketAddr) -> (SocketAddr, Outcome) {
    let limited = timeout(TIMEOUT, metrics_of(&reach, address)).await;
    let metrics = limited.unwrap_or_else(|_| Err(Fault::Failed(format!("no answer in {TIMEOUT:?}"))));
    let mut answer = Answer::default();
    match metrics {
        Err(Fault::Failed(reason)) => return (address, Err(reason)),
        Err(Fault::Refused(what)) => answer.refusal = Some(what),
        Ok(load) => answer.load = Some(load),
    }
    // An engine that does not list its models is up.
    match timeout(TIMEOUT, models_of(&reach, address)).await {
        Ok(Ok(models)) => answer.models = Some(models),
        Ok(Err(Fault::Refused(what))) => {
            answer.models = Some(ModelsAnswer::Unlisted);
            answer.refusal.get_or_insert(what);
        }
        Ok(Err(Fault::Failed(_))) | Err(_) => {}
    }
    (address, Ok(answer))
}

/// TensorRT-LLM serves its metrics at a path of its own; at `/metrics` it serves other data.
async fn metrics_of(reach: &Reach, address: SocketAddr) -> Result<EngineLoad, Fault> {
    let usual = metrics_at(reach, address, "/metrics").await;
    if usual.as_ref().is_ok_and(EngineLoad::is_known) {
        return usual;
    }
    let other = metrics_at(reach, address, "/prometheus/metrics").await;
    if other.as_ref().is_ok_and(EngineLoad::is_known) { other } else { usual }
}

async fn metrics_at(reach: &Reach, address: SocketAddr, path: &str) -> Result<EngineLoad, Fault> {
    let response = send(reach, address, path).await?;
    let mut body = match response.status() {
        StatusCode::OK => response.into_body(),
        other => return Err(Fault::Failed(format!("{path} answers {other}"))),
    };
    let (mut reader, mut len) = (Reader::default(), 0_usize);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(failed)?;
        if let Some(data) = frame.data_ref() {
            len = len.saturating_add(data.len());
            if len > MAX_METRICS_BYTES {
                return Err(Fault::Failed(format!("more than {MAX_METRICS_BYTES} bytes of metrics")));
            }
            reader.push(data);
        }
    }
    Ok(reader.finish())
}

/// An engine may have no such path. That is an answer, too.
async fn models_of(reach: &Reach, address: SocketAddr) -> Result<ModelsAnswer, Fault> {
    let response = send(reach, address, "/v1/models").await?;
    match response.status() {
        StatusCode::OK => {}
        other if other.is_client_error() => return Ok(ModelsAnswer::Unlisted),
        other => return Err(Fault::Failed(format!("/v1/models answers {other}"))),
    }
    let body = Limited::new(response.into_body(), MAX_MODELS_BYTES);
    let bytes = body.collect().await.map_err(failed)?.to_bytes();
    let models: Models = serde_json::from_slice(&bytes).map_err(failed)?;
    let mut cards: Vec<_> = models.data.into_iter().filter_map(Model::card).collect();
    cards.sort_by(|one, other| one.id.cmp(&other.id));
    cards.dedup_by(|one, other| one.id == other.id);
    cards.truncate(MAX_MODELS);
    Ok(ModelsAnswer::Listed(cards))
}

/// An answer of any status but 401 and 403.
async fn send(reach: &Reach, address: SocketAddr, path: &str) -> Result<Response<Incoming>, Fault> {
    let mut request = Request::get(format!("{}://{address}{path}", reach.scheme));
    if let Some(authorization) = reach.authorization() {
        request = request.header(AUTHORIZATION, authorization);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(failed)?;
    let response = reach.client.request(request).await.map_err(|error| {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        Fault::Failed(text)
    })?;
    match response.status() {
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            Err(Fault::Refused(format!("{path} answers {status}: {}", reach.remedy())))
        }
        _ => Ok(response),
    }
}

fn failed(error: impl std::fmt::Display) -> Fault {
    Fault::Failed(error.to_string())
}
