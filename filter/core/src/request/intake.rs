//! What a request's headers and body say, and which of its headers go on.

use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use std::borrow::Cow;
use std::sync::Arc;

use crate::body::form::{Encoding, Form, without};
use crate::body::json::{self, ScanError};
use crate::body::splice::{HeadEdit, HeadPlan};
use crate::body::{self, Api, Key, KeySet, Scan, decode_percent};
use crate::choose::scheduler::Prompt;
use crate::config::{Config, PREFILLER_HEADER, Pool, SUBSET_HEADER, TEST_SELECTION_HEADER};
use crate::endpoints::candidates::{Candidates, NoCandidates};
use crate::endpoints::endpoint_state::EndpointState;
use crate::endpoints::table::Table;
use crate::engine;
use crate::headers::Headers;
use crate::metrics::Metric;
use crate::paths;
use crate::prefix::hash::{prompt_hash, session_hash};
use crate::request::models::{Served, serve};
use crate::request::reply::Rejection;
use crate::wire::EndpointId;
use crate::workers::worker::Worker;

/// Output tokens that a request is expected to add to its KV cache, unless it allows fewer. The traces' mean is 149 to 343.
const EXPECTED_OUTPUT_TOKENS: u64 = 256;

/// What the headers said.
#[derive(Debug)]
pub(crate) struct Intake {
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

    pub(crate) fn allows(&self, slot: &EndpointState) -> bool {
        let address = slot.endpoint.address;
        self.0.iter().any(|(ip, port)| *ip == address.ip() && port.is_none_or(|port| port == address.port()))
    }
}

