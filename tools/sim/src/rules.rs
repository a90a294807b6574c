//! Which APIs there are, and what a server asks of every request.

use crate::config::Config;
use crate::role::{Engine, Role};

/// Which of the generation endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/responses`, OpenAI's later API.
    Responses,
    /// `/v1/messages`, Anthropic's API.
    Messages,
    /// `/inference/v1/generate`, vLLM's own: token ids in, token ids out.
    Generate,
}

impl Api {
    /// The API of a path.
    #[must_use]
    pub fn of_path(path: &str) -> Option<Self> {
        Some(match path {
            "/v1/chat/completions" => Self::Chat,
            "/v1/completions" => Self::Completions,
            "/v1/responses" => Self::Responses,
            "/v1/messages" => Self::Messages,
            "/inference/v1/generate" => Self::Generate,
            _ => return None,
        })
    }

    /// Whether its streams end with `[DONE]`.
    pub(crate) fn says_done(self) -> bool {
        !matches!(self, Self::Responses | Self::Messages)
    }
}

/// Rules of the server that a request must meet.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Longest prompt plus output, in tokens.
    pub max_model_len: u64,
    /// Whose hand-over protocol is spoken.
    pub engine: Engine,
    /// Work that the server is meant for: some engines refuse other.
    pub role: Role,
}

impl Rules {
    /// The rules of a server.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self { max_model_len: config.max_model_len, engine: config.engine, role: config.role }
    }
}
