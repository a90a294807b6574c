//! Usage: the token counts that an engine's answer reports.

use crate::body::json::{self, Object};

/// Token counts in an engine's answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, above 0.
    pub prompt_tokens: u64,
    /// Tokens of the prompt that the engine found in its prefix cache; `None` where the answer does not say.
    pub cached_tokens: Option<u64>,
}

impl Usage {
    /// The usage, with these cached tokens where it has none of its own.
    #[must_use]
    pub fn with_cached_tokens(self, cached_tokens: Option<u64>) -> Self {
        Self { cached_tokens: self.cached_tokens.or(cached_tokens), ..self }
    }

    /// Reads `usage.prompt_tokens` and `usage.prompt_tokens_details.cached_tokens`, or the same with `input_` as
    /// `/v1/responses` has them. `None` where the prompt's tokens are missing, not a number or 0.
    #[must_use]
    pub fn of_answer(answer: &Object<'_>) -> Option<Self> {
        let usage = answer.get("usage")?;
        let number = |value: &[u8]| core::str::from_utf8(value).ok()?.parse::<u64>().ok();
        let mut this = Self::default();
        for (key, value) in json::members(usage) {
            match key.as_ref() {
                "prompt_tokens" | "input_tokens" => this.prompt_tokens = number(value)?,
                "prompt_tokens_details" | "input_tokens_details" => {
                    let cached = json::members(value).find(|(key, _)| key == "cached_tokens");
                    this.cached_tokens = cached.and_then(|(_, value)| number(value));
                }
                _ => {}
            }
        }
        (this.prompt_tokens > 0).then_some(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_read_where_it_is() {
        let usage = |text: &str| Usage::of_answer(&Object::read(text.as_bytes()).unwrap_or_default());
        let whole = r#"{"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":4}}}"#;
        assert_eq!(usage(whole), Some(Usage { prompt_tokens: 9, cached_tokens: Some(4) }));
        let null = r#"{"usage":{"prompt_tokens":9,"prompt_tokens_details":null}}"#;
        assert_eq!(usage(null), Some(Usage { prompt_tokens: 9, cached_tokens: None }));
        assert_eq!(usage(&whole.replace("prompt_", "input_")), usage(whole));
        for none in [r#"{"usage":null}"#, "{}", "", r#"{"usage":{"prompt_tokens":-3}}"#] {
            assert_eq!(usage(none), None, "{none}");
        }
    }
}
