//! The state New: the filter classifies the headers, and strips those that steer the filter.

use core::ops::Range;
use std::borrow::Cow;
use std::sync::Arc;

use super::effect::{Effect, Flow, REASON};
use super::head::{Claims, Phase, RequestHead, Subset, decoded_path, endpoint_ids, is_ours};
use super::models::{MODELS, Question, Served, serving_model, tell_models};
use super::ready::{READY_PATH, readiness};
use super::route::{Restriction, pass};
use super::state::{Reading, State};
use super::step::Step;
use super::stored::id_of_path;
use crate::body::form::Encoding;
use crate::body::{Api, decode_percent};
use crate::config::{Config, PHASE_HEADER, PREFILLER_HEADER};
use crate::headers::Headers;
use crate::metrics::Metric;
use crate::paths::{engines_path, is_inference};
use crate::request::reply::{Rejection, Reply};
use crate::time::Monotonic;
use crate::workers::worker::Worker;

/// What a request's headers ask for.
enum Class {
    /// Whether this Envoy may get requests.
    Readiness,
    /// A list of models, or the card of one.
    Models(Reply),
    /// An answer of any engine endpoint to a request that has no body.
    NoBody {
        /// Endpoints that a trusted header names.
        subset: Option<Subset>,
        /// Id of the response that the path names.
        response: Option<String>,
        /// Whether it only reads.
        reads: bool,
    },
    /// Another protocol, with an endpoint of the model that the query or a header names.
    Upgrade(RequestHead),
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
    let without_slash = without_last_slash(&headers, &config).map(Effect::SetPath);
    let for_engines = headers_for_engines(&config, &headers);
    let step = match classify(worker, &config, headers, end_of_stream) {
        Ok(Class::Readiness) => return Step::reply(Vec::new(), readiness(worker, &config)),
        Ok(Class::Models(reply)) => {
            worker.counts.count(Metric::RequestsPassed);
            let effects = vec![Effect::decision(Metric::RequestsPassed), Effect::SetState(REASON, MODELS.into())];
            Step::reply(effects, reply)
        }
        Ok(Class::Upgrade(head)) => Step::or_reject(upgrade(worker, &head, now), worker),
        Ok(Class::NoBody { subset, response, reads }) => {
            let restriction = Restriction { subset: subset.as_ref(), response: response.as_deref() };
            removed.extend(without_slash);
            if reads {
                removed.extend(Effect::may_repeat());
            }
            Step::or_reject(pass(worker, &config, None, restriction, now), worker)
        }
        Ok(Class::Body(head)) => {
            if head.headers.get("content-length").is_some() {
                // The body may change; the buffer filter puts the right length back.
                removed.push(Effect::RemoveHeader(b"content-length".to_vec()));
            }
            removed.extend(without_slash);
            Step::new(State::Reading(Box::new(Reading { head })), Flow::Continue, Vec::new())
        }
        Err(rejection) => Step::reject(worker, rejection),
    };
    step.after(removed.into_iter().chain(for_engines))
}

/// Headers that the configuration gives to all legs, on the client's own request.
fn headers_for_engines(config: &Config, headers: &Headers) -> Vec<Effect> {
    let mut effects = Vec::new();
    for header in config.legs.headers.iter().filter(|header| header.is_for_all) {
        // Several values under one name are one list.
        match header.values(headers).join(&b", "[..]) {
            value if value.is_empty() && headers.get(&header.name).is_none() => {}
            value if value.is_empty() => effects.push(Effect::RemoveHeader(header.name.clone().into_bytes())),
            value => effects.push(Effect::SetHeader(header.name.clone(), value)),
        }
    }
    effects
}

/// The path and query of an inference API without a slash at the end of the path; `None` where the path has none.
/// Engines redirect a path with such a slash, and clients do not follow the redirect with a body.
fn without_last_slash(headers: &Headers, config: &Config) -> Option<Vec<u8>> {
    let path = headers.get(":path")?;
    let end = path.iter().position(|byte| *byte == b'?').unwrap_or(path.len());
    let (path, query) = path.split_at_checked(end)?;
    let without = path.strip_suffix(b"/")?;
    let is_known = is_inference(engines_path(&decoded_path(path), &config.path_prefixes));
    is_known.then(|| [without, query].concat())
}

