//! Names of roles and engines in llm-d, AIBrix and pd-control's annotations.

use pd_core::wire::{Engine, Role};
use serde_json::Value;

/// The role of this name; `None` when there is none.
#[must_use]
pub fn role_named(text: &str) -> Option<Role> {
    match text {
        "prefill" | "encode-prefill" => Some(Role::Prefill),
        "decode" => Some(Role::Decode),
        "both" | "prefill-decode" | "encode-prefill-decode" => Some(Role::Both),
        _ => None,
    }
}

/// No engine has the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownEngine;

/// The hand-over protocol of the engine of this name. `None` for plain vLLM: its connector is in the pool's policy.
///
/// # Errors
/// [`UnknownEngine`] when no engine has the name.
pub fn engine_named(text: &str) -> Result<Option<Engine>, UnknownEngine> {
    match text {
        "vllm" => Ok(None),
        "trtllm-serve" | "tensorrt-llm" | "trt-llm" => Ok(Some(Engine::Trtllm)),
        _ => serde_json::from_value(Value::String(text.to_owned())).map(Some).map_err(|_| UnknownEngine),
    }
}
