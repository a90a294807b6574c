//! What a request's headers say, and which of its headers go on.

use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use std::borrow::Cow;
use std::sync::Arc;

use crate::body::form::Encoding;
use crate::body::{Api, decode_percent};
use crate::config::{Config, PREFILLER_HEADER, SUBSET_HEADER, TEST_SELECTION_HEADER};
use crate::endpoints::candidates::{Candidates, NoCandidates};
use crate::endpoints::endpoint_state::Slot;
use crate::endpoints::table::Table;
use crate::headers::Headers;
use crate::wire::EndpointId;

/// What the headers said.
#[derive(Debug)]
pub(crate) struct RequestHead {
    pub(crate) config: Arc<Config>,
    pub(crate) headers: Headers,
    /// `None`: a path whose body is only freed of what no client may send.
    pub(crate) api: Option<Api>,
    /// How the body is written if it is a form and its path is not one of an [`Api`].
    pub(crate) form: Option<Encoding>,
    pub(crate) phase: Option<Phase>,
    /// Prefill endpoint that a trusted peer names.
    pub(crate) prefiller: Option<Vec<EndpointId>>,
    pub(crate) claims: Claims,
    pub(crate) subset: Option<Subset>,
}

impl RequestHead {
    /// Envoy's id of the request; empty if there is none.
    pub(crate) fn request_id(&self) -> &[u8] {
        self.headers.get("x-request-id").unwrap_or_default()
    }
}

/// Endpoints to which a trusted peer restricts a request: addresses, or all ports of one.
#[derive(Clone, Debug)]
pub(crate) struct Subset(Vec<(IpAddr, Option<u16>)>);

impl Subset {
    pub(crate) fn read(headers: &Headers, config: &Config) -> Option<Self> {
        let trusted = [TEST_SELECTION_HEADER, SUBSET_HEADER].into_iter().filter(|header| config.trusts(header));
        let value = trusted.into_iter().find_map(|header| headers.get(header))?;
        let read = |name: &str| match name.parse::<SocketAddr>() {
            Ok(address) => Some((address.ip(), Some(address.port()))),
            Err(_) => Some((name.parse().ok()?, None)),
        };
        let text = core::str::from_utf8(value).unwrap_or_default();
        Some(Self(text.split(',').filter_map(|name| read(name.trim())).collect()))
    }

    pub(crate) fn allows(&self, slot: &Slot) -> bool {
        let address = slot.endpoint.address;
        self.0.iter().any(|(ip, port)| *ip == address.ip() && port.is_none_or(|port| port == address.port()))
    }
}

/// Endpoints to choose from for a model, within a subset if there is one.
pub(crate) fn candidates(table: &Table, model: &str, subset: Option<&Subset>) -> Result<Arc<Candidates>, NoCandidates> {
    let all = table.candidates(model)?;
    let Some(subset) = subset else { return Ok(all) };
    let mut some = Candidates::clone(&all);
    some.retain(|index| table.get(index).is_some_and(|slot| subset.allows(slot)));
    if some.is_empty() { Err(NoCandidates::NoEndpoint) } else { Ok(Arc::new(some)) }
}

/// What a client says of its request's standing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Claims {
    /// Below 0: sheddable.
    pub(crate) priority: i64,
    /// Whose request it is: a hash, equal for all who say nothing.
    pub(crate) fairness: u64,
    /// Time within which the prompt must be computed.
    pub(crate) deadline: Option<Duration>,
}

impl Claims {
    pub(crate) fn read(headers: &Headers, config: &Config) -> Self {
        let either = |name: &str, old: &str| headers.get(name).or_else(|| headers.get(old));
        let text = |value| core::str::from_utf8(value).ok();
        let objective = either("x-llm-d-inference-objective", "x-gateway-inference-objective").and_then(text);
        let fairness = either("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id");
        let deadline = headers.get(DEADLINE_HEADER).and_then(text).and_then(|ms| ms.parse().ok());
        Self {
            priority: objective.map_or(0, |objective| config.priority(objective)),
            fairness: fairness.map_or(0, xxhash_rust::xxh3::xxh3_64),
            deadline: deadline.map(Duration::from_millis),
        }
    }
}

/// Header by which a client says within how many milliseconds its prompt must be computed.
pub(crate) const DEADLINE_HEADER: &str = "x-pd-deadline-ms";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Prefill,
    Decode,
}

/// Headers that name an endpoint or steer this filter. None of them reaches an engine, whoever set it.
const OURS: &[&[u8]] = &[
    PREFILLER_HEADER.as_bytes(),
    b"x-gateway-destination-endpoint",
    b"x-gateway-destination-endpoint-served",
    b"x-gateway-destination-endpoint-subset",
    b"test-epp-endpoint-selection",
    b"x-data-parallel-rank",
    b"x-data-parallel-host-port",
    b"x-encoder-hosts-ports",
    b"x-kv-cache-source-host-port",
    b"target-pod",
    b"prefill-target-pod",
];

pub(crate) fn is_ours(name: &[u8], config: &Config) -> bool {
    name.starts_with(b"x-pd-") || OURS.contains(&name) || name == config.destination_header.as_bytes()
}

/// The path as a server understands it: percent-encoding undone, so that no spelling of a path gets past the scan.
pub(crate) fn decoded_path(path: &[u8]) -> Cow<'_, [u8]> {
    let path = path.split(|byte| *byte == b'?').next().unwrap_or_default();
    if !path.contains(&b'%') {
        return Cow::Borrowed(path);
    }
    Cow::Owned(decode_percent(path))
}

pub(crate) fn endpoint_ids(value: &[u8]) -> Vec<EndpointId> {
    let text = core::str::from_utf8(value).unwrap_or_default();
    text.split(',').filter_map(|id| id.trim().parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encoding_hides_no_path() {
        for path in ["/v1/chat/completions?a=%zz", "/v1/chat/complet%69ons", "/%76%31/chat%2fcompletions?x"] {
            assert_eq!(Api::of_path(&decoded_path(path.as_bytes())), Some(Api::Chat), "{path}");
        }
        assert_eq!(decoded_path(b"/a%").as_ref(), b"/a%");
        assert_eq!(decoded_path(b"/a%4").as_ref(), b"/a%4");
        assert_eq!(decoded_path(b"/a%zz%41").as_ref(), b"/a%zzA");
        assert_eq!(decoded_path(b"?").as_ref(), b"");
    }

    #[test]
    fn a_hint_is_read_leniently() {
        let ids = endpoint_ids(b" 10.0.0.1:8000, nonsense,[::1]:80,");
        assert_eq!(ids.iter().map(EndpointId::to_string).collect::<Vec<_>>(), ["10.0.0.1:8000", "[::1]:80"]);
        assert!(endpoint_ids(b"\xff").is_empty());
    }
}
