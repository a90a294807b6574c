//! What a simulated server is meant for, and which engine it is.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Work that the server is meant for. It serves every request whatever its role, as vLLM does; the role addresses
/// faults and stands in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Computes KV caches of prompts for others.
    Prefill,
    /// Generates tokens from a KV cache that a prefill server computed.
    Decode,
    /// Serves whole requests (an aggregated server).
    Both,
}

impl Role {
    /// The name used on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Both => "both",
        }
    }
}

/// Engine and connector, named as in the routers' configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// vLLM with its NIXL connector in pull mode.
    VllmNixl,
    /// The same in push mode: legs are paired by `x-request-id`.
    VllmNixlPush,
    /// vLLM with a connector over a shared directory.
    VllmShared,
    /// SGLang: legs meet in a bootstrap room.
    Sglang,
    /// TensorRT-LLM.
    Trtllm,
    /// vLLM with the Mooncake connector: legs meet by transfer id.
    Mooncake,
    /// AWS Neuron: the decode leg quotes the prefill answer.
    Neuron,
}

impl Engine {
    /// The name used on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::VllmNixl => "vllm-nixl",
            Self::VllmNixlPush => "vllm-nixl-push",
            Self::VllmShared => "vllm-shared",
            Self::Sglang => "sglang",
            Self::Trtllm => "trtllm",
            Self::Mooncake => "mooncake",
            Self::Neuron => "neuron",
        }
    }
}
