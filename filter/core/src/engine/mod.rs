//! Hand-over protocols: in which order the legs go, what each leg's body is, and what the prefill answer must hold.
//!
//! Each engine has a file with its [`Protocol`]. To add an engine: write that file, and add a row to the table below.
//! Bodies of legs are made in [`legs`], alike for all engines except for the members that a [`Protocol`] adds.
//!
//! Sources: vLLM's NIXL and Mooncake connectors and their example proxies, llm-d's routing sidecar, SGLang's router,
//! TensorRT-LLM's disaggregated server, AIBrix's gateway (Neuron).

use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::body::json::Object;
use crate::body::{Api, KeySet};

pub mod acceptance;
pub mod legs;
mod mooncake;
mod neuron;
mod sglang;
mod sidecar;
mod trtllm;
mod vllm;

macro_rules! engines {
    ($($(#[$doc:meta])* $engine:ident => $protocol:path,)*) => {
        /// How a pair of engines hands the KV cache over. Configuration and endpoint lists name it in kebab case.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Engine {
            $($(#[$doc])* $engine,)*
        }

        impl Engine {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$engine,)*];

            /// What is true of the engine.
            #[must_use]
            pub fn protocol(self) -> &'static Protocol {
                match self {
                    $(Self::$engine => &$protocol,)*
                }
            }

            /// Whether the engine leaves out of the system text what Claude Code adds to it, as vLLM does.
            #[must_use]
            pub fn drops_billing_line(self) -> bool {
                !matches!(self, Self::Sglang | Self::Trtllm)
            }
        }
    };
}

engines! {
    /// vLLM with its NIXL connector, pull or push (which pairs the legs by `x-request-id`).
    VllmNixl => vllm::NIXL,
    /// vLLM with a connector over shared storage (LMCache, a shared directory).
    VllmShared => vllm::SHARED_STORAGE,
    /// SGLang: both legs at once, paired by bootstrap room.
    Sglang => sglang::PROTOCOL,
    /// TensorRT-LLM.
    Trtllm => trtllm::PROTOCOL,
    /// vLLM with the Mooncake connector.
    Mooncake => mooncake::PROTOCOL,
    /// AWS Neuron (AIBrix calls it `nixl`).
    Neuron => neuron::PROTOCOL,
    /// llm-d's routing sidecar beside the decode endpoint: it runs the prefill leg at the endpoint that a header names.
    Sidecar => sidecar::PROTOCOL,
}

/// What is true of one engine.
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
    /// Whether the cached tokens of a decode endpoint's answer include those that it fetched, so that they show whether
    /// the endpoint computed the prompt itself.
    pub counts_fetched_tokens: bool,
    /// Whether the prefill leg must be told to end after one token. Otherwise the prefill server ends by itself, and both
    /// legs must ask for the same sequences.
    pub limits_prefill: bool,
    /// Whether the decode endpoint samples the answer's first token itself. The prefill leg then need not ask for what an
    /// answer tells of it (`logprobs`). Elsewhere the token comes from the prefill endpoint.
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
    pub(crate) handover: fn(Api, &Object<'_>) -> Handover,
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

/// What both legs may say of a prefill endpoint and of their pairing.
#[derive(Clone, Debug)]
pub struct Pair<'a> {
    /// The endpoint's bootstrap server.
    pub bootstrap: SocketAddr,
    /// The endpoint's data-parallel rank.
    pub rank: Option<u32>,
    /// The id of the endpoint's engine, where [`Protocol::engine_id`] asks for it: a JSON string. Empty elsewhere.
    pub engine_id: &'a [u8],
    /// Names this pair of legs; from [`pair_id`].
    pub id: u64,
    /// Sequences, where the body asks for a batch of them.
    pub batch: Option<u32>,
}

/// A name for a pair of legs out of evenly spread bits: at least 2^42 (TensorRT-LLM takes smaller ones for its own), and
/// with [`Protocol::max_sequences`] to follow below 2^63 (SGLang's bound).
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
    /// The engine needs no parameters: decode finds the KV cache by itself.
    Nothing,
    /// The engine should have given parameters and gave none, or unusable ones: decode computes the prompt itself.
    Missing,
}

impl Handover {
    /// Members that replace none of the client's.
    fn insert(members: Vec<u8>) -> Self {
        Self::Insert { members, drop: KeySet::EMPTY }
    }
}

/// For protocols whose legs carry no members of their own.
fn no_members(_: &Pair<'_>) -> Vec<u8> {
    Vec::new()
}

/// For protocols whose decode leg needs no parameters.
fn no_handover(_: Api, _: &Object<'_>) -> Handover {
    Handover::Nothing
}

/// What the tests of several engines need.
#[cfg(test)]
mod testing {
    use super::*;
    use crate::body::scan;

    pub fn pair() -> Pair<'static> {
        Pair {
            bootstrap: ([10, 0, 0, 1], 8_998).into(),
            rank: None,
            engine_id: br#""e\u002f1""#,
            id: pair_id(0x0123_4567_89ab_cdef),
            batch: None,
        }
    }

    pub fn prefill(engine: Engine, api: Api, body: &str) -> String {
        let scan = scan(body.as_bytes()).unwrap();
        let leg = legs::prefill_body(engine.protocol(), api, body.as_bytes(), &scan, &pair(), None);
        String::from_utf8(leg).unwrap()
    }

    pub fn decode_members(engine: Engine, pair: &Pair<'_>) -> String {
        String::from_utf8((engine.protocol().decode_members)(pair)).unwrap()
    }

    pub fn handover(engine: Engine, api: Api, answer: &str) -> Handover {
        (engine.protocol().handover)(api, &Object::read(answer.as_bytes()).unwrap_or_default())
    }

    pub fn insert(members: &str) -> Handover {
        Handover::insert(members.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pair_ids_are_in_the_range_of_every_engine() {
        let most = Engine::ALL.iter().filter_map(|engine| engine.protocol().max_sequences).max().unwrap();
        for bits in [0, 1, u64::MAX] {
            assert!(((1 << 42)..(1 << 63) - u64::from(most)).contains(&pair_id(bits)));
        }
    }
}