/// Sends a request for another protocol to an endpoint.
fn upgrade(worker: &mut Worker, head: &RequestHead, now: Monotonic) -> Result<Step, Rejection> {
    let path = head.headers.get(":path").unwrap_or_default();
    let named = query_model(path);
    let model = head.model(named.as_ref().map(|(_, name)| Cow::Borrowed(name.as_str())));
    let served = model.map(|model| serving_model(worker, head, &model, now)).transpose()?;
    let step =
        pass(worker, &head.config, served.as_ref(), Restriction { subset: head.subset.as_ref(), response: None }, now)?;
    let other = |(range, served): (Range<usize>, &Served)| {
        let (before, behind) = (path.get(..range.start)?, path.get(range.end..)?);
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
        let encode = |byte: u8| if is_plain(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
        let name: String = served.model.bytes().map(encode).collect();
        Some([before, name.as_bytes(), behind].concat())
    };
    let rewritten = named.map(|(range, _)| range).zip(served.as_ref().filter(|served| served.rewrite.is_some()));
    Ok(step.after(rewritten.and_then(other).map(Effect::SetPath)))
}

/// The model in a path's query, and the range of its bytes in the path.
fn query_model(path: &[u8]) -> Option<(Range<usize>, String)> {
    let mut start = path.iter().position(|byte| *byte == b'?')?.checked_add(1)?;
    for pair in path.get(start..)?.split(|byte| *byte == b'&') {
        let end = start.checked_add(pair.len())?;
        if let Some(value) = pair.strip_prefix(b"model=").filter(|value| !value.is_empty()) {
            let spaced: Vec<u8> = value.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
            let name = String::from_utf8(decode_percent(&spaced)).ok()?;
            return Some((end.checked_sub(value.len())?..end, name));
        }
        start = end.checked_add(1)?;
    }
    None
}

/// Whether the body stands as it is. SGLang has a header of its own for a compressed one.
fn is_plain(headers: &Headers) -> bool {
    if headers.get("x-body-compressed").is_some() {
        return false;
    }
    let values = headers.iter().filter(|(name, _)| *name == b"content-encoding").map(|(_, value)| value);
    let mut codings = values.flat_map(|value| value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
    codings.all(|coding| coding.is_empty() || coding.eq_ignore_ascii_case(b"identity"))
}

fn classify(worker: &Worker, config: &Arc<Config>, headers: Headers, end_of_stream: bool) -> Result<Class, Rejection> {
    let (method, path) = (headers.get(":method"), headers.get(":path").unwrap_or_default());
    let reads = matches!(method, Some(b"GET" | b"HEAD"));
    if reads && path == READY_PATH {
        return Ok(Class::Readiness);
    }
    let path = decoded_path(path);
    let path = engines_path(&path, &config.path_prefixes);
    if !config.allows(path) {
        return Err(Rejection::UnknownPath);
    }
    if reads
        && worker.state.table.names_all_models()
        && let Some(question) = Question::of_path(path)
    {
        return tell_models(&worker.state.table, config, &question).map(Class::Models);
    }
    let subset = Subset::read(&headers, config);
    if headers.get("upgrade").is_some() {
        // The body of such a request has no end, so it is not read. A method that may have a body would carry one past the
        // filter, to a server that does not upgrade.
        if !config.upgrades || method != Some(b"GET") {
            return Err(Rejection::Upgrade);
        }
        let claims = Claims::read(&headers, config, worker.state.table.stated());
        let config = Arc::clone(config);
        let head = RequestHead { config, headers, api: None, form: None, phase: None, prefiller: None, claims, subset };
        return Ok(Class::Upgrade(head));
    }
    let api = Api::of_path(path).filter(|_| method == Some(b"POST"));
    if api.is_none() && end_of_stream {
        return Ok(Class::NoBody { subset, response: id_of_path(&headers, config), reads });
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
    if !is_plain(&headers) {
        return Err(Rejection::ContentEncoding);
    }
    let declared =
        headers.get("content-length").and_then(|bytes| core::str::from_utf8(bytes).ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > config.max_body_bytes as u64) {
        return Err(Rejection::TooLarge(config.max_body_bytes));
    }
    let prefiller = headers.get(PREFILLER_HEADER).filter(|_| config.trusts(PREFILLER_HEADER)).map(endpoint_ids);
    let claims = Claims::read(&headers, config, worker.state.table.stated());
    Ok(Class::Body(RequestHead { config: Arc::clone(config), headers, api, form, phase, prefiller, claims, subset }))
}
