//! llm-d's routing sidecar beside the decode endpoint: it runs the prefill leg at the endpoint that a header names.

use super::protocol::{LegOrder, Protocol, no_cached_tokens_in_params, no_handover, no_members};

pub(super) static PROTOCOL: Protocol = Protocol {
    legs: LegOrder::DecodeOnly,
    decodes_alone: true,
    hands_over_several: false,
    max_sequences: None,
    has_kv_lease: false,
    counts_fetched_tokens: true,
    limits_prefill: true,
    samples_first_token: false,
    allows_budget: true,
    engine_id: None,
    prefill_members: no_members,
    decode_members: no_members,
    handover: no_handover,
    cached_tokens_in_params: no_cached_tokens_in_params,
};
