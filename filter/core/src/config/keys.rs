//! Every key of the plugin configuration and of an endpoint: default, allowed values, meaning.
//!
//! [`Config::parse`](super::Config::parse) checks numbers against this table, and the tables of `docs/configuration.md`
//! are generated from it. In a path, `NAME` stands for any name: `pools.NAME.alternates`.

/// Values that a key may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Values {
    /// Numbers from `low` to `high`, both included.
    Between {
        /// Lowest value.
        low: f64,
        /// Highest value.
        high: f64,
        /// Unit; empty: none.
        unit: &'static str,
    },
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// Values that the table does not list. The text says which ones, for people.
    Described(&'static str),
}

impl Values {
    /// Numbers from `low` to `high`.
    #[must_use]
    pub const fn between(low: f64, high: f64, unit: &'static str) -> Self {
        Self::Between { low, high, unit }
    }

    /// Whether a number is allowed. Values other than [`Between`](Self::Between) allow every number.
    #[must_use]
    pub fn allows(&self, value: f64) -> bool {
        match self {
            Self::Between { low, high, .. } => (*low..=*high).contains(&value),
            Self::OneOf(_) | Self::Described(_) => true,
        }
    }
}

/// Default of a key that must be given.
pub const REQUIRED: &str = "required";

macro_rules! keys {
    ($($variant:ident $path:literal $default:expr, $values:expr, $meaning:literal)*) => {
        /// A key of the plugin configuration.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Key {
            $(#[doc = $meaning] $variant,)*
        }

        impl Key {
            /// All keys, in the order of the documentation.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Path in the configuration, `NAME` for any name.
            #[must_use]
            pub const fn path(self) -> &'static str {
                match self { $(Self::$variant => $path,)* }
            }

            /// Default as a JSON value, or [`REQUIRED`].
            #[must_use]
            pub const fn default_value(self) -> &'static str {
                match self { $(Self::$variant => $default,)* }
            }

            /// Allowed values.
            #[must_use]
            pub const fn values(self) -> Values {
                match self { $(Self::$variant => $values,)* }
            }

            /// Meaning, in Markdown.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }
        }
    };
}

const BOOLEAN: Values = Values::OneOf(&["true", "false"]);
const NAME: Values = Values::Described("1 to 512 visible ASCII characters");
const OBJECT: Values = Values::Described("object");

