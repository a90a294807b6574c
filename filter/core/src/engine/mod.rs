//! Hand-over protocols: the order of the legs, the body of each leg, and what the prefill answer must contain.
//!
//! Each engine has a file with its [`Protocol`]. To add an engine, write such a file and add a row to the table below.
//! [`legs`] makes the bodies of legs in the same way for all engines. A [`Protocol`] adds its own members.
//!
//! Sources: vLLM's NIXL and Mooncake connectors and their example proxies, llm-d's routing sidecar, SGLang's router,
//! TensorRT-LLM's disaggregated server, AIBrix's gateway (Neuron).

use serde::{Deserialize, Serialize};

pub(crate) use protocol::{CachedTokensOf, LegAnswer};
pub use protocol::{EngineIdQuery, Handover, LegOrder, Pair, Protocol, pair_id};

pub mod acceptance;
pub mod legs;
mod mooncake;
mod neuron;
mod protocol;
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

/// What the tests of several engines need.
#[cfg(test)]
mod testing {
    use super::*;
    use crate::body::{Api, scan};

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
        let answer = LegAnswer::read(answer.as_bytes());
        (engine.protocol().handover)(api, &answer, CachedTokensOf::Prefill)
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
