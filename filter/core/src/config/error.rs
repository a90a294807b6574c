//! Why a configuration is refused.

use core::fmt;

/// Why a configuration is refused. The last good one stays in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// Key path and reason.
    message: String,
}

impl ConfigError {
    pub(super) fn new(key: &str, why: impl fmt::Display) -> Self {
        Self { message: format!("{key}: {why}") }
    }

    /// No configuration has come yet.
    pub(crate) fn none_yet() -> Self {
        Self { message: "none has been read yet".to_owned() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ConfigError {}
