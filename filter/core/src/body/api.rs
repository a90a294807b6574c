//! APIs of requests with a prompt.

/// API of a request with a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Api {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
    /// `/v1/messages`
    Messages,
    /// `/inference/v1/generate`: token ids in, token ids out.
    Generate,
}

impl Api {
    /// The path at which engines have the API.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Responses => "/v1/responses",
            Self::Messages => "/v1/messages",
            Self::Generate => "/inference/v1/generate",
        }
    }

    /// The API that a `:path` names, without its query string; `None` for every other path. The path must be spelt exactly:
    /// percent-encoding is not undone.
    #[must_use]
    pub fn of_path(path: &[u8]) -> Option<Self> {
        match path.split(|&byte| byte == b'?').next()? {
            b"/v1/chat/completions" => Some(Self::Chat),
            b"/v1/completions" => Some(Self::Completions),
            b"/v1/responses" => Some(Self::Responses),
            b"/v1/messages" => Some(Self::Messages),
            b"/inference/v1/generate" => Some(Self::Generate),
            _ => None,
        }
    }
}
