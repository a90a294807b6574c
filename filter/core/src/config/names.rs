//! What a name may be.

use super::error::ConfigError;

pub(super) fn check_name(key: &str, value: &str) -> Result<(), ConfigError> {
    if value.is_empty() || value.len() > 512 || !value.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(ConfigError::new(key, "must be 1 to 512 visible ASCII characters"));
    }
    Ok(())
}

pub(super) fn check_header_name(key: &str, value: &str) -> Result<(), ConfigError> {
    let token = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if value.is_empty() || value.len() > 128 || !value.bytes().all(token) {
        return Err(ConfigError::new(key, "must be a header name in lower case"));
    }
    Ok(())
}