keys! {
    Revision "revision" r#""""#, Values::Described("text"),
        "Configuration revision: text that an operator changes with each roll-out. The filter's log and pd-control's status page show it."
    Cluster "cluster" r#""engines""#, NAME,
        "Envoy cluster of the prefill leg. One cluster over all engine servers usually carries both legs."
    BootstrapCluster "bootstrap_cluster" "null", NAME,
        "Envoy cluster of the prefill servers' bootstrap ports. The filter asks Mooncake's bootstrap servers for engine ids there. `null`: the value of `cluster`."
    DestinationHeader "destination_header" r#""x-pd-destination""#, Values::Described("header name in lower case, 1 to 128 characters"),
        "Request header that carries the chosen endpoint. The route fills it from filter state, and the cluster's `override_host` policy reads it."
    Control "control" "null", OBJECT,
        "How the filter reaches pd-control. `null`: the filter chooses among the endpoints of `endpoints` only."
    ControlCluster "control.cluster" REQUIRED, NAME,
        "Envoy cluster of pd-control."
    ControlAuthority "control.authority" r#""pd-control""#, NAME,
        "`:authority` of the filter's requests to pd-control."
    ControlWaitMs "control.wait_ms" "30000", Values::between(100.0, 600_000.0, "ms"),
        "How long pd-control may hold a poll. pd-control itself ends a poll after 60,000 ms."
    ControlTokenEnv "control.token_env" r#""PD_CONTROL_TOKEN""#, Values::Described("name"),
        "Environment variable of the Envoy process that holds the bearer token. Envoy must pass the variable to the filter (`host_env_keys`). Not set: the filter sends no token."
    ControlExchange "control.exchange" "true", BOOLEAN,
        "Whether this Envoy exchanges with the other Envoys, through pd-control, what is in flight and which endpoint got which prompt blocks."
    Endpoints "endpoints" "[]", Values::Described("list of [endpoints](#endpoints)"),
        "Endpoints that serve until pd-control has answered, or for good where `control` is `null`."
    TrustedHeaders "trusted_headers" "[]", Values::Described("list of `x-pd-phase`, `x-prefiller-host-port`, `x-pd-explain`, `x-gateway-destination-endpoint-subset`, `test-epp-endpoint-selection`"),
        "Headers that a client may set. The filter strips each of these headers that the list does not name."
    AllowedPaths "allowed_paths" "[]", Values::Described("list of paths without a query; a path that ends in `/*` stands for all paths below it"),
        "Paths that a client may reach beside [those of inference APIs](#paths). Requests to other paths get 404, because engines serve their administration on the same port."
    PathPrefixes "path_prefixes" "[]", Values::Described("list of paths such as `/team`, without a slash at the end"),
        "Prefixes that the gateway's routes take away from a path after the filter has seen it. The filter reads `/team/v1/chat/completions` as `/v1/chat/completions`, and its prefill leg has the path without the prefix."
    LegsHeaders "legs.headers" "[]", Values::Described("list of [headers of legs](#legs)"),
        "Headers of prefill legs, in place of those that the client sent under the same names."
    LegsAuthority "legs.authority" "null", NAME,
        "`:authority` of prefill legs. `null`: the client's."
    LegsPathPrefix "legs.path_prefix" r#""""#, Values::Described("path such as `/llm`, without a slash at the end"),
        "What stands before the path of a prefill leg. By default the leg has the path at which engines serve the request's API, such as `/v1/chat/completions`."
    Upgrades "upgrades" "false", BOOLEAN,
        "Whether requests that ask for another protocol, such as the WebSockets of `/v1/realtime`, go to an endpoint of the model that their query names. [Envoy must be set up for it](#upgrades-and-compressed-bodies). `false`: they get 501."
    SessionHeaders "session_headers" r#"["x-session-id", "x-claude-code-session-id", "x-session-affinity", "session-id", "session_id", "x-opencode-session", "agent-session-id", "x-kilocode-taskid", "x-client-session-id", "x-amp-thread-id", "x-coder-chat-id", "x-task-id", "x-roo-task-id", "x-openwebui-chat-id", "x-litellm-session-id", "x-litellm-trace-id", "x-interaction-id"]"#, Values::Described("list of header names in lower case"),
        "Headers that name a client's session. The first header that the request has counts. The filter sends a session's requests, split or whole, to the endpoint that served the session last, until too much work waits at that endpoint. The defaults are the [headers of well-known clients](headers-and-access-log.md#sessions-of-well-known-clients). Envoy must let names with `_` through (`headers_with_underscores_action`)."
    SessionCookies "session_cookies" "[]", Values::Described("list of cookie names"),
        "Cookies that name a client's session where no header of `session_headers` does. The first cookie that the request has counts. The filter sets no cookie."
    MaxBodyBytes "max_body_bytes" "16777216", Values::between(1_024.0, 1_073_741_824.0, "bytes"),
        "Largest request body, inserted KV parameters included. Larger requests get 413. The buffer filter's `max_request_bytes` must be at least as large."
    Objectives "objectives" "[]", Values::Described("list of `{\"name\": text, \"priority\": integer}`"),
        "Priority of each name that `x-llm-d-inference-objective` may carry. A request with a priority below 0 is sheddable. A name that is not in the list and is a number is its own priority; any other name has priority 0."
    Models "models" "{}", OBJECT,
        "Model names that stand for other models: aliases and canaries."
    ModelsTargets "models.NAME.targets" REQUIRED, Values::Described("list of `{\"model\": text, \"weight\": integer}`"),
        "Models that serve the alias. The filter chooses by weight (1 unless given) among the targets that some endpoint serves, and gives all requests of one session the same target. The filter writes the target's name into the `model` of both legs' bodies. At least one target must have a weight above 0."
    ModelsAnswer "models.NAME.answer" r#""served""#, Values::OneOf(&["served", "asked"]),
        "Model name in the answer. `served`: the target's. `asked`: the alias; the filter then reads every part of the answer and replaces the target's name in each `model` member."
    PrefixBlockBytes "prefix.block_bytes" "512", Values::between(64.0, 65_536.0, "bytes"),
        "Size of the first 32 blocks of a prompt. The next 32 blocks are twice as large, all later ones four times. Smaller blocks find shorter common prefixes and cost more time per request. All Envoys of a fleet need the same value."
    PrefixIndexBytes "prefix.index_bytes" "268435456", Values::between(65_536.0, 536_870_912.0, "bytes"),
        "Bound of the prefix index of one worker. The index needs about 220 bytes for every 350 tokens of all endpoints' prefix caches together, and takes memory as the caches fill. The default is enough for 50 caches of 8 million tokens."
    PrefixHotShare "prefix.hot_share" "0.02", Values::between(0.0, 1.0, ""),
        "A block that occurs in more than this share of recent requests, such as a common system prompt, does not decide which endpoint gets a prompt."
    Pools "pools" "{}", OBJECT,
        "Policies by pool name. A pool that the configuration does not name has the policy of the pool `default`."
    PoolsEngine "pools.NAME.engine" r#""vllm-nixl""#, Values::OneOf(&["vllm-nixl", "vllm-shared", "sglang", "trtllm", "mooncake", "neuron", "sidecar"]),
        "[Engine](engines.md) of endpoints that do not name their own."
    PoolsSplitMode "pools.NAME.split.mode" r#""threshold""#, Values::OneOf(&["threshold", "cost", "always", "never"]),
        "When the filter runs a prefill leg. `threshold`: when the best decode endpoint lacks at least `uncached_tokens` of the prompt. `cost`: when the request and those beside it wait less than if a decode endpoint computes the prompt, see [split by cost](architecture.md#split-by-cost). `always` and `never` do not look at the prompt. `never` has no effect where no endpoint of the pool can serve a request whole."
    PoolsSplitUncachedTokens "pools.NAME.split.uncached_tokens" "256", Values::Described("tokens"),
        "Threshold of the mode `threshold`. The other modes ignore it."
    PoolsOnPrefillFailure "pools.NAME.on_prefill_failure" r#""decode_only""#, Values::OneOf(&["decode_only", "fail"]),
        "What follows when every prefill leg failed, and for a prompt that is to be split when no prefill endpoint is ready. `decode_only`: a decode endpoint computes the prompt. `fail`: the client gets 503."
    PoolsPrefillAttempts "pools.NAME.prefill_attempts" "2", Values::between(1.0, 8.0, "prefill endpoints"),
        "How many prefill endpoints the filter tries for one request."
    PoolsPrefillTimeoutMs "pools.NAME.prefill_timeout_ms" "60000", Values::between(1.0, 3_600_000.0, "ms"),
        "Time limit of one prefill leg, where `prefill_timeout_factor` does not give a longer one."
    PoolsPrefillTimeoutFactor "pools.NAME.prefill_timeout_factor" "4.0", Values::between(1.0, 1_000.0, ""),
        "Factor on the time that the filter expects for the work ahead of a prefill leg and for its own prompt. The leg may take the product, if that is longer than `prefill_timeout_ms`; an hour at most."
    PoolsBootstrapPort "pools.NAME.bootstrap_port" "8998", Values::between(1.0, 65_535.0, ""),
        "Port of a prefill server's bootstrap server (SGLang, Mooncake) where the endpoint does not give one."
    PoolsAlternates "pools.NAME.alternates" "2", Values::between(0.0, 4.0, "endpoints"),
        "How many endpoints the filter names beside the chosen one. Envoy's retry on a failed connection goes to them."
    PoolsMaxRequests "pools.NAME.max_requests" "0", Values::Described("requests; 0: no limit"),
        "Limit of requests in flight at this Envoy, all workers together. Above it requests get 429. From 80 % of the limit on, sheddable requests and requests beyond a fair share get 429."
    PoolsMaxTokens "pools.NAME.max_tokens" "0", Values::Described("tokens; 0: no limit"),
        "Limit of KV tokens in flight at this Envoy, all workers together: prompts and expected output. Above it requests get 429, and from 80 % of it on, as for `max_requests`. A pool with nothing in flight takes any request."
    PoolsQueueEnabled "pools.NAME.queue.enabled" "false", BOOLEAN,
        "Whether requests that are to be split wait in the gateway until a prefill endpoint has room, and go to an endpoint only then. Requests for engines that want both legs at once (SGLang, Mooncake) do not wait."
    PoolsQueueLeadMs "pools.NAME.queue.lead_ms" "20", Values::between(1.0, 60_000.0, "ms"),
        "A prefill endpoint has room while the work that it has left takes less than this. A larger value binds requests earlier than needed. A smaller value leaves an endpoint idle for as long as a request takes to reach it."
    PoolsQueueBatchTokens "pools.NAME.queue.batch_tokens" "8192", Values::between(0.0, 1_048_576.0, "tokens"),
        "Tokens that an engine computes together. While an endpoint computes what it has begun for less than `lead_ms` more, it has room for prompts that it will begin together, as long as they take no longer than a prompt of so many new tokens. 8,192 is vLLM's `max_num_batched_tokens` of an API server on a GPU of 70 GiB or more; on smaller GPUs that is 2,048. `0`: engines compute one prompt after another."
    PoolsQueueMaxWaitMs "pools.NAME.queue.max_wait_ms" "600000", Values::between(1.0, 3_600_000.0, "ms"),
        "Longest wait of a request. A request that has waited so long gets 503 with the reason `queue_timeout`."
    PoolsQueueOvertakenMs "pools.NAME.queue.overtaken_ms" "300000", Values::between(0.0, 3_600_000.0, "ms"),
        "How long other requests of the same priority can overtake a waiting request. After this time, the request that has waited longest goes first."
    PoolsQueueMaxRequests "pools.NAME.queue.max_requests" "8192", Values::between(1.0, 1_000_000.0, "requests"),
        "Most requests that wait at this Envoy, all workers together. Above it requests get 429 with the reason `queue_requests`."
    PoolsQueueMaxBytes "pools.NAME.queue.max_bytes" "536870912", Values::between(1_024.0, 1_099_511_627_776.0, "bytes"),
        "Most bytes that the bodies of waiting requests and the filter's 1,024 bytes for each take at this Envoy. Above it requests get 429 with the reason `queue_bytes`."
    PoolsQueueDecodeKvPercent "pools.NAME.queue.decode_kv_percent" "100", Values::between(0.0, 1_000.0, "%"),
        "Percent of the KV cache of each decode endpoint up to which requests go on. While no decode endpoint has room for a request, the request waits before its prefill leg. The cache's size is `cache_tokens` of the endpoint, which pd-control reads from engines; a decode endpoint without a size has room. The filter counts all tokens of each request. Where many running requests share a prefix, more than 100 % fit. 0: requests do not wait for decode endpoints."
    PoolsQueueNoEndpointMs "pools.NAME.queue.no_endpoint_ms" "0", Values::between(0.0, 3_600_000.0, "ms"),
        "How long a request waits in the gateway when no endpoint is ready that could serve it, as after scaling to zero. 0: it gets 503 at once. The filter reads this key of the pool `default`, with its `max_requests` and `max_bytes`, because a model without endpoints belongs to no pool. The key works without `enabled`. A model that neither an endpoint nor an alias names gets 404."
    PoolsCostA "pools.NAME.cost.a_ms" "15.0", Values::between(0.0, 60_000.0, "ms"),
        "Constant of the prefill cost. A prompt of *n* tokens of which *p* are cached takes a + b·(n − p) + c·(n² − p²). The defaults fit an 8-billion-parameter model on one H100."
    PoolsCostB "pools.NAME.cost.b_us" "25.0", Values::between(0.0, 1e6, "µs per token"),
        "Prefill cost of an uncached token: b of the formula."
    PoolsCostC "pools.NAME.cost.c_ns" "0.524", Values::between(0.0, 1e6, "ns per token²"),
        "Prefill cost of attention: c of the formula."
    PoolsFit "pools.NAME.fit" "true", BOOLEAN,
        "Whether the filter adapts `cost` (by a factor of at most 10) and `bytes_per_token` (of at most 4) to the times and token counts of its prefill legs."
    PoolsAffinityWeight "pools.NAME.affinity_weight" "null", Values::between(0.0, 100.0, ""),
        "Weight of a second of the prompt's own prefill against a second of waiting work: w in W + w·S. A larger value keeps prompts on the endpoint that holds their prefix for longer. `null`: the weight follows the load: 1 + the number of prompts in flight at the endpoint + the mean of that number over the endpoints."
    PoolsRendezvousShare "pools.NAME.rendezvous_share" "null", Values::between(0.0, 1.0, ""),
        "Share of an unseen prompt that the filter assumes cached at the prompt's rendezvous endpoint, because another Envoy may have sent the prompt to that endpoint. `null`: 0.6 times the share of the other Envoys that do not exchange, so 0 while all Envoys exchange."
    PoolsDecodeStay "pools.NAME.decode_stay" "10.0", Values::between(0.0, 100.0, ""),
        "A conversation keeps the decode endpoint that served its session last, or that holds half of its prompt, while that endpoint has at most this many times the prompt's tokens more assigned than the least loaded one. The KV cache of the conversation then moves once and not with each request. 0: each request goes to the cheapest endpoint by assigned tokens and tokens to move."
    PoolsCacheTokens "pools.NAME.cache_tokens" "500000", Values::between(0.0, 1e9, "tokens"),
        "Size of an endpoint's prefix cache where neither the endpoint nor its engine gives one."
    PoolsBytesPerToken "pools.NAME.bytes_per_token" "4.0", Values::between(0.5, 64.0, "bytes"),
        "Bytes of JSON per prompt token, for estimates of prompt lengths."
    PoolsMediaPixelsPerToken "pools.NAME.media.pixels_per_token" "784.0", Values::between(1.0, 1e6, "pixels"),
        "Pixels per token of an image whose data has its size (PNG, JPEG, GIF, WebP). The filter counts media in prompts by themselves, not as text, and adapts these estimates with `fit` by a factor of at most 16."
    PoolsMediaImageTokens "pools.NAME.media.image_tokens" "1024.0", Values::between(1.0, 1e6, "tokens"),
        "Tokens of an image whose data does not have its size: an image at an address, or in a format other than PNG, JPEG, GIF and WebP."
    PoolsMediaAudioTokens "pools.NAME.media.audio_tokens" "768.0", Values::between(1.0, 1e6, "tokens"),
        "Tokens of a sound."
    PoolsMediaVideoTokens "pools.NAME.media.video_tokens" "4096.0", Values::between(1.0, 1e6, "tokens"),
        "Tokens of a video."
    PoolsMediaFileTokens "pools.NAME.media.file_tokens" "2048.0", Values::between(1.0, 1e6, "tokens"),
        "Tokens of a document."
    PoolsCachedTokens "pools.NAME.cached_tokens" r#""prefill""#, Values::OneOf(&["prefill", "decode"]),
        "Which server's `cached_tokens` the answer of a split request carries. `prefill`: the tokens that the prefill server found in its cache; the filter then reads each part of an answer that carries its usage. `decode`: the decode server's count, which includes the tokens it fetched."
    PoolsKvLeaseMs "pools.NAME.kv_lease_ms" "30000", Values::between(0.0, 86_400_000.0, "ms"),
        "How long vLLM's prefill servers keep a KV cache for its decode leg: `kv_lease_duration` of their `kv_connector_extra_config`, or `VLLM_NIXL_ABORT_REQUEST_TIMEOUT` of versions without it. A split request whose first token comes later gets an error with the reason `kv_lease_over`, because its text may be wrong. 0: the filter passes such answers on."
}

