//! The KV lease: how long a prefill server keeps a KV cache for its decode leg. A decode server that fetches the KV
//! cache later reads blocks that may be another prompt's, and answers wrong text with 200.
//!
//! vLLM's KV lease is 30 s unless `kv_lease_duration` says otherwise; a running decode server renews it. The first
//! token of a stream shows that the KV cache was fetched before that time. An answer that is no stream shows only its
//! end. The filter then asks the prefill server for its counter of expired KV leases: if the counter did not grow, the
//! answer is right.

use core::time::Duration;
use std::sync::Arc;

use super::effect::{Call, Effect, Flow, Outcome};
use super::parsed::ParsedRequest;
use crate::body::Api;
use crate::body::splice::HeadEdit;
use crate::config::Config;
use crate::endpoints::table::EndpointRef;
use crate::request::reply::{ErrorForm, Rejection};
use crate::time::Monotonic;
use crate::workers::worker::Worker;

/// Path of the prefill server's metrics.
const METRICS_PATH: &str = "/metrics";
/// vLLM's counter of expired KV leases, one for each engine of a server.
const EXPIRED: &[u8] = b"vllm:nixl_num_kv_expired_reqs_total";
/// Time limit of the question for a prefill server's metrics.
const METRICS_TIMEOUT: Duration = Duration::from_secs(5);
/// Divisor of the KV lease. The quotient is the time that the prefill answer may take to the filter (1 s of vLLM's
/// 30 s).
const MARGIN: u32 = 30;
/// Events that `/v1/responses` streams before the first token.
const PREFACES: [&[u8]; 3] = [b"response.created", b"response.in_progress", b"response.queued"];

/// The KV lease of a request that was handed over, until its answer is known to be in time.
#[derive(Clone, Debug)]
pub(super) struct KvLease {
    prefill: EndpointRef,
    /// End of the time for which the prefill server keeps the KV cache for certain.
    ends: Monotonic,
    /// Lower bound of the KV leases that had expired at the prefill server before this one began.
    expired_before: f64,
    api: Api,
    is_stream: bool,
    config: Arc<Config>,
    state: KvLeaseState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KvLeaseState {
    /// The first token has not come.
    Awaited,
    /// The filter asked the prefill server for its metrics.
    Asked,
    /// The first token came too late. The client has an error event, or gets it now.
    Over,
}

/// Effect of the lease on an answer whose headers came.
pub(super) enum Headers {
    /// The answer goes on. Its first token came in time.
    InTime,
    /// The answer goes on. Its first token has not come yet.
    Stream,
    /// The answer waits for the prefill server's metrics.
    Ask(Call),
    /// The answer may be wrong.
    Late,
}

/// A part of a stream, compared with the lease.
pub(super) enum Part {
    /// The part has no token.
    Preface,
    /// The first token came in time. The KV lease no longer matters.
    InTime,
    /// The first token came too late. The client gets the error in its place.
    Late(Effect),
    /// The client has got the error.
    Ended(Outcome),
}

impl KvLease {
    /// The KV lease of a request whose prefill leg has just ended; `None` where the pool or the engine has no KV lease.
    pub(super) fn begin(
        worker: &mut Worker,
        parsed: &ParsedRequest,
        prefill: EndpointRef,
        now: Monotonic,
    ) -> Option<Self> {
        let state = worker.state.table.resolve(prefill).filter(|state| state.engine.protocol().has_kv_lease)?;
        let lease = parsed.pool().kv_lease?;
        Some(Self {
            prefill,
            ends: now.saturating_add(lease.saturating_sub(lease.checked_div(MARGIN).unwrap_or_default())),
            expired_before: state.expired_kv_leases,
            api: parsed.api,
            is_stream: parsed.is_stream,
            config: Arc::clone(&parsed.head.config),
            state: KvLeaseState::Awaited,
        })
    }

    /// Whether the answer's body has to be read.
    pub(super) fn reads_body(&self) -> bool {
        self.is_stream || self.state == KvLeaseState::Over
    }

    /// Whether the answer waits for the prefill server's metrics.
    pub(super) fn is_asking(&self) -> bool {
        self.state == KvLeaseState::Asked
    }

    /// The headers of an answer with status 200 are there.
    pub(super) fn headers(&mut self, worker: &mut Worker, now: Monotonic) -> Headers {
        if now <= self.ends {
            return if self.is_stream { Headers::Stream } else { Headers::InTime };
        }
        let server = worker.state.table.resolve(self.prefill).map(|state| state.address.to_string());
        let (false, Some(server)) = (self.is_stream, server) else { return Headers::Late };
        self.state = KvLeaseState::Asked;
        Headers::Ask(Call::question(&self.config, &self.config.cluster, METRICS_PATH, &server, METRICS_TIMEOUT))
    }

    /// Whether the prefill server's metrics show that no KV lease expired since this one began.
    pub(super) fn is_kept(&self, worker: &mut Worker, metrics: &[u8]) -> bool {
        let Some(expired) = expired_kv_leases(metrics) else { return false };
        if let Some(state) = worker.state.table.resolve(self.prefill) {
            state.expired_kv_leases = expired;
        }
        expired == self.expired_before
    }

