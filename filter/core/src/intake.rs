//! What a request's headers and body say, and which of its headers go on.

use std::borrow::Cow;
use std::sync::Arc;

use crate::body::{Api, Key, Scan};
use crate::config::{Config, PREFILLER_HEADER, Pool};
use crate::engine;
use crate::hash::{prompt_hash, session_hash};
use crate::headers::Headers;
use crate::metrics::Metric;
use crate::reply::Rejection;
use crate::schedule::Prompt;
use crate::splice::HeadPlan;
use crate::table::{Candidates, NoCandidates};
use crate::wire::EndpointId;
use crate::worker::Worker;

/// Output tokens that a request is expected to add to its KV cache, unless it allows fewer. The traces' mean is 149 to 343.
const EXPECTED_OUTPUT_TOKENS: u64 = 256;

/// What the headers said.
#[derive(Debug)]
pub(crate) struct Intake {
    pub(crate) config: Arc<Config>,
    pub(crate) headers: Headers,
    /// `None`: a path whose body is only freed of what no client may send.
    pub(crate) api: Option<Api>,
    pub(crate) phase: Option<Phase>,
    /// Prefill endpoint that a trusted peer names.
    pub(crate) prefiller: Option<Vec<EndpointId>>,
}

impl Intake {
    /// Whether an engine could read an object, and hand-over parameters in it, where our scan finds none. Python's parser
    /// takes UTF-16 and UTF-32, byte order marks, `NaN`, halves of surrogate pairs and any depth.
    pub(crate) fn may_be_object(&self, body: &[u8]) -> bool {
        let content_type = self.headers.get("content-type").unwrap_or_default();
        let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        let is_json = essence.is_empty() || essence.to_ascii_lowercase().ends_with(b"json");
        let first = body.trim_ascii_start().first();
        is_json && !matches!(first, None | Some(b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n'))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Prefill,
    Decode,
}

/// What the body said, and who may serve it.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) config: Arc<Config>,
    pub(crate) headers: Headers,
    pub(crate) api: Api,
    pub(crate) model: String,
    pub(crate) candidates: Arc<Candidates>,
    pub(crate) prompt: Prompt,
    pub(crate) output_tokens: u64,
    pub(crate) body_bytes: usize,
    /// How the body becomes an engine's, when it is known what to put in front.
    pub(crate) plan: HeadPlan,
}

impl Work {
    pub(crate) fn pool(&self) -> &Pool {
        self.config.pool(&self.candidates.pool)
    }
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
    b"target-pod",
    b"prefill-target-pod",
];

pub(crate) fn is_ours(name: &[u8], config: &Config) -> bool {
    name.starts_with(b"x-pd-") || OURS.contains(&name) || name == config.destination_header.as_bytes()
}

/// Headers of the client's request that do not belong on another one, beside pseudo-headers.
const NOT_FORWARDED: &[&[u8]] = &[
    b"accept-encoding", // the answer must be readable
    b"connection",
    b"content-length",
    b"expect",
    b"keep-alive",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
];

/// Headers of the prefill leg: the client's, and the destination.
pub(crate) fn leg_headers(headers: &Headers, config: &Config, destination: &[u8]) -> Headers {
    const PSEUDO: &[&[u8]] = &[b":method", b":path", b":authority", b":scheme"];
    let forwarded = |name: &[u8]| {
        PSEUDO.contains(&name)
            || !(name.starts_with(b":")
                || name.starts_with(b"x-envoy-")
                || NOT_FORWARDED.contains(&name)
                || is_ours(name, config))
    };
    let own = (config.destination_header.as_bytes(), destination);
    Headers::from_pairs(headers.iter().filter(|(name, _)| forwarded(name)).chain([own]))
}

/// The path as a server understands it: percent-encoding undone, so that no spelling of a path gets past the scan.
pub(crate) fn decoded_path(path: &[u8]) -> Cow<'_, [u8]> {
    let path = path.split(|byte| *byte == b'?').next().unwrap_or_default();
    if !path.contains(&b'%') {
        return Cow::Borrowed(path);
    }
    let mut decoded = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|two| u8::from_str_radix(core::str::from_utf8(two).ok()?, 16).ok());
        let (byte, next) = match (first, hex, tail.get(2..)) {
            (b'%', Some(byte), Some(next)) => (byte, next),
            _ => (*first, tail),
        };
        decoded.push(byte);
        rest = next;
    }
    Cow::Owned(decoded)
}

pub(crate) fn endpoint_ids(value: &[u8]) -> Vec<EndpointId> {
    let text = core::str::from_utf8(value).unwrap_or_default();
    text.split(',').filter_map(|id| id.trim().parse().ok()).collect()
}

