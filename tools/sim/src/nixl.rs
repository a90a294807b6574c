//! NIXL's hand-over, strict: parameters issued by a prefill server are good once, unaltered, within the lease.
//!
//! The side channel stands for the RDMA reads and notifications between two servers:
//! ```text
//! POST /pull   x-engine-id: remote_engine_id     body: the kv_transfer_params object, byte for byte
//!   200 digest of the prompt   the KV moves, the lease ends
//!   409 reason                 the blocks are no longer what they were: the caller reads other KV
//!   404                        no such engine here
//!   412                        the other leg's request id is another one
//!   426                        the caller's revision (`x-revision`) is another one: the hand-shake fails, the blocks wait on
//! ```

use std::collections::{HashMap, VecDeque};
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

use crate::cache::Allocation;
use crate::handoff::{Remote, Room, Source};
use crate::rooms::ROOM_PATH;

/// Path of the side channel.
pub(crate) const PULL_PATH: &str = "/pull";
/// Request header that names the engine the caller believes to reach.
pub(crate) const ENGINE_HEADER: &str = "x-engine-id";
/// Request header with the caller's revision.
pub(crate) const REVISION_HEADER: &str = "x-revision";
/// Request header with the decode leg's `x-request-id`, by which push mode pairs the legs.
pub(crate) const PAIR_HEADER: &str = "x-pair-id";
/// Ended leases of which the server still knows why they ended; older ones count as unknown.
const REMEMBERED: usize = 65_536;
/// The member of a parameters object that decode reports as its own `cached_tokens`, up to its value.
const CACHED_TOKENS_MEMBER: &str = "\"remote_prefill_cached_tokens\" : ";
/// How long a connection to another server may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// The parameters without the count that a gateway may set to `null`: it takes no part in the transfer.
fn without_count(raw: &[u8]) -> Vec<u8> {
    let member = CACHED_TOKENS_MEMBER.as_bytes();
    let Some(start) = raw.windows(member.len()).position(|window| window == member) else { return raw.to_vec() };
    let (front, rest) = raw.split_at(start + member.len());
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let value = if rest.starts_with(b"null") { 4 } else { digits };
    [front, &rest[value..]].concat()
}

/// KV of a prompt.
pub(crate) struct PromptKv {
    /// Of the prompt's text.
    pub(crate) digest: u64,
    /// Prompt tokens.
    pub(crate) tokens: u64,
    /// Given back when the KV is dropped.
    pub(crate) _blocks: Allocation,
}

/// KV that waits for its decode leg.
struct Lease {
    raw: Box<[u8]>,
    /// Only a leg of this request id may have it; `None`: any.
    pair: Option<Box<str>>,
    kv: PromptKv,
    expires: Instant,
}

/// Why a pull does not get the KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Reused,
    Expired,
    Unknown,
}

impl Refusal {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Reused => "reused",
            Self::Expired => "expired",
            Self::Unknown => "unknown",
        }
    }
}

#[derive(Default)]
struct Table {
    open: HashMap<u64, Lease>,
    /// Open leases in the order in which they expire, and some that have been pulled.
    order: VecDeque<(Instant, u64)>,
    ended: HashMap<u64, Refusal>,
    ended_order: VecDeque<u64>,
    pinned_tokens: u64,
}

/// The leases of one prefill server.
#[derive(Default)]
pub(crate) struct Leases {
    /// Parameters are compared by their values, not byte for byte.
    by_value: bool,
    table: Mutex<Table>,
}

impl Leases {
    pub(crate) fn new(by_value: bool) -> Self {
        Self { by_value, table: Mutex::default() }
    }

    /// What is compared of the parameters.
    fn compared(&self, raw: &[u8]) -> Vec<u8> {
        if !self.by_value {
            return without_count(raw);
        }
        let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(raw) else { return raw.to_vec() };
        if let Some(members) = value.as_object_mut() {
            members.remove("remote_prefill_cached_tokens");
            // vLLM has no integer beyond 2^53. A sidecar in Go rounds this one.
            members.remove("sim_ticket");
        }
        value.to_string().into_bytes()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn open(&self, raw: &str, pair: Option<&str>, kv: PromptKv, lifetime: Duration) {
        let raw = self.compared(raw.as_bytes());
        let key = xxh3_64(&raw);
        let expires = Instant::now() + lifetime;
        let mut table = self.lock();
        table.pinned_tokens += kv.tokens;
        table.order.push_back((expires, key));
        let pair = pair.map(Into::into);
        table.open.insert(key, Lease { raw: raw.into(), pair, kv, expires });
    }

    /// Whether the legs are paired: push mode knows no other way to find the lease.
    pub(crate) fn pairs(&self, raw: &[u8], pair: Option<&str>) -> bool {
        let table = self.lock();
        let lease = table.open.get(&xxh3_64(&self.compared(raw)));
        lease.is_none_or(|lease| lease.pair.is_none() || lease.pair.as_deref() == pair)
    }

    /// Ends the lease of these bytes and says which prompt's KV it was.
    pub(crate) fn pull(&self, raw: &[u8]) -> Result<u64, Refusal> {
        let raw = self.compared(raw);
        let key = xxh3_64(&raw);
        let mut table = self.lock();
        let Some(lease) = table.open.get(&key).filter(|lease| *lease.raw == *raw) else {
            return Err(table.ended.get(&key).copied().unwrap_or(Refusal::Unknown));
        };
        let (digest, expired) = (lease.kv.digest, lease.expires <= Instant::now());
        if expired {
            return Err(Refusal::Expired);
        }
        let lease = table.end(key, Refusal::Reused);
        drop(table);
        drop(lease);
        Ok(digest)
    }

    /// Ends the leases whose time is over (with `all`, every one) and says how many.
    pub(crate) fn expire(&self, all: bool) -> u64 {
        let now = Instant::now();
        let mut ended = Vec::new();
        let mut table = self.lock();
        while let Some((expires, key)) = table.order.front().copied() {
            if !all && expires > now && table.open.contains_key(&key) {
                break;
            }
            table.order.pop_front();
            ended.extend(table.end(key, Refusal::Expired));
        }
        drop(table);
        ended.len() as u64
    }

    /// When the next lease ends.
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.lock().order.front().map(|(expires, _)| *expires)
    }

