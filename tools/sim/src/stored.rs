//! Responses that the server keeps, as vLLM does with `VLLM_ENABLE_RESPONSES_API_STORE`: in its own memory, unknown to all
//! other servers.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::api_error::ApiError;

/// Prompts of kept responses, by the response's id.
#[derive(Default)]
pub(crate) struct Stored(Mutex<HashMap<String, Vec<u8>>>);

impl Stored {
    pub(crate) fn insert(&self, id: &str, prompt: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned(), prompt.to_vec());
    }

    /// The prompt of a response.
    ///
    /// # Errors
    /// The 404 that vLLM gives.
    pub(crate) fn prompt(&self, id: &str) -> Result<Vec<u8>, ApiError> {
        let stored = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stored.get(id).cloned().ok_or_else(|| ApiError {
            status: 404,
            kind: "invalid_request_error",
            message: format!("Response with id '{id}' not found."),
            param: Some("response_id"),
        })
    }
}