    /// A part of a stream is there.
    pub(super) fn part(&mut self, part: &[u8], is_last: bool, now: Monotonic) -> Part {
        let drain = u32::try_from(part.len()).unwrap_or(u32::MAX);
        if self.state == KvLeaseState::Over {
            // The event has gone out. Resetting the stream also makes the decode server stop.
            let mut effects = vec![Effect::EditResponse(HeadEdit { drain, head: Vec::new() })];
            if !is_last {
                effects.push(Effect::Reply(Rejection::KvLeaseOver.reply(ErrorForm::OpenAi)));
            }
            return Part::Ended(Outcome { flow: if is_last { Flow::Continue } else { Flow::Pause }, effects });
        }
        if is_preface(self.api, part) {
            return Part::Preface;
        }
        if now <= self.ends {
            return Part::InTime;
        }
        self.state = KvLeaseState::Over;
        let head = error_event(self.api);
        Part::Late(Effect::EditResponse(HeadEdit { drain, head }))
    }
}

/// Sum of the counters of expired KV leases on a page of metrics; `None` where the page has no such counter.
fn expired_kv_leases(metrics: &[u8]) -> Option<f64> {
    let value = |line: &[u8]| {
        let rest = line.strip_prefix(EXPIRED)?;
        let value = match rest.first()? {
            b' ' => rest,
            b'{' => rest.get(memchr::memrchr(b'}', rest)?.saturating_add(1)..)?,
            _ => return None,
        };
        let mut words = core::str::from_utf8(value).ok()?.split_ascii_whitespace();
        words.next()?.parse::<f64>().ok()
    };
    metrics.split(|byte| *byte == b'\n').filter_map(value).reduce(|sum, value| sum + value)
}

/// Whether a part of a stream has no generated text: only comments, or the first events of `/v1/responses`.
fn is_preface(api: Api, part: &[u8]) -> bool {
    let mut lines = part.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    lines.all(|line| match line.strip_prefix(b"event:") {
        _ if line.starts_with(b":") => true,
        Some(name) => api == Api::Responses && PREFACES.contains(&name.trim_ascii()),
        // The line with the event's name, which comes first, decides.
        None => api == Api::Responses && line.starts_with(b"data:"),
    })
}

/// The error as the last event of a stream.
fn error_event(api: Api) -> Vec<u8> {
    let form = if api == Api::Messages { ErrorForm::Anthropic } else { ErrorForm::OpenAi };
    let body = Rejection::KvLeaseOver.reply(form).body;
    match api {
        Api::Messages => [b"event: error\ndata: ".as_slice(), &body, b"\n\n"].concat(),
        Api::Responses => {
            let reply = Rejection::KvLeaseOver;
            let event = serde_json::json!({
                "type": "error", "code": reply.reason(), "message": reply.message(), "param": null, "sequence_number": 0
            });
            format!("event: error\ndata: {event}\n\n").into_bytes()
        }
        Api::Chat | Api::Completions | Api::Generate => [b"data: ".as_slice(), &body, b"\n\ndata: [DONE]\n\n"].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expired_kv_leases_are_added_up_over_engines() {
        let page = b"# TYPE vllm:nixl_num_kv_expired_reqs_total counter\n\
            vllm:nixl_num_kv_expired_reqs_total{engine=\"0\",model_name=\"a}b\"} 2.0\n\
            vllm:nixl_num_kv_expired_reqs_total{engine=\"1\"} 3 1700000000\n\
            vllm:nixl_num_kv_expired_reqs_created{engine=\"1\"} 1.7e9\n";
        assert_eq!(expired_kv_leases(page), Some(5.0));
        assert_eq!(expired_kv_leases(b"vllm:nixl_num_kv_expired_reqs_total 7"), Some(7.0));
        for page in [
            &b""[..],
            b"vllm:nixl_num_kv_expired_reqs_total",
            b"vllm:nixl_num_kv_expired_reqs_total{",
            b"vllm:nixl_num_kv_expired_reqs_total_x 1",
            b"vllm:nixl_num_kv_expired_reqs_total x",
        ] {
            assert_eq!(expired_kv_leases(page), None);
        }
    }

    #[test]
    fn parts_before_the_first_token_are_recognised() {
        let created = "event: response.created\ndata: {\"type\":\"response.created\"}\n\n";
        let delta = "event: response.output_text.delta\ndata: {}\n\n";
        for (api, part, expected) in [
            (Api::Chat, ": ping\n\n", true),
            (Api::Chat, "\r\n", true),
            (Api::Chat, "data: {}\n\n", false),
            (Api::Messages, "event: message_start\ndata: {}\n\n", false),
            (Api::Responses, created, true),
            (Api::Responses, &format!("{created}event: response.in_progress\ndata: {{}}\n\n"), true),
            (Api::Responses, &format!("{created}{delta}"), false),
            (Api::Responses, delta, false),
            (Api::Responses, "event: respon", false),
        ] {
            assert_eq!(is_preface(api, part.as_bytes()), expected, "{part}");
        }
    }
}