    /// Open leases and their tokens.
    pub(crate) fn gauges(&self) -> (u64, u64) {
        let table = self.lock();
        (table.open.len() as u64, table.pinned_tokens)
    }
}

impl Table {
    fn end(&mut self, key: u64, reason: Refusal) -> Option<Lease> {
        let lease = self.open.remove(&key)?;
        self.pinned_tokens -= lease.kv.tokens;
        self.ended.insert(key, reason);
        self.ended_order.push_back(key);
        if self.ended_order.len() > REMEMBERED
            && let Some(oldest) = self.ended_order.pop_front()
        {
            self.ended.remove(&oldest);
        }
        Some(lease)
    }
}

/// The `disaggregated_params` of a TensorRT-LLM's answer, made from a lease's parameters.
pub(crate) fn trtllm_params(params: &str) -> String {
    params.replacen('{', "{\"request_type\" : \"context_only\",\"first_gen_tokens\":[7], ", 1)
}

/// What goes into a parameters object.
pub(crate) struct Issue<'a> {
    pub(crate) engine_id: &'a str,
    /// Id of the request inside the engine.
    pub(crate) request_id: &'a str,
    pub(crate) host: &'a str,
    pub(crate) port: u16,
    pub(crate) tokens: u64,
    /// Prompt tokens that the prefill server had cached.
    pub(crate) cached: u64,
    /// Tells this object from every other; above 2^53.
    pub(crate) ticket: u64,
}

/// The `kv_transfer_params` of a prefill answer: legal JSON that changes when anybody parses and rebuilds it.
/// (Unordered keys, white space, a number that loses digits as a double, escapes, an empty array with a space in it.)
pub(crate) fn write_params(issue: &Issue<'_>, blocks: &[u32]) -> String {
    let mut out = String::with_capacity(512);
    let _ = write!(
        out,
        "{{\"remote_engine_id\":\"{}\", \"do_remote_prefill\" : true,\"do_remote_decode\":false,\"remote_block_ids\":[ [",
        issue.engine_id
    );
    for (i, block) in blocks.iter().enumerate() {
        let _ = write!(out, "{}{block}", if i == 0 { "" } else { "," });
    }
    let request_id = serde_json::to_string(issue.request_id).unwrap_or_default();
    let host = serde_json::to_string(issue.host).unwrap_or_default();
    let _ = write!(
        out,
        "] ],\n  \"remote_request_id\":{request_id},\"remote_host\":{host},\"remote_port\":{},\"tp_size\":1,\
         {CACHED_TOKENS_MEMBER}{},\"remote_num_tokens\":{},\"sim_ticket\":{},\t\"sim_scale\":1.0e-7,\"sim_note\":\"a\\u00e9\\/\\\"}}]\",\
         \"sim_nested\":{{ \"b\":[ ],\"a\":null }} }}",
        issue.port, issue.cached, issue.tokens, issue.ticket
    );
    out
}

/// What became of a pull.
pub(crate) enum Pulled {
    /// The KV of the prompt with this digest.
    Kv(u64),
    /// Somebody else's by now.
    Gone(String),
    /// The other side does not know of this leg.
    Unpaired,
    /// No such server.
    Unreachable(String),
}

/// Fetches KV from other servers.
pub(crate) struct Puller {
    client: Client<HttpConnector, Full<Bytes>>,
    revision: Option<String>,
}

