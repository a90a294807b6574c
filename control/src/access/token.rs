//! The bearer token that filters, people and replicas send.

use std::sync::Arc;

use axum::http::HeaderValue;
use subtle::ConstantTimeEq;

/// A bearer token. `Debug` hides it, and comparing takes the same time for every text of its length.
#[derive(Clone)]
pub struct Token(Arc<str>);

impl Token {
    /// A token; `None` when the text is empty or has bytes other than printable ASCII without spaces.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let is_usable = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        is_usable.then(|| Self(text.into()))
    }

    /// The value of the `authorization` header that carries this token.
    #[must_use]
    pub fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// The bytes of the token, to derive other secrets from.
    #[must_use]
    pub fn secret(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// Whether an `authorization` header carries this token. The time that this takes depends on the length alone.
    #[must_use]
    pub fn is_in(&self, authorization: Option<&HeaderValue>) -> bool {
        let Some((scheme, given)) = authorization.and_then(|value| value.as_bytes().split_at_checked(7)) else {
            return false;
        };
        scheme.eq_ignore_ascii_case(b"bearer ") && bool::from(given.ct_eq(self.0.as_bytes()))
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_opens() {
        let token = Token::new("secret").unwrap();
        let is_in = |text: &str| token.is_in(Some(&HeaderValue::from_str(text).unwrap()));
        assert!(is_in("Bearer secret") && is_in("bearer secret"));
        for wrong in ["secret", "Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "Basic secret", "Bearer  secret"]
        {
            assert!(!is_in(wrong), "{wrong}");
        }
        assert!(!token.is_in(None));
    }

    #[test]
    fn a_token_that_cannot_stand_in_a_header_is_refused_and_none_is_shown() {
        assert!(Token::new("").is_none() && Token::new("a b").is_none() && Token::new("ä").is_none());
        assert!(!format!("{:?}", Token::new("secret")).contains("secret"));
    }
}
