//! The facts of an engine: the order of its legs, the members of each leg, and how its prefill answers are read.

use core::cell::OnceCell;
use core::net::SocketAddr;

use crate::body::json::Object;
use crate::body::{Api, KeySet};

/// The facts of one engine.
#[derive(Debug)]
pub struct Protocol {
    /// In which order the legs go.
    pub legs: LegOrder,
    /// Whether a decode endpoint serves a request whole when no prefill endpoint has computed its prompt.
    pub decodes_alone: bool,
    /// Whether one hand-over serves several sequences: several prompts, or several answers. Where parameters name the
    /// blocks of one sequence, the second sequence that fetches them reads blocks that are gone.
    pub hands_over_several: bool,
    /// Most sequences of one request, where both legs name each of them; `None` where they do not.
    pub max_sequences: Option<u32>,
    /// Whether prefill endpoints keep a KV cache for a time only, and a decode endpoint that fetches it later answers wrong
    /// text.
    pub has_kv_lease: bool,
    /// Whether the cached tokens in a decode endpoint's answer include the tokens that it fetched. Then they show whether the
    /// endpoint computed the prompt itself.
    pub counts_fetched_tokens: bool,
    /// Whether the prefill leg must have a limit of one token. Otherwise the prefill server ends it by itself, and both legs
    /// must ask for the same sequences.
    pub limits_prefill: bool,
    /// Whether the decode endpoint samples the answer's first token itself. The prefill leg then needs no `logprobs`. With
    /// other engines the first token comes from the prefill endpoint.
    pub samples_first_token: bool,
    /// Whether a prefill leg may ask for a thinking budget above its limit of tokens.
    pub allows_budget: bool,
    /// How to ask for the engine's id, where the decode leg names it.
    pub engine_id: Option<EngineIdQuery>,
    /// Members to put in front of the prefill leg's body, without braces; may be empty.
    pub(crate) prefill_members: fn(&Pair<'_>) -> Vec<u8>,
    /// Members to put in front of the body of a decode leg that goes out with its prefill leg; may be empty.
    pub(crate) decode_members: fn(&Pair<'_>) -> Vec<u8>,
    /// Reads the answer of a prefill leg that the decode leg waited for.
    pub(crate) handover: fn(Api, &LegAnswer<'_>, CachedTokensOf) -> Handover,
    /// Reads the prefill endpoint's cached tokens from the parameters in its answer, for engines whose decode endpoint
    /// reports them as its own. `None` where the parameters lack them.
    pub(crate) cached_tokens_in_params: fn(&LegAnswer<'_>) -> Option<u64>,
}

/// The JSON answer of a prefill leg.
#[derive(Debug, Default)]
pub(crate) struct LegAnswer<'a> {
    /// The answer; without members where it is no valid JSON object.
    pub(crate) answer: Object<'a>,
    /// Its member `kv_transfer_params`, read at the first use.
    params: OnceCell<Option<Object<'a>>>,
}

impl<'a> LegAnswer<'a> {
    /// Reads an answer's body.
    pub(crate) fn read(body: &'a [u8]) -> Self {
        Self { answer: Object::read(body).unwrap_or_default(), params: OnceCell::new() }
    }

    /// The member `kv_transfer_params`, read once; `None` where there is none.
    pub(super) fn kv_transfer_params(&self) -> Option<&Object<'a>> {
        self.params.get_or_init(|| Object::read(self.answer.get("kv_transfer_params")?).ok()).as_ref()
    }
}

/// Whose cached tokens the decode endpoint is to report, where the parameters of the hand-over decide that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CachedTokensOf {
    /// The cached tokens of the prefill leg, if the parameters have them.
    Prefill,
    /// Its own, with the tokens that it fetched. They show whether the KV cache came.
    Decode,
}

/// In which order the legs go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LegOrder {
    /// The decode leg follows the prefill leg and carries parameters out of its answer.
    Sequential,
    /// Both go at once. They find each other by members that both carry.
    Concurrent,
    /// The filter sends the decode leg only; the decode endpoint runs the prefill leg.
    DecodeOnly,
}

/// How to ask a prefill endpoint's bootstrap server for the id of its engine.
#[derive(Debug)]
pub struct EngineIdQuery {
    /// Path of the `GET` request.
    pub path: &'static str,
    /// Finds the id of a data-parallel rank in the answer: a JSON string, quotes included. `None` where the answer names
    /// none.
    pub(crate) read: fn(&[u8], Option<u32>) -> Option<&[u8]>,
}

/// Values that the members of both legs may contain.
#[derive(Clone, Debug)]
pub struct Pair<'a> {
    /// The endpoint's bootstrap server.
    pub bootstrap: SocketAddr,
    /// The endpoint's data-parallel rank.
    pub rank: Option<u32>,
    /// The id of the endpoint's engine, where [`Protocol::engine_id`] asks for it: a JSON string. Empty elsewhere.
    pub engine_id: &'a [u8],
    /// Number of this pair of legs, from [`pair_id`].
    pub id: u64,
    /// Sequences, where the body asks for a batch of them.
    pub batch: Option<u32>,
}

/// Number of a pair of legs, made of evenly spread bits. It is at least 2^42, because TensorRT-LLM uses smaller numbers
/// itself. The [`Protocol::max_sequences`] numbers behind it are below 2^63, SGLang's bound.
#[must_use]
pub fn pair_id(bits: u64) -> u64 {
    const BITS: u64 = (1 << 62) - 1;
    const LEAST: u64 = 1 << 42;
    bits & BITS | LEAST
}

/// What a prefill answer says about the KV cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handover {
    /// The decode leg carries these parameters.
    Insert {
        /// Members to put in front of the body.
        members: Vec<u8>,
        /// Members of the client's body that they replace.
        drop: KeySet,
    },
    /// The engine needs no parameters: the decode endpoint finds the KV cache by itself.
    Nothing,
    /// The answer lacks the parameters that it should have, or they are unusable: the decode endpoint computes the prompt.
    Missing,
}

impl Handover {
    /// Parameters that replace no member of the client's body.
    pub(super) fn insert(members: Vec<u8>) -> Self {
        Self::Insert { members, drop: KeySet::EMPTY }
    }
}

/// For protocols whose legs carry no members of their own.
pub(super) fn no_members(_: &Pair<'_>) -> Vec<u8> {
    Vec::new()
}

/// For protocols whose decode leg needs no parameters.
pub(super) fn no_handover(_: Api, _: &LegAnswer<'_>, _: CachedTokensOf) -> Handover {
    Handover::Nothing
}

/// For protocols whose decode endpoint always reports its own cached tokens.
pub(super) fn no_cached_tokens_in_params(_: &LegAnswer<'_>) -> Option<u64> {
    None
}
