//! Names and help texts of the filter's metrics, and the counts that are not flushed to Envoy yet.
//!
//! The ABI knows no labels, so a tag stands in the name: `name;tag=value`. `stats_tags` in Envoy's bootstrap make it a
//! label again (see `envoy/local.yaml`). Counts are kept in the worker and flushed at its tick: a request pays for an
//! addition, not for a host call each.

/// Kind of a metric, as Envoy has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down; workers add their changes, so the value is the sum over workers.
    Gauge,
    /// Distribution of values.
    Histogram,
}

macro_rules! metrics {
    ($($variant:ident $kind:ident $name:literal $help:literal,)*) => {
        /// Everything the filter counts.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Metric {
            $(#[doc = $help] $variant,)*
        }

        impl Metric {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Name, with tags.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// One line for an operator.
            #[must_use]
            pub const fn help(self) -> &'static str {
                match self { $(Self::$variant => $help,)* }
            }

            /// Kind.
            #[must_use]
            pub const fn kind(self) -> MetricKind {
                match self { $(Self::$variant => MetricKind::$kind,)* }
            }
        }
    };
}

metrics! {
    RequestsSplit Counter "pd_requests_total;decision=split" "Requests with a prefill leg and a decode leg",
    RequestsDecodeOnly Counter "pd_requests_total;decision=decode_only" "Requests that one endpoint served whole",
    RequestsPrefillOnly Counter "pd_requests_total;decision=prefill_only" "Requests that `x-pd-phase: prefill` marked as prefill work",
    RequestsPassed Counter "pd_requests_total;decision=passed" "Requests without a prompt, and lists of models",
    RequestsRejected Counter "pd_requests_total;decision=rejected" "Requests that the filter answered with an error",
    ShedSaturated Counter "pd_requests_shed_total;reason=saturated" "Requests answered with 429 because the pool was at its limit",
    ShedSheddable Counter "pd_requests_shed_total;reason=sheddable" "Requests answered with 429 because they were sheddable and the pool was at 80 % of its limit",
    ShedFairShare Counter "pd_requests_shed_total;reason=fair_share" "Requests answered with 429 because their fairness id had more than its share and the pool was at 80 % of its limit",
    ShedDeadline Counter "pd_requests_shed_total;reason=deadline" "Requests answered with 429 because no endpoint could compute the prompt by the client's deadline",
    BoundAtOnce Counter "pd_bound_total;result=at_once" "Requests of pools with a queue for which a prefill endpoint had room when they came",
    BoundLater Counter "pd_bound_total;result=waited" "Requests that waited in the gateway until a prefill endpoint had room",
    QueueRequests Counter "pd_queue_refused_total;reason=queue_requests" "Requests answered with 429 because `queue.max_requests` requests waited already",
    QueueBytes Counter "pd_queue_refused_total;reason=queue_bytes" "Requests answered with 429 because the waiting requests would have taken more than `queue.max_bytes`",
    QueueDeadline Counter "pd_queue_refused_total;reason=deadline" "Requests answered with 429 because they would have waited, or had waited, beyond the client's deadline",
    QueueTimeout Counter "pd_queue_refused_total;reason=queue_timeout" "Requests answered with 503 because they had waited for `queue.max_wait_ms`",
    WaitMsHigh Histogram "pd_wait_high_ms" "Milliseconds that requests with a priority above 0 waited for a prefill endpoint with room",
    WaitMsNormal Histogram "pd_wait_normal_ms" "Milliseconds that requests of priority 0 waited for a prefill endpoint with room",
    WaitMsLow Histogram "pd_wait_low_ms" "Milliseconds that requests with a priority below 0 waited for a prefill endpoint with room",
    WaitingForEndpoint Gauge "pd_waiting_for_endpoint" "Requests that wait until an endpoint is ready that could serve them",
    WaitsLeft Counter "pd_waits_left_total" "Requests whose client left while they waited",
    Wakes Counter "pd_wakes_total" "Wake-ups of a worker, by itself or another one, because an endpoint may have room for one of its waiting requests",
    PromptTokens Counter "pd_prompt_tokens_total" "Prompt tokens, estimated from bytes",
    MatchedTokens Counter "pd_matched_tokens_total" "Prompt tokens that the prefix index held at the endpoint that computed the prompt",
    MovedTokens Counter "pd_moved_tokens_total" "Prompt tokens of split requests that the prefix index did not hold at the decode endpoint, which fetches them from the prefill endpoint",
    PrefillOk Counter "pd_prefill_legs_total;result=ok" "Prefill legs answered with 200",
    PrefillRefused Counter "pd_prefill_legs_total;result=unreachable" "Prefill legs that reached no endpoint or were reset",
    PrefillTimedOut Counter "pd_prefill_legs_total;result=timeout" "Prefill legs that took longer than their limit",
    PrefillNotSent Counter "pd_prefill_legs_total;result=not_sent" "Prefill legs that Envoy did not send: a full circuit breaker, no healthy host, no such cluster, or too many headers",
    PrefillServerError Counter "pd_prefill_legs_total;result=server_error" "Prefill legs answered with 5xx or 429",
    PrefillClientError Counter "pd_prefill_legs_total;result=client_error" "Prefill legs answered with another status. The filter asks another endpoint once, and passes on to the client what both refuse",
    PrefillRetries Counter "pd_prefill_retries_total" "Prefill legs that the filter ran again on another endpoint",
    RetriesDenied Counter "pd_prefill_retries_denied_total" "Prefill legs that the filter did not run again because the retry budget was spent: one for every five first tries",
    PrefillGivenUp Counter "pd_prefill_given_up_total" "Requests whose prefill failed on every endpoint tried",
    PrefillMs Histogram "pd_prefill_ms" "Milliseconds from the first prefill leg to the decode leg",
    KvMissing Counter "pd_kv_missing_total" "Prefill answers with KV parameters that are missing, unusable or too large to insert: the decode endpoint computed the prompt again",
    KvNotMoved Counter "pd_kv_not_moved_total" "Split requests whose answer shows that the decode endpoint had less than half of the prompt: it computed the prompt again",
    LateRefused Counter "pd_late_answers_total;result=refused" "Split requests whose answer began later than its KV lease, and may be wrong: the client got an error",
    LatePassed Counter "pd_late_answers_total;result=passed" "Answers that ended later than their KV lease and that the client got, because the prefill server let no KV lease expire in the meantime",
    KvStranded Counter "pd_kv_stranded_total;reason=client_left" "Requests whose client left between the legs: the prefill server keeps the KV blocks until its own time limit",
    KvStrandedRefused Counter "pd_kv_stranded_total;reason=refused" "Split requests that the decode server answered with 4xx: the prefill server keeps the KV blocks until its own time limit",
    KvStrandedNoPartner Counter "pd_kv_stranded_total;reason=no_partner" "Split requests for which no decode endpoint was left that could take over: the prefill server keeps the KV blocks until its own time limit",
    DecodeMoved Counter "pd_decode_moved_total" "Requests that Envoy's retry moved to an alternate decode endpoint",
    DecodeUnanswered Counter "pd_decode_unanswered_total" "Requests that no decode endpoint answered: every attempt at one was refused, reset or timed out while it connected, or the last one was silent while its peers answered",
    AnsweredByEnvoy Counter "pd_answered_by_envoy_total" "Requests that Envoy answered itself behind the filter, for a reason that is no endpoint's: a rate limit, an authorisation, a full circuit breaker, no healthy host, a time limit",
    AnsweredByOther Counter "pd_answered_by_other_total" "Requests answered by an endpoint that the filter did not name, because Envoy's cluster lacks the endpoints that the filter named",
    OutliersServer Counter "pd_outliers_total;reason=server_error" "Endpoints ejected because they answered 5xx and the other endpoints of their pool and role did not",
    OutliersOverload Counter "pd_outliers_total;reason=overload" "Endpoints ejected because they answered 429 or 503 and the other endpoints of their pool and role did not",
    OutliersRefusal Counter "pd_outliers_total;reason=refusal" "Endpoints ejected because they answered 4xx: a prefill endpoint to requests that other endpoints accepted, or a decode endpoint to all requests while its peers did not",
    OutliersHandover Counter "pd_outliers_total;reason=handover" "Prefill endpoints ejected because decode endpoints answered 5xx to prompts that they computed, and served whole requests",
    CachesForgotten Counter "pd_caches_forgotten_total" "Times that the filter forgot what an endpoint holds, because Envoy could not connect to the endpoint or went on to another one, or because its answers showed that most of the expected tokens were not cached",
    BelievedTokensMissing Counter "pd_believed_tokens_missing_total" "Prompt tokens that the index held at an endpoint and that were not cached there, by the endpoint's answer",
    PrefillInFlight Gauge "pd_prefill_in_flight" "Prefill legs in flight",
    DecodeInFlight Gauge "pd_decode_in_flight" "Requests in flight at decode endpoints",
    DecodeTokensInFlight Gauge "pd_decode_tokens_in_flight" "KV tokens assigned to decode endpoints",
    HeadersStripped Counter "pd_headers_stripped_total" "Request headers that the filter removed because clients may not set them",
    HintsIgnored Counter "pd_hints_ignored_total" "Trusted headers that named an endpoint outside of the list",
    Polls200 Counter "pd_polls_total;result=changed" "Polls that pd-control answered with a snapshot",
    Polls304 Counter "pd_polls_total;result=unchanged" "Polls that pd-control answered with 304",
    PollsFailed Counter "pd_polls_total;result=failed" "Polls without a usable answer",
    ExchangesOk Counter "pd_exchanges_total;result=ok" "Calls of the exchange that pd-control answered",
    ExchangesFailed Counter "pd_exchanges_total;result=failed" "Calls of the exchange without a usable answer",
    SnapshotsApplied Counter "pd_snapshots_total;result=applied" "Snapshots that a worker applied",
    SnapshotsRefused Counter "pd_snapshots_total;result=refused" "Snapshots that a worker refused as malformed or empty; the last good list stays in force",
    ConfigAccepted Counter "pd_configs_total;result=accepted" "Plugin configurations that a worker accepted",
    ConfigRefused Counter "pd_configs_total;result=refused" "Plugin configurations that a worker refused; the last good one stays in force",
    HostErrors Counter "pd_host_errors_total" "Host calls that Envoy refused although the filter does not expect a refusal",
}

