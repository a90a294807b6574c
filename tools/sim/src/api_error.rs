//! Errors as vLLM answers them.

/// An answer in the shape of vLLM's errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status, and `code` in the body.
    pub status: u16,
    /// `type` in the body.
    pub kind: &'static str,
    /// For people.
    pub message: String,
    /// Field that is wrong.
    pub param: Option<&'static str>,
}

impl ApiError {
    /// 400.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { status: 400, kind: "BadRequestError", message: message.into(), param: None }
    }

    /// 400 for one field.
    #[must_use]
    pub fn bad_field(param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::bad_request(message) }
    }

    /// 404 for a model that is not served.
    #[must_use]
    pub fn unknown_model(model: &str) -> Self {
        Self {
            status: 404,
            kind: "NotFoundError",
            message: format!("The model `{model}` does not exist."),
            param: Some("model"),
        }
    }

    /// 500.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self { status: 500, kind: "InternalServerError", message: message.into(), param: None }
    }
}
