//! Responses that an engine keeps: a request that names one goes to the endpoint that has it.
//!
//! `/v1/responses` lets a request go on from an earlier response (`previous_response_id`), and a client ask for it again or
//! cancel it (`/v1/responses/{id}`). An engine keeps responses in its own memory, so no other endpoint knows them.

use super::head::decoded_path;
use crate::body::json;
use crate::body::{Api, Key, Scan};
use crate::config::Config;
use crate::headers::Headers;
use crate::paths::engines_path;
use crate::prefix::hash::response_hash;
use crate::prefix::index::EndpointIndex;
use crate::request::reply::Rejection;
use crate::workers::worker::Worker;

/// What stands below `/v1/responses/` in the place of an id.
const NO_IDS: [&[u8]; 2] = [b"compact", b"input_tokens"];

/// The response that a path names: `/v1/responses/{id}`, and what lies below it.
pub(super) fn id_of_path(headers: &Headers, config: &Config) -> Option<String> {
    let path = decoded_path(headers.get(":path")?);
    let below = engines_path(&path, &config.path_prefixes).strip_prefix(b"/v1/responses/")?;
    let id = below.split(|byte| *byte == b'/').next().filter(|id| !id.is_empty() && !NO_IDS.contains(id))?;
    Some(String::from_utf8_lossy(id).into_owned())
}

/// Id of the response that a body continues; `None` if the body names none by a string.
pub(super) fn previous_id(api: Api, scan: &Scan, body: &[u8]) -> Option<String> {
    let previous = scan.raw(body, Key::PreviousResponseId).filter(|_| api == Api::Responses)?;
    Some(json::string(previous)?.into_owned())
}

/// Whether the engine may keep the response to a request.
pub(super) fn is_kept(api: Api, scan: &Scan, body: &[u8]) -> bool {
    api == Api::Responses && scan.bool(body, Key::Store) != Some(false)
}

/// The endpoint that keeps a response. If it is not known or has left the list: the endpoint in `among`, if there is
/// one alone.
///
/// # Errors
/// [`Rejection::UnknownResponse`] where the endpoint is not known and `among` has none or several.
pub(super) fn keeper(worker: &Worker, id: &str, among: &[EndpointIndex]) -> Result<EndpointIndex, Rejection> {
    let known = worker.state.keeper_of(response_hash(id));
    let only = if let [only] = among { Some(*only) } else { None };
    known.or(only).ok_or_else(|| Rejection::UnknownResponse(id.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_responses() {
        let config = Config::parse(br#"{"path_prefixes":["/team"]}"#).unwrap();
        for (path, expected) in [
            ("/v1/responses/resp_1", Some("resp_1")),
            ("/v1/responses/resp_1?stream=true", Some("resp_1")),
            ("/v1/responses/resp%5F1/cancel", Some("resp_1")),
            ("/team/v1/responses/resp_1/input_items/", Some("resp_1")),
            ("/v1/responses", None),
            ("/v1/responses/", None),
            ("/v1/responses//cancel", None),
            ("/v1/responses/input_tokens", None),
            ("/v1/chat/completions/x", None),
        ] {
            let headers = Headers::from_pairs([(":path", path)]);
            assert_eq!(id_of_path(&headers, &config).as_deref(), expected, "{path}");
        }
    }
}