/// A key of an object: of an endpoint, or of a file of pd-control.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry {
    /// Key.
    pub key: &'static str,
    /// Default as a JSON value, or [`REQUIRED`]; `null`: the key is absent.
    pub default_value: &'static str,
    /// Allowed values.
    pub values: Values,
    /// Meaning, in Markdown.
    pub meaning: &'static str,
}

/// Every key of an endpoint, in the order of [`ENDPOINT_KEYS`](crate::wire::ENDPOINT_KEYS). They stand in pd-control's
/// file, in `--endpoint` and in `endpoints` of the plugin configuration.
pub const ENDPOINT: &[Entry] = &[
    Entry {
        key: "address",
        default_value: REQUIRED,
        values: Values::Described("`ip:port`"),
        meaning: "Address of the server, as Envoy's cluster has it. `--endpoint` takes `host:port` too.",
    },
    Entry {
        key: "rank",
        default_value: "null",
        values: Values::between(0.0, 4_294_967_295.0, ""),
        meaning: "Data-parallel rank behind the address. Each leg to the endpoint carries it as `x-data-parallel-rank`. `null`: the filter sends no rank.",
    },
    Entry {
        key: "role",
        default_value: REQUIRED,
        values: Values::OneOf(&["prefill", "decode", "both"]),
        meaning: "Work that the endpoint takes. `both`: an aggregated server, which serves whole requests and no single legs.",
    },
    Entry {
        key: "pool",
        default_value: "\"default\"",
        values: Values::Described("1 to 256 bytes"),
        meaning: "Pool whose policy applies.",
    },
    Entry {
        key: "models",
        default_value: "[]",
        values: Values::Described("up to 1,024 names of 1 to 256 bytes"),
        meaning: "Models and adapters that the endpoint serves. pd-control adds those that the engine reports. If both name none, the filter leaves the endpoint out while a ready endpoint of its pool that does the same work (prefill, or decode and both) names its models. Without such an endpoint, this one serves every model of its pool, and models that no endpoint names.",
    },
    Entry {
        key: "models_closed",
        default_value: "false",
        values: BOOLEAN,
        meaning: "Whether `models` is complete. `true`: pd-control adds no model that the engine reports, and an endpoint with `[]` serves every model of its pool whatever others name.",
    },
    Entry {
        key: "engine",
        default_value: "null",
        values: Values::OneOf(&["vllm-nixl", "vllm-shared", "sglang", "trtllm", "mooncake", "neuron", "sidecar"]),
        meaning: "[Engine](engines.md). A prefill and a decode endpoint are a pair only if they have the same engine. `null`: the pool's.",
    },
    Entry {
        key: "group",
        default_value: "null",
        values: Values::Described("1 to 256 bytes"),
        meaning: "Pairing group. Prefill endpoints of a group hand over to decode endpoints of the same group only. `null`: any group.",
    },
    Entry {
        key: "revision",
        default_value: "null",
        values: Values::Described("1 to 256 bytes"),
        meaning: "Revision of model and engine. A prefill and a decode endpoint are a pair only if they have the same revision; endpoints without one pair with each other only. While there are several, [load follows what each can take](architecture.md#revisions).",
    },
    Entry {
        key: "weight",
        default_value: "1",
        values: Values::between(0.01, 100.0, ""),
        meaning: "Speed of the endpoint relative to the others of its pool.",
    },
    Entry {
        key: "cache_tokens",
        default_value: "null",
        values: Values::Described("tokens"),
        meaning: "Tokens that the endpoint's prefix cache holds, CPU tier included. `null`: the figure of its engine where pd-control reads it, else the pool's.",
    },
    Entry {
        key: "bootstrap_port",
        default_value: "null",
        values: Values::between(1.0, 65_535.0, ""),
        meaning: "Port of the endpoint's bootstrap server (SGLang, Mooncake). `null`: the pool's.",
    },
    Entry {
        key: "min_prompt_tokens",
        default_value: "null",
        values: Values::Described("tokens"),
        meaning: "Shorter prompts (estimated tokens) go to other endpoints while one of them takes such a length. The bound applies to each leg by itself. `null`: no bound.",
    },
    Entry {
        key: "max_prompt_tokens",
        default_value: "null",
        values: Values::Described("tokens, not below `min_prompt_tokens`"),
        meaning: "Longer prompts (estimated tokens) go to other endpoints while one of them takes such a length. The bound applies to each leg by itself. `null`: no bound.",
    },
    Entry {
        key: "state",
        default_value: "\"ready\"",
        values: Values::OneOf(&["ready", "draining", "down"]),
        meaning: "`ready`: gets requests. `draining`: ends the requests that it has and gets no new ones. `down`: gets no requests.",
    },
];

#[cfg(test)]
mod tests;
