//! Roles and engines by the names that llm-d, AIBrix and pd-control's own annotations have for them.

use pd_core::wire::{Engine, Role};
use serde_json::Value;

/// The role that llm-d, AIBrix and we call by a name.
#[must_use]
pub fn role_named(text: &str) -> Option<Role> {
    match text {
        "prefill" | "encode-prefill" => Some(Role::Prefill),
        "decode" => Some(Role::Decode),
        "both" | "prefill-decode" | "encode-prefill-decode" => Some(Role::Both),
        _ => None,
    }
}

/// No engine here has that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownEngine;

/// The protocol that an engine's name stands for; none for plain vLLM, whose connector the pool's policy says.
///
/// # Errors
/// [`UnknownEngine`].
pub fn engine_named(text: &str) -> Result<Option<Engine>, UnknownEngine> {
    match text {
        "vllm" => Ok(None),
        "trtllm-serve" | "tensorrt-llm" | "trt-llm" => Ok(Some(Engine::Trtllm)),
        _ => serde_json::from_value(Value::String(text.to_owned())).map(Some).map_err(|_| UnknownEngine),
    }
}
