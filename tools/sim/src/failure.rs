//! Why a request gets no text.

use crate::api_error::ApiError;

/// Why a request gets no text.
pub(crate) enum Failure {
    /// An error answer.
    Error(ApiError),
    /// No answer, ever.
    Hang,
}