pub(crate) fn read_body(
    worker: &mut Worker,
    config: Arc<Config>,
    headers: Headers,
    api: Api,
    body: &[u8],
    scan: &Scan,
) -> Result<Work, Rejection> {
    let model = scan.str(body, Key::Model).ok_or(Rejection::MissingModel)?;
    let candidates = worker.table.candidates(&model).map_err(|none| match none {
        NoCandidates::NoEndpoint => Rejection::NoEndpoint,
        NoCandidates::UnknownModel => Rejection::UnknownModel {
            model: model.clone().into_owned(),
            known: worker.table.model_names().into_iter().map(str::to_owned).collect(),
        },
    })?;
    let pool = config.pool(&candidates.pool);
    let parts = prompt_parts(api, body, scan);
    let bytes = parts.iter().fold(0_usize, |sum, part| sum.saturating_add(part.len()));
    let salt = scan.raw(body, Key::CacheSalt).unwrap_or_default();
    let hash = prompt_hash(model.as_bytes(), salt, &parts, config.prefix.block_bytes);
    let distinctive = worker.index.distinctive(&hash.blocks, config.prefix.hot_share);
    let learnt = worker.table.bytes_per_token(&candidates.pool).filter(|_| pool.fit);
    let bytes_per_token = learnt.unwrap_or(pool.bytes_per_token);
    let session = config.session_headers.iter().find_map(|name| headers.get(name)).map(|id| session_hash(&model, id));
    let prompt = Prompt {
        bytes,
        session,
        tokens: bytes as f64 / bytes_per_token,
        block_tokens: config.prefix.block_bytes as f64 / bytes_per_token,
        key: distinctive.map_or(hash.head, |block| block.0),
        is_unseen: distinctive.is_some_and(|block| !worker.index.knows(block)),
        hash,
    };
    worker.counts.add(Metric::PromptTokens, prompt.tokens as i64);
    let limits = [Key::MaxCompletionTokens, Key::MaxTokens, Key::MaxOutputTokens];
    let limit = limits.into_iter().find_map(|key| scan.u64(body, key));
    let output_tokens = limit.unwrap_or(EXPECTED_OUTPUT_TOKENS).min(EXPECTED_OUTPUT_TOKENS);
    let plan = engine::decode_plan(body, scan);
    Ok(Work {
        config,
        headers,
        api,
        model: model.into_owned(),
        candidates,
        prompt,
        output_tokens,
        body_bytes: body.len(),
        plan,
    })
}

/// What the engine puts in front of the model, in the order in which chat templates do.
fn prompt_parts<'a>(api: Api, body: &'a [u8], scan: &Scan) -> Vec<&'a [u8]> {
    let keys: &[Key] = match api {
        Api::Chat => &[Key::Tools, Key::Messages],
        Api::Completions => &[Key::Prompt],
        Api::Responses => &[Key::Tools, Key::Instructions, Key::Input],
        Api::Messages => &[Key::Tools, Key::System, Key::Messages],
        Api::Generate => &[Key::TokenIds, Key::PromptTokenIds],
    };
    keys.iter().filter_map(|key| scan.raw(body, *key)).collect()
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
    fn on_unknown_paths_only_what_a_lenient_parser_may_take_for_an_object_is_suspect() {
        let may_be = |content_type: &str, body: &[u8]| {
            let headers = Headers::from_pairs([("content-type", content_type)]);
            let config = Arc::new(Config::parse(b"").unwrap());
            Intake { config, headers, api: None, phase: None, prefiller: None }.may_be_object(body)
        };
        let suspects: [&[u8]; 5] = [b"{", b" {\"x\":NaN}", b"\xef\xbb\xbf{}", b"{\0}\0", b"\0{\0}"];
        for body in suspects {
            assert!(may_be("application/json; charset=utf-16", body), "{body:?}");
            assert!(may_be("", body) && may_be("application/x+JSON", body), "{body:?}");
            assert!(!may_be("application/octet-stream", body), "{body:?}");
        }
        for body in [&b"[NaN]"[..], b"", b" ", b"null", b"\"x"] {
            assert!(!may_be("application/json", body), "{body:?}");
        }
    }

    #[test]
    fn a_leg_carries_the_clients_headers_and_none_of_ours() {
        let config = Config::parse(br#"{"destination_header":"x-custom"}"#).unwrap();
        let headers = [
            (":method", "POST"),
            (":path", "/p"),
            (":authority", "a"),
            (":scheme", "http"),
            (":protocol", "x"),
            ("authorization", "Bearer t"),
            ("x-request-id", "1"),
            ("x-request-id", "2"),
            ("content-length", "5"),
            ("accept-encoding", "gzip"),
            ("x-envoy-retry-on", "5xx"),
            ("x-pd-phase", "decode"),
            ("x-custom", "evil"),
            ("x-prefiller-host-port", "evil"),
        ];
        let leg = leg_headers(&Headers::from_pairs(headers), &config, b"10.0.0.1:1");
        let names: Vec<_> = leg.iter().map(|(name, _)| core::str::from_utf8(name).unwrap()).collect();
        assert_eq!(
            names,
            [":method", ":path", ":authority", ":scheme", "authorization", "x-request-id", "x-request-id", "x-custom"]
        );
        assert_eq!(leg.get("x-custom"), Some(&b"10.0.0.1:1"[..]));
    }

    #[test]
    fn a_hint_is_read_leniently() {
        let ids = endpoint_ids(b" 10.0.0.1:8000, nonsense,[::1]:80,");
        assert_eq!(ids.iter().map(EndpointId::to_string).collect::<Vec<_>>(), ["10.0.0.1:8000", "[::1]:80"]);
        assert!(endpoint_ids(b"\xff").is_empty());
    }
}