/// Gauges that a worker sets to a value. Every worker has the same value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// Endpoints in the list.
    Endpoints,
    /// Version of the list, within its epoch.
    ListVersion,
    /// Milliseconds since `pd-control` last answered; grows while it is away and the last good list serves.
    ListAgeMs,
}

impl Level {
    /// All of them, in the order of their numbers.
    pub const ALL: &[Self] = &[Self::Endpoints, Self::ListVersion, Self::ListAgeMs];

    /// Name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Endpoints => "pd_endpoints",
            Self::ListVersion => "pd_list_version",
            Self::ListAgeMs => "pd_list_age_ms",
        }
    }

    /// One line for an operator.
    #[must_use]
    pub const fn help(self) -> &'static str {
        match self {
            Self::Endpoints => "Endpoints in the list in force",
            Self::ListVersion => "Version of the list in force",
            Self::ListAgeMs => "Milliseconds since pd-control last answered; the last good list serves meanwhile",
        }
    }
}

/// Name of the gauge of the prefix index's bytes.
pub const INDEX_BYTES: &str = "pd_index_bytes";
/// Names of the gauges of a pool's [fitted cost](crate::endpoints::fitted_cost::FittedCost::gauges), each with a `pool`
/// label.
pub const FITTED_GAUGES: [&str; 4] =
    ["pd_prefill_cost_a_us", "pd_prefill_cost_b_ns", "pd_prefill_cost_c_fs", "pd_bytes_per_token_milli"];