impl Puller {
    pub(crate) fn new(revision: Option<String>) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_LIMIT));
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector);
        Self { client, revision }
    }

    pub(crate) async fn pull(&self, remote: &Remote, source: &Source, pair: Option<&str>) -> Pulled {
        let host = if source.host.contains(':') { format!("[{}]", source.host) } else { source.host.clone() };
        let mut request = http::Request::post(format!("http://{host}:{}{PULL_PATH}", source.port))
            .header(ENGINE_HEADER, &source.engine_id);
        if let Some(pair) = pair {
            request = request.header(PAIR_HEADER, pair);
        }
        self.fetch(request.body(Full::new(Bytes::copy_from_slice(remote.raw.as_bytes())))).await
    }

    pub(crate) async fn meet(&self, room: &Room) -> Pulled {
        let mut request = http::Request::post(format!("http://{}{ROOM_PATH}{}", room.server, room.key));
        if let Some(engine_id) = &room.engine_id {
            request = request.header(ENGINE_HEADER, engine_id);
        }
        self.fetch(request.body(Full::default())).await
    }

    async fn fetch(&self, request: http::Result<http::Request<Full<Bytes>>>) -> Pulled {
        let mut request = match request {
            Ok(request) => request,
            Err(error) => return Pulled::Unreachable(error.to_string()),
        };
        if let Some(revision) = self.revision.as_deref().and_then(|revision| revision.parse::<http::HeaderValue>().ok())
        {
            request.headers_mut().insert(REVISION_HEADER, revision);
        }
        let response = match self.client.request(request).await {
            Ok(response) => response,
            Err(error) => return Pulled::Unreachable(error.to_string()),
        };
        let status = response.status().as_u16();
        let text = match response.into_body().collect().await {
            Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
            Err(error) => return Pulled::Unreachable(error.to_string()),
        };
        match (status, text.parse()) {
            (200, Ok(digest)) => Pulled::Kv(digest),
            (409, _) => Pulled::Gone(text),
            (412, _) => Pulled::Unpaired,
            _ => Pulled::Unreachable(format!("{status} {text}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Cache;

    const LONG: Duration = Duration::from_secs(1_000);

    fn params(ticket: u64) -> String {
        let issue = Issue {
            engine_id: "e",
            request_id: "cmpl-\"odd\"",
            host: "127.0.0.1",
            port: 1,
            tokens: 32,
            cached: 16,
            ticket: (1 << 62) + ticket,
        };
        write_params(&issue, &[1, 2])
    }

    #[test]
    fn params_are_legal_and_do_not_survive_a_rebuild() {
        let raw = params(1);
        let value: serde_json::Value = serde_json::from_str(&raw).unwrap();
        assert_eq!(value["remote_block_ids"], serde_json::json!([[1, 2]]));
        assert_eq!(value["remote_request_id"], "cmpl-\"odd\"");
        assert_eq!(value["sim_ticket"], (1_u64 << 62) + 1);
        assert_ne!(serde_json::to_string(&value).unwrap(), raw);
    }

    #[test]
    fn rebuilt_params_are_good_where_values_count() {
        let cache = Cache::new(8);
        for by_value in [true, false] {
            let leases = Leases::new(by_value);
            let kv = || PromptKv { digest: 7, tokens: 32, _blocks: cache.try_reserve(&[], 0, 2).unwrap() };
            leases.open(&params(1), None, kv(), LONG);
            let rebuilt = serde_json::from_str::<serde_json::Value>(&params(1)).unwrap();
            let mut altered = rebuilt.clone();
            altered["remote_block_ids"] = serde_json::json!([[1, 3]]);
            assert_eq!(leases.pull(altered.to_string().as_bytes()), Err(Refusal::Unknown));
            let mut rebuilt = rebuilt;
            rebuilt["sim_ticket"] = serde_json::json!(4.611_686_018_427_388e18);
            let pulled = leases.pull(rebuilt.to_string().as_bytes());
            assert_eq!(pulled, if by_value { Ok(7) } else { Err(Refusal::Unknown) });
        }
    }

    #[test]
    fn a_lease_is_good_once_unaltered_and_in_time() {
        let cache = Cache::new(8);
        let leases = Leases::default();
        let open = |raw: &str, lifetime| {
            let blocks = cache.try_reserve(&[], 0, 2).unwrap();
            leases.open(raw, None, PromptKv { digest: 7, tokens: 32, _blocks: blocks }, lifetime);
        };
        open(&params(1), LONG);
        open(&params(2), LONG);
        assert_eq!((leases.gauges(), cache.usage()), ((2, 64), 0.5));
        assert_eq!(leases.pull(params(1).replace(" ]", "]").as_bytes()), Err(Refusal::Unknown));
        let recounted = params(1).replace("cached_tokens\" : 16", "cached_tokens\" : null");
        assert_ne!(recounted, params(1));
        assert_eq!(leases.pull(recounted.as_bytes()), Ok(7));
        assert_eq!(leases.pull(params(1).as_bytes()), Err(Refusal::Reused));
        assert_eq!((leases.gauges(), cache.usage()), ((1, 32), 0.25));
        assert_eq!((leases.expire(false), leases.expire(true)), (0, 1));
        assert_eq!(leases.pull(params(2).as_bytes()), Err(Refusal::Expired));
        open(&params(3), Duration::ZERO);
        assert_eq!(leases.pull(params(3).as_bytes()), Err(Refusal::Expired));
        assert_eq!((leases.expire(false), leases.gauges(), cache.usage()), (1, (0, 0), 0.0));
    }
}
