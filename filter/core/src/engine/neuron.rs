//! AWS Neuron: the decode leg quotes the whole prefill answer.

use super::protocol::{
    CachedTokensOf, Handover, LegAnswer, LegOrder, Protocol, no_cached_tokens_in_params, no_members,
};
use crate::body::Api;

pub(super) static PROTOCOL: Protocol = Protocol {
    legs: LegOrder::Sequential,
    decodes_alone: true,
    hands_over_several: false,
    max_sequences: None,
    has_kv_lease: false,
    counts_fetched_tokens: true,
    limits_prefill: true,
    samples_first_token: false,
    allows_budget: false,
    engine_id: None,
    prefill_members: no_members,
    decode_members: no_members,
    handover,
    cached_tokens_in_params: no_cached_tokens_in_params,
};

fn handover(_: Api, leg: &LegAnswer<'_>, _: CachedTokensOf) -> Handover {
    match leg.answer.text() {
        text @ [b'{', ..] => Handover::insert([br#""disagg_prefill_resp":"#, text].concat()),
        _ => Handover::Missing,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{handover, insert};
    use super::*;
    use crate::engine::Engine;

    #[test]
    fn the_decode_leg_quotes_the_whole_prefill_answer() {
        assert_eq!(
            handover(Engine::Neuron, Api::Chat, " {\"id\":\"x\", \"n\":1e5}\n"),
            insert(r#""disagg_prefill_resp":{"id":"x", "n":1e5}"#)
        );
        for answer in ["", "null", "[1]", "{"] {
            assert_eq!(handover(Engine::Neuron, Api::Chat, answer), Handover::Missing);
        }
    }
}