/// Names of the gauges of a pool's waiting requests, each with a `pool` label.
pub const WAITING_GAUGES: [&str; 2] = ["pd_waiting_requests", "pd_waiting_work_ms"];

/// Name of the histogram of the time that requests of a pool waited, with a `pool` label.
pub const WAIT_BY_POOL: &str = "pd_wait_ms";

/// A pool's name as the value of a tag: it may have characters that Envoy or the syntax of tags does not take.
#[must_use]
pub fn tag_value(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '_' }).collect()
}

/// A metric whose name or labels are made at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// Name, without tags.
    pub name: &'static str,
    /// Kind.
    pub kind: MetricKind,
    /// Labels.
    pub labels: &'static [&'static str],
    /// One line for an operator.
    pub help: &'static str,
}

/// Every metric beside [`Metric`] and [`Level`].
pub const FAMILIES: &[Family] = &[
    Family {
        name: "pd_announced_total",
        kind: MetricKind::Counter,
        labels: &[],
        help: "Endpoint lists and new workers that the workers of this Envoy announced to each other",
    },
    Family {
        name: "pd_log_position",
        kind: MetricKind::Gauge,
        labels: &["seat"],
        help: "Position in the log of the worker in that slot; the other workers read the log up to there before they decide",
    },
    Family {
        name: INDEX_BYTES,
        kind: MetricKind::Gauge,
        labels: &[],
        help: "Bytes of the prefix index of the worker that reported last; near `prefix.index_bytes` the index forgets blocks that endpoints still hold",
    },
    Family {
        name: FITTED_GAUGES[0],
        kind: MetricKind::Gauge,
        labels: &["pool"],
        help: "Fitted prefill cost: a, microseconds per request",
    },
    Family {
        name: FITTED_GAUGES[1],
        kind: MetricKind::Gauge,
        labels: &["pool"],
        help: "Fitted prefill cost: b, nanoseconds per uncached token",
    },
    Family {
        name: FITTED_GAUGES[2],
        kind: MetricKind::Gauge,
        labels: &["pool"],
        help: "Fitted prefill cost: c, femtoseconds per token²",
    },
    Family {
        name: FITTED_GAUGES[3],
        kind: MetricKind::Gauge,
        labels: &["pool"],
        help: "Bytes of JSON per 1,000 prompt tokens, fitted to the `usage` of prefill answers",
    },
    Family {
        name: WAIT_BY_POOL,
        kind: MetricKind::Histogram,
        labels: &["pool"],
        help: "Milliseconds that requests of the pool waited for a prefill endpoint with room. Requests that did not wait are not in it",
    },
    Family {
        name: WAITING_GAUGES[0],
        kind: MetricKind::Gauge,
        labels: &["pool"],
        help: "Requests that wait in this Envoy for a prefill endpoint with room, all workers together",
    },
    Family {
        name: WAITING_GAUGES[1],
        kind: MetricKind::Gauge,
        labels: &["pool"],
        help: "Milliseconds of prefill work of the waiting requests, each at the endpoint that holds most of its prompt",
    },
    Family {
        name: "pd_build_seen_seconds",
        kind: MetricKind::Gauge,
        labels: &["version", "build", "wire"],
        help: "Unix time at which a worker of that build last ticked: the builds whose value still moves are those that run",
    },
];

