//! What a request's headers say.

use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use std::borrow::Cow;
use std::sync::Arc;

use crate::body::form::Encoding;
use crate::body::{Api, decode_percent};
use crate::config::{Config, PREFILLER_HEADER, SUBSET_HEADER, TEST_SELECTION_HEADER};
use crate::endpoints::candidates::{Candidates, NoCandidates};
use crate::endpoints::endpoint_state::EndpointState;
use crate::endpoints::table::Table;
use crate::headers::Headers;
use crate::paths::{engines_path, is_inference};
use crate::wire::{EndpointId, Stated};

/// What a request's headers say.
#[derive(Clone, Debug)]
pub(crate) struct RequestHead {
    pub(crate) config: Arc<Config>,
    pub(crate) headers: Headers,
    /// The API that the path names; `None` for a request without a prompt.
    pub(crate) api: Option<Api>,
    /// How the body is written if it is a form and its path is not one of an [`Api`].
    pub(crate) form: Option<Encoding>,
    pub(crate) phase: Option<Phase>,
    /// Prefill endpoint that a trusted header names.
    pub(crate) prefiller: Option<Vec<EndpointId>>,
    pub(crate) claims: Claims,
    pub(crate) subset: Option<Subset>,
}

impl RequestHead {
    /// The model that the body names, or else a header.
    pub(crate) fn model<'a>(&self, named: Option<Cow<'a, str>>) -> Option<Cow<'a, str>> {
        let of_header = || {
            let name = self.headers.get("x-ai-eg-model").or_else(|| self.headers.get("x-gateway-model-name"))?;
            Some(Cow::Owned(core::str::from_utf8(name).ok()?.to_owned()))
        };
        named.or_else(of_header)
    }

    /// The client's name for its session: of the first configured header that has one, else of the first configured cookie;
    /// `None` where none of them has one.
    pub(crate) fn session(&self) -> Option<&[u8]> {
        let mut headers = self.config.session_headers.iter().filter_map(|name| self.headers.get(name));
        let of_cookie = || self.config.session_cookies.iter().find_map(|name| cookie(&self.headers, name));
        headers.find(|value| !value.trim_ascii().is_empty()).or_else(of_cookie)
    }

    /// Whether the request is one for an inference API, which computes something and changes nothing.
    pub(crate) fn computes(&self) -> bool {
        let path = decoded_path(self.headers.get(":path").unwrap_or_default());
        let is_known = is_inference(engines_path(&path, &self.config.path_prefixes));
        is_known && self.headers.get(":method") == Some(b"POST")
    }

    /// Envoy's id of the request; empty if there is none.
    pub(crate) fn request_id(&self) -> &[u8] {
        self.headers.get("x-request-id").unwrap_or_default()
    }
}

/// Value of the first cookie of this name that has one (RFC 6265, section 5.4). HTTP/2 may split cookies into several
/// headers.
fn cookie<'a>(headers: &'a Headers, name: &str) -> Option<&'a [u8]> {
    let lines = headers.iter().filter(|(header, _)| *header == b"cookie").map(|(_, value)| value);
    let pairs = lines.flat_map(|line| line.split(|byte| *byte == b';')).map(<[u8]>::trim_ascii);
    let values = pairs.filter_map(|pair| pair.strip_prefix(name.as_bytes())?.strip_prefix(b"="));
    let unquoted =
        |value: &'a [u8]| value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")).unwrap_or(value);
    values.map(|value| unquoted(value.trim_ascii())).find(|value| !value.is_empty())
}

/// Endpoints to which a trusted header restricts a request: `ip:port`, or an IP address with all its ports.
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

    pub(crate) fn allows(&self, state: &EndpointState) -> bool {
        let address = state.endpoint.address;
        self.0.iter().any(|(ip, port)| *ip == address.ip() && port.is_none_or(|port| port == address.port()))
    }
}

