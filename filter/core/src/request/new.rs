//! A request whose headers come: they are classified, and freed of those that steer the filter.

use std::sync::Arc;

use super::effect::{Effect, Flow, REASON};
use super::head::{Claims, Phase, RequestHead, Subset, decoded_path, endpoint_ids, is_ours};
use super::models::{MODELS, list_models};
use super::ready::{READY_PATH, readiness};
use super::route::pass;
use super::state::{Reading, State};
use super::step::Step;
use crate::body::Api;
use crate::body::form::Encoding;
use crate::config::{Config, PHASE_HEADER, PREFILLER_HEADER};
use crate::headers::Headers;
use crate::metrics::Metric;
use crate::paths::engines_path;
use crate::request::reply::Rejection;
use crate::time::Monotonic;
use crate::workers::worker::Worker;

/// Path that lists models.
const MODELS_PATH: &[u8] = b"/v1/models";

/// What a request's headers ask for.
enum Class {
    /// Whether this Envoy may get requests.
    Readiness,
    /// The list of models.
    Models,
    /// An answer of any engine endpoint to a request that has no body.
    NoBody(Option<Subset>),
    /// What the body says.
    Body(RequestHead),
}

/// The request's headers are there.
pub(super) fn headers(worker: &mut Worker, headers: Headers, end_of_stream: bool, now: Monotonic) -> Step {
    let config = match &worker.config {
        Ok(config) => Arc::clone(config),
        Err(error) => {
            let rejection = Rejection::NotConfigured(error.to_string());
            return Step::reject(worker, rejection);
        }
    };
    let ours = headers.iter().map(|(name, _)| name).filter(|name| is_ours(name, &config));
    let mut removed: Vec<_> = ours.map(|name| Effect::RemoveHeader(name.to_vec())).collect();
    worker.counts.add(Metric::HeadersStripped, i64::try_from(removed.len()).unwrap_or(i64::MAX));
    let step = match classify(worker, &config, headers, end_of_stream) {
        Ok(Class::Readiness) => return Step::reply(Vec::new(), readiness(worker, &config)),
        Ok(Class::Models) => {
            worker.counts.count(Metric::RequestsPassed);
            let effects = vec![Effect::decision(Metric::RequestsPassed), Effect::SetState(REASON, MODELS.into())];
            Step::reply(effects, list_models(&worker.state.table, &config))
        }
        Ok(Class::NoBody(subset)) => Step::or_reject(pass(worker, &config, None, subset.as_ref(), now), worker),
        Ok(Class::Body(head)) => {
            if head.headers.get("content-length").is_some() {
                // The body may change; the buffer filter puts the right length back.
                removed.push(Effect::RemoveHeader(b"content-length".to_vec()));
            }
            removed.extend(head.api.and_then(|_| without_last_slash(&head.headers)).map(Effect::SetPath));
            Step::new(State::Reading(Box::new(Reading { head })), Flow::Continue, Vec::new())
        }
        Err(rejection) => Step::reject(worker, rejection),
    };
    step.after(removed)
}

/// The path and query without the slash at the end of the path, where one is there: engines answer such a path with a
/// redirect, which clients do not follow with a body.
fn without_last_slash(headers: &Headers) -> Option<Vec<u8>> {
    let path = headers.get(":path")?;
    let end = path.iter().position(|byte| *byte == b'?').unwrap_or(path.len());
    let (path, query) = path.split_at_checked(end)?;
    Some([path.strip_suffix(b"/")?, query].concat())
}

fn classify(worker: &Worker, config: &Arc<Config>, headers: Headers, end_of_stream: bool) -> Result<Class, Rejection> {
    let (method, path) = (headers.get(":method"), headers.get(":path").unwrap_or_default());
    if method == Some(b"GET") && path == READY_PATH {
        return Ok(Class::Readiness);
    }
    let path = decoded_path(path);
    let path = engines_path(&path, &config.path_prefixes);
    if !config.allows(path) {
        return Err(Rejection::UnknownPath);
    }
    if method == Some(b"GET") && worker.state.table.names_all_models() && path == MODELS_PATH {
        return Ok(Class::Models);
    }
    let api = Api::of_path(path).filter(|_| method == Some(b"POST"));
    let subset = Subset::read(&headers, config);
    if api.is_none() && end_of_stream {
        return Ok(Class::NoBody(subset));
    }
    let form = match Encoding::of(headers.get("content-type").unwrap_or_default()) {
        _ if api.is_some() => None,
        encoding => encoding.map_err(Rejection::InvalidForm)?,
    };
    let phase = match headers.get(PHASE_HEADER).filter(|_| config.trusts(PHASE_HEADER)) {
        None => None,
        Some(b"prefill") => Some(Phase::Prefill),
        Some(b"decode") => Some(Phase::Decode),
        Some(_) => return Err(Rejection::InvalidPhase),
    };
    if api.is_some() && end_of_stream {
        return Err(Rejection::InvalidJson("invalid JSON: the request has no body".to_owned()));
    }
    if headers.get("content-encoding").is_some_and(|value| value != b"identity") {
        return Err(Rejection::ContentEncoding);
    }
    let declared =
        headers.get("content-length").and_then(|bytes| core::str::from_utf8(bytes).ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > config.max_body_bytes as u64) {
        return Err(Rejection::TooLarge(config.max_body_bytes));
    }
    let prefiller = headers.get(PREFILLER_HEADER).filter(|_| config.trusts(PREFILLER_HEADER)).map(endpoint_ids);
    let claims = Claims::read(&headers, config);
    Ok(Class::Body(RequestHead { config: Arc::clone(config), headers, api, form, phase, prefiller, claims, subset }))
}