/// Endpoints to choose from for a model, within a subset if there is one.
pub(crate) fn candidates(table: &Table, model: &str, subset: Option<&Subset>) -> Result<Arc<Candidates>, NoCandidates> {
    let all = table.candidates(model)?;
    let Some(subset) = subset else { return Ok(all) };
    let mut some = Candidates::clone(&all);
    some.retain(|at| table.get(at).is_some_and(|slot| subset.allows(slot)));
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

impl Intake {
    /// Frees a body without a prompt of what no client may send.
    pub(crate) fn cleaned(&self, body: &[u8]) -> Result<HeadEdit, Rejection> {
        let whole = |head: Vec<u8>| HeadEdit { drain: u32::try_from(body.len()).unwrap_or(u32::MAX), head };
        if let Some(encoding) = &self.form {
            let form = Form::read(body, encoding.clone()).and_then(|form| form.edited(body, None));
            return form.map(|edited| edited.map(whole).unwrap_or_default()).map_err(Rejection::InvalidForm);
        }
        let refused = |error: ScanError| Rejection::InvalidJson(error.to_string());
        match body::scan(body) {
            Ok(scan) => Ok(engine::decode_plan(body, &scan, KeySet::EMPTY, None).with_insert(b"")),
            Err(_) if body.trim_ascii_start().first() == Some(&b'[') && self.is_json() => {
                let cuts = body::cuts(body).map_err(refused)?;
                Ok(if cuts.is_empty() { HeadEdit::default() } else { whole(without(body, &cuts)) })
            }
            Err(error) if self.may_be_object(body) => Err(refused(error)),
            Err(_) => Ok(HeadEdit::default()),
        }
    }

    /// Whether an engine may take the body for JSON: on paths of inference APIs whatever the content type says.
    fn is_json(&self) -> bool {
        let content_type = self.headers.get("content-type").unwrap_or_default();
        let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        let is_allowed_only = self.headers.get(":path").is_none_or(|path| !paths::is_inference(&decoded_path(path)));
        !is_allowed_only || essence.is_empty() || essence.to_ascii_lowercase().ends_with(b"json")
    }

    /// Whether an engine could read an object, and hand-over parameters in it, where our scan finds none. Python's parser
    /// takes UTF-16 and UTF-32, byte order marks, `NaN`, halves of surrogate pairs and any depth.
    fn may_be_object(&self, body: &[u8]) -> bool {
        let first = body.trim_ascii_start().first();
        self.is_json() && !matches!(first, None | Some(b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n'))
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
    /// The model that serves it.
    pub(crate) served: Served,
    /// What the client asked for, where the answer is to say so.
    pub(crate) put_back: Option<String>,
    /// Whether the answer is a stream.
    pub(crate) is_stream: bool,
    /// Whether the answer will tell what it used.
    pub(crate) shows_usage: bool,
    pub(crate) prompt: Prompt,
    pub(crate) output_tokens: u64,
    /// Sequences, where the body asks for a batch of them.
    pub(crate) batch: Option<u32>,
    pub(crate) body_bytes: usize,
    pub(crate) subset: Option<Subset>,
    /// How the body becomes an engine's, when it is known what to put in front.
    pub(crate) plan: HeadPlan,
}

impl Work {
    pub(crate) fn pool(&self) -> &Pool {
        self.config.pool(&self.served.candidates.pool)
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
    b"x-encoder-hosts-ports",
    b"x-kv-cache-source-host-port",
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

/// Header that tells the ranks behind one address apart.
const RANK_HEADER: &[u8] = b"x-data-parallel-rank";

/// Headers of the prefill leg: the client's, the destination, and the rank there if it has one.
pub(crate) fn leg_headers(headers: &Headers, config: &Config, destination: &[u8], rank: Option<u32>) -> Headers {
    const PSEUDO: &[&[u8]] = &[b":method", b":path", b":authority", b":scheme"];
    let forwarded = |name: &[u8]| {
        PSEUDO.contains(&name)
            || !(name.starts_with(b":")
                || name.starts_with(b"x-envoy-")
                || NOT_FORWARDED.contains(&name)
                || is_ours(name, config))
    };
    let own = (config.destination_header.as_bytes(), destination);
    let rank = rank.map(|rank| rank.to_string());
    let rank = rank.as_ref().map(|rank| (RANK_HEADER, rank.as_bytes()));
    Headers::from_pairs(headers.iter().filter(|(name, _)| forwarded(name)).chain([own]).chain(rank))
}

/// Headers of a question to a bootstrap server.
pub(crate) fn question_headers(config: &Config, path: &str, server: &str) -> Headers {
    let own = [(":method", "GET"), (":path", path), (":authority", server), (":scheme", "http")];
    Headers::from_pairs(own.into_iter().chain([(config.destination_header.as_str(), server)]))
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

#[expect(clippy::too_many_arguments, reason = "what headers and body said")]
pub(crate) fn read_body(
    worker: &mut Worker,
    config: Arc<Config>,
    headers: Headers,
    api: Api,
    subset: Option<Subset>,
    body: &[u8],
    scan: &Scan,
    now: Duration,
) -> Result<Work, Rejection> {
    let named = || {
        let header = headers.get("x-ai-eg-model").or_else(|| headers.get("x-gateway-model-name"));
        let header = header.filter(|_| !scan.has(Key::Model))?;
        Some(Cow::Owned(core::str::from_utf8(header).ok()?.to_owned()))
    };
    let model = scan.str(body, Key::Model).or_else(named).ok_or(Rejection::MissingModel)?;
    let session = config.session_headers.iter().find_map(|name| headers.get(name));
    let bits = match session {
        _ if !config.models.contains_key(&*model) => 0,
        // A conversation stays with its model.
        Some(id) => xxhash_rust::xxh3::xxh3_64(id),
        None => worker.pair_id(headers.get("x-request-id").unwrap_or_default(), now),
    };
    let mut served = serve(&config, &worker.state.table, subset.as_ref(), &model, bits)?;
    let put_back = served.is_put_back.then(|| model.into_owned());
    let (model, candidates) = (&served.model, &served.candidates);
    let pool = config.pool(&candidates.pool);
    let parts = prompt_parts(api, body, scan);
    let bytes = parts.iter().fold(0_usize, |sum, part| sum.saturating_add(part.len()));
    let salt = scan.raw(body, Key::CacheSalt).unwrap_or_default();
    // SGLang's name of an adapter, beside the model's.
    let adapter = scan.raw(body, Key::LoraPath).map(|path| [salt, path].concat());
    let salt = adapter.as_deref().unwrap_or(salt);
    let hash = prompt_hash(model.as_bytes(), salt, &parts, config.prefix.block_bytes);
    let distinctive = worker.state.index.distinctive(&hash.blocks, config.prefix.hot_share);
    let learnt = worker.state.table.bytes_per_token(&candidates.pool).filter(|_| pool.fit);
    let bytes_per_token = learnt.unwrap_or(pool.bytes_per_token);
    let session = session.map(|id| session_hash(model, id));
    let tokens = bytes as f64 / bytes_per_token;
    let prompt = Prompt {
        bytes,
        session,
        tokens,
        block_tokens: config.prefix.block_bytes as f64 / bytes_per_token,
        key: distinctive.map_or(hash.head, |block| block.0),
        is_unseen: distinctive.is_some_and(|block| !worker.state.index.knows(block)),
        is_several: asks_for_several(body, scan),
        hash,
    };
    served.candidates = served.candidates.for_prompt(tokens, &worker.state.table);
    let batch = batch(api, body, scan);
    let prompt = Prompt { is_several: prompt.is_several || batch.is_some_and(|batch| batch > 1), ..prompt };
    worker.counts.add(Metric::PromptTokens, prompt.tokens as i64);
    let limits = [Key::MaxCompletionTokens, Key::MaxTokens, Key::MaxOutputTokens];
    let limit = limits.into_iter().find_map(|key| scan.u64(body, key));
    let output_tokens = limit.unwrap_or(EXPECTED_OUTPUT_TOKENS).min(EXPECTED_OUTPUT_TOKENS);
    let plan = engine::decode_plan(body, scan, KeySet::EMPTY, served.rewrite.as_deref());
    // Envoy does not survive a body that an edit makes larger than the buffer filter's limit.
    if plan.with_insert(b"").edited_bytes(body.len()) > config.max_body_bytes {
        return Err(Rejection::TooLarge(config.max_body_bytes));
    }
    let is_stream = scan.bool(body, Key::Stream) == Some(true);
    let mut options = json::members(scan.raw(body, Key::StreamOptions).unwrap_or_default());
    let shows_usage = !is_stream || options.any(|(key, value)| key == "include_usage" && value == b"true");
    Ok(Work {
        config,
        headers,
        api,
        served,
        put_back,
        is_stream,
        shows_usage,
        prompt,
        output_tokens,
        batch,
        body_bytes: body.len(),
        subset,
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

/// Whether more answers than one are asked for, or several are computed to give one.
fn asks_for_several(body: &[u8], scan: &Scan) -> bool {
    let one: [&[u8]; 4] = [b"1", b"1.0", b"null", b"false"];
    let keys = [Key::N, Key::BestOf, Key::UseBeamSearch];
    let is_several = |key: &str, value: &[u8]| keys.iter().any(|asks| asks.name() == key) && !one.contains(&value);
    let nested = scan.raw(body, Key::SamplingParams).unwrap_or_default();
    keys.iter().any(|key| scan.raw(body, *key).is_some_and(|value| is_several(key.name(), value)))
        || json::members(nested).any(|(key, value)| is_several(&key, value))
}

/// Sequences that SGLang keeps apart, as its own router counts them: prompts of a batch, answers of a chat. `None`
/// where there is one and no list of them.
fn batch(api: Api, body: &[u8], scan: &Scan) -> Option<u32> {
    match api {
        Api::Completions => {
            let prompts = scan.raw(body, Key::Prompt)?;
            let first = prompts.strip_prefix(b"[")?.trim_ascii_start().first()?;
            let count = matches!(first, b'"' | b'[').then(|| json::elements(prompts).count())?;
            Some(u32::try_from(count).unwrap_or(u32::MAX))
        }
        Api::Chat => {
            let answers = scan.u64(body, Key::N).filter(|n| *n > 1)?;
            Some(u32::try_from(answers).unwrap_or(u32::MAX))
        }
        Api::Responses | Api::Messages | Api::Generate => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::scan;

    #[test]
    fn sequences_are_counted_as_the_engines_do() {
        for (api, body, expected) in [
            (Api::Completions, r#"{"prompt":"a"}"#, (None, false)),
            (Api::Completions, r#"{"prompt":[1,2,3]}"#, (None, false)),
            (Api::Completions, r#"{"prompt":["a"]}"#, (Some(1), false)),
            (Api::Completions, r#"{"prompt": [ "a" , "b"]}"#, (Some(2), false)),
            (Api::Completions, r#"{"prompt":[[1],[2,3],[4]]}"#, (Some(3), false)),
            (Api::Completions, r#"{"prompt":[],"best_of":2}"#, (None, true)),
            (Api::Completions, r#"{"prompt":"a","use_beam_search":true}"#, (None, true)),
            (Api::Chat, r#"{"n":1}"#, (None, false)),
            (Api::Chat, r#"{"n":3}"#, (Some(3), true)),
            (Api::Chat, r#"{"n":2.0}"#, (None, true)),
            (Api::Chat, r#"{"n":null,"use_beam_search":false}"#, (None, false)),
            (Api::Chat, r#"{"n":18446744073709551615}"#, (Some(u32::MAX), true)),
            (Api::Generate, r#"{"sampling_params":{"n":2}}"#, (None, true)),
            (Api::Generate, r#"{"sampling_params":{"n":1,"seed":2}}"#, (None, false)),
            (Api::Messages, r#"{"n":3}"#, (None, true)),
        ] {
            let scan = scan(body.as_bytes()).unwrap();
            let counted = (batch(api, body.as_bytes(), &scan), asks_for_several(body.as_bytes(), &scan));
            assert_eq!(counted, expected, "{body}");
        }
    }

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
            let headers = Headers::from_pairs([("content-type", content_type), (":path", "/own")]);
            let config = Arc::new(Config::parse(b"").unwrap());
            let claims = Claims::default();
            Intake { config, headers, api: None, form: None, phase: None, prefiller: None, claims, subset: None }
                .may_be_object(body)
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
        let leg = leg_headers(&Headers::from_pairs(headers), &config, b"10.0.0.1:1", Some(3));
        let names: Vec<_> = leg.iter().map(|(name, _)| core::str::from_utf8(name).unwrap()).collect();
        assert_eq!(
            names,
            [
                ":method",
                ":path",
                ":authority",
                ":scheme",
                "authorization",
                "x-request-id",
                "x-request-id",
                "x-custom",
                "x-data-parallel-rank"
            ]
        );
        assert_eq!(leg.get("x-data-parallel-rank"), Some(&b"3"[..]));
        assert_eq!(leg.get("x-custom"), Some(&b"10.0.0.1:1"[..]));
    }

    #[test]
    fn a_hint_is_read_leniently() {
        let ids = endpoint_ids(b" 10.0.0.1:8000, nonsense,[::1]:80,");
        assert_eq!(ids.iter().map(EndpointId::to_string).collect::<Vec<_>>(), ["10.0.0.1:8000", "[::1]:80"]);
        assert!(endpoint_ids(b"\xff").is_empty());
    }
}