/// Endpoints to choose from for a model, within a subset if there is one.
pub(crate) fn candidates(table: &Table, model: &str, subset: Option<&Subset>) -> Result<Arc<Candidates>, NoCandidates> {
    let all = table.candidates(model)?;
    let Some(subset) = subset else { return Ok(all) };
    let some = within(table, &all, subset);
    if some.is_empty() { Err(NoCandidates::NoEndpoint) } else { Ok(some) }
}

/// Those of the candidates that a subset allows; the sets may be empty.
pub(crate) fn within(table: &Table, all: &Candidates, subset: &Subset) -> Arc<Candidates> {
    let mut some = all.clone();
    some.retain(|index| table.get(index).is_some_and(|state| subset.allows(state)), |index| table.get(index));
    Arc::new(some)
}

/// What a client claims for admission.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Claims {
    /// Below 0: sheddable.
    pub(crate) priority: i64,
    /// Hash of the fairness id; 0 where the request has none.
    pub(crate) fairness: u64,
    /// Time within which the prompt must be computed; `None` without a limit.
    pub(crate) deadline: Option<Duration>,
}

impl Claims {
    pub(crate) fn read(headers: &Headers, config: &Config, stated: &Stated) -> Self {
        let either = |name: &str, old: &str| headers.get(name).or_else(|| headers.get(old));
        let text = |value| core::str::from_utf8(value).ok();
        let objective = either("x-llm-d-inference-objective", "x-gateway-inference-objective").and_then(text);
        let fairness = either("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id");
        let deadline = headers.get(DEADLINE_HEADER).and_then(text).and_then(|ms| ms.parse().ok());
        Self {
            priority: objective.map_or(0, |objective| config.priority(objective, stated)),
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
    b"x-gateway-destination-endpoint-scores",
    b"x-gateway-destination-endpoint-subset",
    b"test-epp-endpoint-selection",
    b"x-data-parallel-rank",
    b"x-data-parallel-host-port",
    b"x-encoder-hosts-ports",
    b"x-kv-cache-source-host-port",
    b"target-pod",
    b"prefill-target-pod",
];

/// Beginnings of the names of such headers, behind `x-`: our own; SGLang's, which put other hand-over parameters into a request
/// (`SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES`); TensorRT-LLM's between its orchestrator and its workers; Envoy's, by which a
/// client that Envoy takes for an internal one would have KV parameters sent twice.
const OUR_PREFIXES: &[&[u8]] =
    &[b"pd-", b"override-", b"trtllm-", b"envoy-retr", b"envoy-max-retries", b"envoy-hedge-"];

pub(crate) fn is_ours(name: &[u8], config: &Config) -> bool {
    let is_prefixed = |rest: &[u8]| OUR_PREFIXES.iter().any(|prefix| rest.starts_with(prefix));
    name.strip_prefix(b"x-").is_some_and(is_prefixed)
        || OURS.contains(&name)
        || name == config.destination_header.as_bytes()
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
    fn a_cookie_is_found_among_others() {
        for (lines, expected) in [
            (&["sid=a"][..], Some("a")),
            (&["x=1; sid=a=b ;y=2"], Some("a=b")),
            (&["x=1;y=2", "sid=\"a\""], Some("a")),
            (&["sid=; sid=b"], Some("b")),
            (&["xsid=a; sid2=b; SID=c"], None),
            (&["sid", "", ";;=;"], None),
        ] {
            let headers = Headers::from_pairs(lines.iter().map(|line| ("cookie", *line)));
            assert_eq!(cookie(&headers, "sid"), expected.map(str::as_bytes), "{lines:?}");
        }
        let bytes = Headers::from_pairs([(b"cookie".as_slice(), b"\xff; sid=\xfe".as_slice())]);
        assert_eq!(cookie(&bytes, "sid"), Some(b"\xfe".as_slice()));
    }

    #[test]
    fn a_hint_is_read_leniently() {
        let ids = endpoint_ids(b" 10.0.0.1:8000, nonsense,[::1]:80,");
        assert_eq!(ids.iter().map(EndpointId::to_string).collect::<Vec<_>>(), ["10.0.0.1:8000", "[::1]:80"]);
        assert!(endpoint_ids(b"\xff").is_empty());
    }
}