/// Counts that wait for the next flush.
#[derive(Debug)]
pub struct Counts {
    deltas: Vec<i64>,
    samples: Vec<(Metric, u64)>,
}

/// Histogram samples kept between two flushes; more are dropped, the distribution hardly changes.
const MAX_SAMPLES: usize = 1_024;

impl Default for Counts {
    fn default() -> Self {
        Self { deltas: vec![0; Metric::ALL.len()], samples: Vec::new() }
    }
}

impl Counts {
    /// Adds to a counter or gauge. The sum stays at its largest value instead of wrapping.
    pub fn add(&mut self, metric: Metric, delta: i64) {
        if let Some(sum) = self.deltas.get_mut(metric as usize) {
            *sum = sum.saturating_add(delta);
        }
    }

    /// Counts one.
    pub fn count(&mut self, metric: Metric) {
        self.add(metric, 1);
    }

    /// Records a value of a histogram. Values after the first 1,024 between two flushes are dropped.
    pub fn record(&mut self, metric: Metric, value: u64) {
        if self.samples.len() < MAX_SAMPLES {
            self.samples.push((metric, value));
        }
    }

    /// What waits for one counter or gauge.
    #[must_use]
    pub fn pending(&self, metric: Metric) -> i64 {
        self.deltas.get(metric as usize).copied().unwrap_or(0)
    }

    /// Hands out and forgets everything that waits; for histograms the number is the value.
    pub fn flush(&mut self, mut emit: impl FnMut(Metric, i64)) {
        for (metric, delta) in Metric::ALL.iter().zip(&mut self.deltas) {
            if *delta != 0 {
                emit(*metric, core::mem::take(delta));
            }
        }
        for (metric, value) in self.samples.drain(..) {
            emit(metric, i64::try_from(value).unwrap_or(i64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_kinds_agree_with_them() {
        let mut names: Vec<_> = Metric::ALL.iter().map(|metric| metric.name()).collect();
        for metric in Metric::ALL {
            let counts = metric.name().split(';').next().is_some_and(|name| name.ends_with("_total"));
            assert_eq!(counts, metric.kind() == MetricKind::Counter, "{}", metric.name());
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Metric::ALL.len());
    }

    #[test]
    fn a_flush_empties_the_counts() {
        let mut counts = Counts::default();
        counts.count(Metric::PrefillOk);
        counts.add(Metric::DecodeInFlight, -2);
        counts.record(Metric::PrefillMs, 7);
        let mut seen = Vec::new();
        counts.flush(|metric, delta| seen.push((metric, delta)));
        assert_eq!(seen, [(Metric::PrefillOk, 1), (Metric::DecodeInFlight, -2), (Metric::PrefillMs, 7)]);
        counts.flush(|_, _| panic!("nothing is left"));
    }
}
