//! What every part of an answer says of it.

use crate::rules::Api;
use crate::shape::Shape;

/// Tokens of one answer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) prompt: u64,
    pub(crate) completion: u64,
    pub(crate) cached: u64,
    /// Of the tokens that were computed, those in whole blocks: they are cached now.
    pub(crate) created: u64,
}

impl Usage {
    pub(crate) fn to_json(self) -> String {
        format!(
            r#"{{"prompt_tokens":{},"total_tokens":{},"completion_tokens":{},"prompt_tokens_details":{{"cached_tokens":{},"created_cache_tokens":{}}}}}"#,
            self.prompt,
            self.prompt + self.completion,
            self.completion,
            self.cached,
            self.created
        )
    }
}

/// What every chunk of an answer begins with.
pub(crate) struct Head {
    pub(crate) api: Api,
    /// `chatcmpl-…` or `cmpl-…`.
    pub(crate) id: String,
    /// `"id":…,"object":` and, after the object's name, `,"created":…,"model":…`.
    pub(crate) before: String,
    pub(crate) after: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) shape: Shape,
}

impl Head {
    pub(crate) fn new(api: Api, request_id: &str, created: u64, model: &str) -> Self {
        let id = match api {
            Api::Chat => format!("chatcmpl-{request_id}"),
            Api::Completions => format!("cmpl-{request_id}"),
            Api::Responses => format!("resp_{request_id}"),
            Api::Messages => format!("msg_{request_id}"),
            Api::Generate => request_id.to_owned(),
        };
        let before = format!(r#"{{"id":{},"object":"#, quote(&id));
        let after = format!(r#","created":{created},"model":{}"#, quote(model));
        Self { api, id, before, after, created, model: model.to_owned(), shape: Shape::Text }
    }
}

/// A JSON string.
pub(crate) fn quote(text: &str) -> String {
    // Writing a string to memory cannot fail.
    serde_json::to_string(text).unwrap_or_default()
}
