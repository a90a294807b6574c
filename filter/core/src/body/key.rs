//! Keys of the members that the filter knows.

use super::json::unescape;

/// Most known members of one body, duplicates included, and most nested members that are cut out of one; a body with more
/// of either is refused. With [`MAX_MEDIA`](super::json::MAX_MEDIA) it bounds a [`Scan`](super::Scan) to 80 kB. The
/// filter knows about sixty keys, and a client has no reason to repeat one.
pub const MAX_MEMBERS: usize = 1_024;

macro_rules! keys {
    ($($name:literal $key:ident,)*) => {
        /// Keys of the top-level members that the filter knows. All other members pass through unseen.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Key {
            $(#[doc = concat!("`", $name, "`")] $key,)*
        }

        impl Key {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$key,)*];

            /// The key's name, without quotes. No name needs an escape in JSON.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$key => $name,)*
                }
            }

            /// The key of a name without escapes; `None` for a name that the filter does not know.
            #[must_use]
            pub fn of_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$key),)*
                    _ => None,
                }
            }
        }
    };
}

keys! {
    "model" Model,
    // The prompt.
    "messages" Messages,
    "prompt" Prompt,
    "input" Input,
    "token_ids" TokenIds,
    "prompt_token_ids" PromptTokenIds,
    "system" System,
    "instructions" Instructions,
    "tools" Tools,
    "previous_response_id" PreviousResponseId,
    "background" Background,
    "store" Store,
    // The answer.
    "stream" Stream,
    "stream_options" StreamOptions,
    "max_tokens" MaxTokens,
    "max_completion_tokens" MaxCompletionTokens,
    "max_output_tokens" MaxOutputTokens,
    "min_tokens" MinTokens,
    "ignore_eos" IgnoreEos,
    "stop" Stop,
    "stop_token_ids" StopTokenIds,
    "stop_sequences" StopSequences,
    "n" N,
    "best_of" BestOf,
    "use_beam_search" UseBeamSearch,
    "echo" Echo,
    "logprobs" Logprobs,
    "top_logprobs" TopLogprobs,
    "logprob_token_ids" LogprobTokenIds,
    "prompt_logprobs" PromptLogprobs,
    "return_hidden_states" ReturnHiddenStates,
    "return_routed_experts" ReturnRoutedExperts,
    "temperature" Temperature,
    "truncate_prompt_tokens" TruncatePromptTokens,
    "truncation" Truncation,
    "thinking" Thinking,
    "seed" Seed,
    // `/inference/v1/generate` keeps its limits in here: scan and rewrite the value, then replace it.
    "sampling_params" SamplingParams,
    // The client, and the prefixes that its requests may share.
    "user" User,
    "priority" Priority,
    "cache_salt" CacheSalt,
    "prompt_cache_key" PromptCacheKey,
    "lora_path" LoraPath,
    // Hand-over protocols.
    "kv_transfer_params" KvTransferParams,
    "ec_transfer_params" EcTransferParams,
    "kv_hints" KvHints,
    "bootstrap_host" BootstrapHost,
    "bootstrap_port" BootstrapPort,
    "bootstrap_room" BootstrapRoom,
    "bootstrap_pair_key" BootstrapPairKey,
    "decode_tp_size" DecodeTpSize,
    "encoder_urls" EncoderUrls,
    "need_wait_for_mm_inputs" NeedWaitForMmInputs,
    "num_items_assigned" NumItemsAssigned,
    "http_worker_ipc" HttpWorkerIpc,
    "data_parallel_rank" DataParallelRank,
    "routed_dp_rank" RoutedDpRank,
    "disagg_prefill_dp_rank" DisaggPrefillDpRank,
    "disaggregated_params" DisaggregatedParams,
    "disagg_prefill_resp" DisaggPrefillResp,
    "prompt_token_ids_b64" PromptTokenIdsB64,
}

/// Bytes that the longest [`Key::name`] may have in a body: each character as `\u00xx`.
const MAX_KEY_BYTES: usize = 6 * 24;

impl Key {
    /// The key that stands between the quotes of a string, escapes seen through.
    pub(super) fn read(raw: &[u8]) -> Option<Self> {
        if raw.len() > MAX_KEY_BYTES {
            return None;
        }
        Self::of_name(&unescape(raw)?)
    }

    const fn bit(self) -> u128 {
        1_u128.wrapping_shl(self as u32)
    }
}

/// A set of [`Key`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeySet(u128);

impl KeySet {
    /// No key.
    pub const EMPTY: Self = Self(0);

    /// The set of some keys.
    #[must_use]
    pub const fn of(mut keys: &[Key]) -> Self {
        let mut set = 0;
        while let [key, rest @ ..] = keys {
            set |= key.bit();
            keys = rest;
        }
        Self(set)
    }

    /// The set with one more key.
    #[must_use]
    pub const fn with(self, key: Key) -> Self {
        Self(self.0 | key.bit())
    }

    /// The keys that are in either set.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The keys that are in both sets.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether the key is in the set.
    #[must_use]
    pub const fn contains(self, key: Key) -> bool {
        self.0 & key.bit() != 0
    }

    /// Whether the set has no key.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}
