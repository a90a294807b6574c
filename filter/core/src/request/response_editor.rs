//! Reads and edits the body of a response on its way to the client, part by part: the usage, and the model's name.
//!
//! The editor searches whole bodies and events of streams alike for a few members, by name and at any depth. It parses
//! nothing else. It holds nothing back except the beginning of such a member at the end of a part. A quote inside a JSON
//! string has a backslash before it, so the editor never takes text that a model wrote for a member.

use core::ops::Range;
use std::borrow::Cow;

use crate::body::json;
use crate::endpoints::usage::Usage;

/// What to look for in one answer.
#[derive(Debug, Default)]
pub(crate) struct ResponseEditor {
    /// The model's name to replace, and the JSON string to put in its place.
    names: Option<(String, Vec<u8>)>,
    /// Whether [`cached_tokens`](Self::cached_tokens) replaces the count in the answer.
    replaces_cached_tokens: bool,
    /// Tokens that the prefill leg found in its cache.
    pub(crate) cached_tokens: Option<u64>,
    /// Whether the response's id is looked for.
    wants_id: bool,
    /// What the engine said it used.
    usage: Usage,
    /// Cached tokens as `/v1/messages` has them, beside its `input_tokens`.
    cache_read: Option<u64>,
    /// Whether nothing is looked for once the cached tokens are known.
    ends_at_usage: bool,
    /// The response's id, until it is taken.
    id: Option<String>,
    /// Whether nothing is looked for but the id.
    reads_id_only: bool,
    /// The beginning of a member, kept for the next part.
    held: Vec<u8>,
    /// Whether the last byte that went on was a backslash.
    is_escaped: bool,
}

/// Bytes of white space passed over between the parts of a member.
const MAX_SPACE_BYTES: usize = 8;

/// Longest id of a response, quotes included. vLLM's have 43 bytes; a client may choose a longer one.
const MAX_ID_BYTES: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Model,
    PromptTokens,
    CachedTokens,
    CacheRead,
    Id,
}

/// `input_tokens` is what `/v1/responses` and `/v1/messages` say.
const NAMES: [(&[u8], Name); 6] = [
    (b"model\"", Name::Model),
    (b"prompt_tokens\"", Name::PromptTokens),
    (b"input_tokens\"", Name::PromptTokens),
    (b"cached_tokens\"", Name::CachedTokens),
    (b"cache_read_input_tokens\"", Name::CacheRead),
    (b"id\"", Name::Id),
];

/// What stands at a quote.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Member(Name, Range<usize>),
    /// The part ends where there might be one.
    Beginning,
    Nothing,
}

impl ResponseEditor {
    /// An editor that looks for the usage. With `replaces_cached_tokens` it writes the prefill leg's `cached_tokens` into the
    /// answer, if they are known.
    pub(crate) fn new(replaces_cached_tokens: bool, cached_tokens: Option<u64>) -> Self {
        Self { replaces_cached_tokens, cached_tokens, ..Self::default() }
    }

    /// Looks for the response's id and nothing else.
    pub(crate) fn of_id() -> Self {
        Self { wants_id: true, reads_id_only: true, ..Self::default() }
    }

    /// Puts `asked` in the place of the name `served`.
    pub(crate) fn rename(&mut self, served: &str, asked: &str) {
        self.names = Some((served.to_owned(), serde_json::Value::from(asked).to_string().into_bytes()));
    }

    /// Looks for nothing more once the cached tokens are known.
    pub(crate) fn end_at_usage(&mut self) {
        self.ends_at_usage = true;
    }

    /// Looks for the response's id: the first `id` of the answer.
    pub(crate) fn find_id(&mut self) {
        self.wants_id = true;
    }

    /// The response's id, once: `None` while it is looked for, and after it was taken.
    pub(crate) fn take_id(&mut self) -> Option<String> {
        self.id.take()
    }

    /// Whether nothing in the rest of the answer is of interest.
    pub(crate) fn is_done(&self) -> bool {
        let is_read = self.reads_id_only || (self.ends_at_usage && self.cached().is_some());
        is_read && !self.wants_id && self.held.is_empty()
    }

    /// Whether the answer's length may change.
    pub(crate) fn changes_length(&self) -> bool {
        self.names.is_some()
    }

    /// What the engine said it used, so far; `None` before it said how many tokens of the prompt were cached.
    pub(crate) fn usage(&self) -> Option<Usage> {
        Some(self.usage).filter(|usage| usage.prompt_tokens > 0 && usage.cached_tokens.is_some())
    }

    /// Tokens of the prompt that the engine said were cached; `None` before it said so.
    pub(crate) fn cached(&self) -> Option<u64> {
        self.usage.cached_tokens.or(self.cache_read)
    }

    /// Edits the next part of the answer; `None` if the part does not change.
    pub(crate) fn part(&mut self, part: &[u8], is_last: bool) -> Option<Vec<u8>> {
        let had_held = !self.held.is_empty();
        let mut joined = core::mem::take(&mut self.held);
        let text: &[u8] = if had_held {
            joined.extend_from_slice(part);
            &joined
        } else {
            part
        };
        let mut out = Vec::new();
        let (mut copied, mut index, mut end) = (0, 0, text.len());
        while let Some(quote) = text.get(index..).and_then(|rest| memchr::memchr(b'"', rest)) {
            let quote = index.saturating_add(quote);
            index = quote.saturating_add(1);
            let before = quote.checked_sub(1).and_then(|before| text.get(before));
            if before.map_or(self.is_escaped, |byte| *byte == b'\\') {
                continue;
            }
            match self.member(text.get(index..).unwrap_or_default()) {
                Found::Member(name, value) => {
                    let value = index.saturating_add(value.start)..index.saturating_add(value.end);
                    index = value.end;
                    if let Some(other) = self.read(name, text.get(value.clone()).unwrap_or_default()) {
                        out.extend_from_slice(text.get(copied..value.start).unwrap_or_default());
                        out.extend_from_slice(&other);
                        copied = value.end;
                    }
                }
                Found::Beginning if !is_last => {
                    end = quote;
                    break;
                }
                Found::Beginning | Found::Nothing => {}
            }
        }
        if let Some(last) = end.checked_sub(1).and_then(|last| text.get(last)) {
            self.is_escaped = *last == b'\\';
        }
        self.held = text.get(end..).unwrap_or_default().to_vec();
        if !had_held && copied == 0 && self.held.is_empty() {
            return None;
        }
        out.extend_from_slice(text.get(copied..end).unwrap_or_default());
        Some(out)
    }

    /// Whether a known member begins behind a quote, and which one.
    fn member(&self, text: &[u8]) -> Found {
        let Some((name, kind)) = NAMES.iter().find(|(name, _)| text.starts_with(name)) else {
            let begins = |name: &[u8]| name.len() > text.len() && name.starts_with(text);
            return if NAMES.iter().any(|(name, _)| begins(name)) { Found::Beginning } else { Found::Nothing };
        };
        let behind = |index: usize| {
            let rest = text.get(index..).unwrap_or_default();
            let spaces = rest.iter().take(MAX_SPACE_BYTES).take_while(|byte| byte.is_ascii_whitespace()).count();
            let index = index.saturating_add(spaces);
            (index, text.get(index).copied())
        };
        let (colon, is_colon) = behind(name.len());
        let (start, first) = match is_colon {
            Some(b':') => behind(colon.saturating_add(1)),
            Some(_) => return Found::Nothing,
            None => return Found::Beginning,
        };
        let value = text.get(start..).unwrap_or_default();
        // Every character of a name may be an escape of six bytes, or of twelve; no count has more digits than 20.
        let (length, longest) = match (kind, first) {
            (_, None) => return Found::Beginning,
            (Name::Model, Some(b'"')) => {
                let Some((served, _)) = &self.names else { return Found::Nothing };
                (string_bytes(value), served.len().saturating_mul(6).saturating_add(2))
            }
            (Name::Id, Some(b'"')) if self.wants_id => (string_bytes(value), MAX_ID_BYTES),
            (Name::PromptTokens | Name::CachedTokens | Name::CacheRead, Some(b'0'..=b'9')) => {
                (value.iter().position(|byte| !byte.is_ascii_digit()), 20)
            }
            _ => return Found::Nothing,
        };
        match length {
            Some(length) if length <= longest => Found::Member(*kind, start..start.saturating_add(length)),
            None if value.len() <= longest => Found::Beginning,
            _ => Found::Nothing,
        }
    }

    /// Notes the value of a member. Returns the value to write in its place; `None` to leave it.
    fn read(&mut self, name: Name, value: &[u8]) -> Option<Vec<u8>> {
        let number = || core::str::from_utf8(value).ok()?.parse::<u64>().ok();
        match name {
            Name::Model => {
                let (served, asked) = self.names.as_ref()?;
                (json::string(value)? == served.as_str()).then(|| asked.clone())
            }
            Name::Id => {
                self.wants_id = false;
                self.id = json::string(value).map(Cow::into_owned);
                None
            }
            Name::PromptTokens => {
                self.usage.prompt_tokens = number()?;
                None
            }
            Name::CacheRead => {
                self.cache_read = Some(number()?);
                None
            }
            Name::CachedTokens => {
                let said = number()?;
                self.usage.cached_tokens = Some(said);
                // What was computed here again was not cached, whatever the prefill leg found. White space keeps the
                // answer's length, and so its content-length.
                let cached = self.cached_tokens.filter(|cached| self.replaces_cached_tokens && *cached < said)?;
                Some(format!("{cached:>width$}", width = value.len()).into_bytes())
            }
        }
    }
}

/// Length of the string that `text` begins with, quotes included; `None` if it does not end there.
fn string_bytes(text: &[u8]) -> Option<usize> {
    let mut index = 1_usize;
    loop {
        let found = index.saturating_add(memchr::memchr2(b'"', b'\\', text.get(index..)?)?);
        if text.get(found) == Some(&b'"') {
            return Some(found.saturating_add(1));
        }
        index = found.saturating_add(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn editor(served: &str, asked: &str, cached: u64) -> ResponseEditor {
        let mut editor = ResponseEditor::new(true, Some(cached));
        editor.rename(served, asked);
        editor
    }

    /// The answer as the client gets it, cut at these places, and what was read.
    fn pass(mut editor: ResponseEditor, answer: &str, cuts: &[usize]) -> (String, Option<Usage>) {
        let mut out = Vec::new();
        let mut rest = answer.as_bytes();
        for cut in cuts {
            let (part, behind) = rest.split_at((*cut).min(rest.len()));
            out.extend(editor.part(part, false).unwrap_or_else(|| part.to_vec()));
            rest = behind;
        }
        out.extend(editor.part(rest, true).unwrap_or_else(|| rest.to_vec()));
        (String::from_utf8(out).unwrap(), editor.usage())
    }

    const CASES: &[(&str, &str)] = &[
        (
            r#"{"model":"a/b","choices":[{"text":"\"model\":\"a/b\" \\"}],"usage":{"prompt_tokens":900,"prompt_tokens_details":{"cached_tokens":899}}}"#,
            r#"{"model":"as\"ked","choices":[{"text":"\"model\":\"a/b\" \\"}],"usage":{"prompt_tokens":900,"prompt_tokens_details":{"cached_tokens": 16}}}"#,
        ),
        (
            "data: {\"model\" : \"a\\/b\",\"x\":\"model\"}\n\ndata: {\"model\":\"a/bc\",\"model\":null}\n\ndata: {\"usage\":{\"input_tokens\": 900,\"cached_tokens\" :512}}\n\ndata: [DONE]\n\n",
            "data: {\"model\" : \"as\\\"ked\",\"x\":\"model\"}\n\ndata: {\"model\":\"a/bc\",\"model\":null}\n\ndata: {\"usage\":{\"input_tokens\": 900,\"cached_tokens\" : 16}}\n\ndata: [DONE]\n\n",
        ),
        (r#"{"cached_tokens":9,"k\"model":"a/b"}"#, r#"{"cached_tokens":9,"k\"model":"a/b"}"#),
        (r#"{"model":"a/b"#, r#"{"model":"a/b"#),
    ];

    #[test]
    fn names_and_cached_tokens_are_put_right_and_all_else_stays() {
        for (answer, expected) in CASES {
            let (got, _) = pass(editor("a/b", "as\"ked", 16), answer, &[]);
            assert_eq!(got, *expected);
        }
        let (_, usage) = pass(ResponseEditor::default(), CASES[0].0, &[]);
        assert_eq!(usage, Some(Usage { prompt_tokens: 900, cached_tokens: Some(899) }));
    }

    #[test]
    fn what_only_reads_changes_nothing_and_holds_nothing_of_events() {
        let mut editor = ResponseEditor::default();
        for event in CASES[1].0.split_inclusive("\n\n") {
            assert_eq!(editor.part(event.as_bytes(), false), None, "{event}");
        }
        assert_eq!(editor.part(b"", true), None);
        assert_eq!(editor.usage(), Some(Usage { prompt_tokens: 900, cached_tokens: Some(512) }));
    }

    proptest! {
        #[test]
        fn no_cut_makes_a_difference(case in 0..CASES.len(), cuts in prop::collection::vec(0_usize..40, 0..60)) {
            let (answer, expected) = CASES[case];
            prop_assert_eq!(pass(editor("a/b", "as\"ked", 16), answer, &cuts).0, expected);
        }

        #[test]
        fn bytes_without_members_pass_as_they_are(answer in r#"["\\:model a-z0-9,{}]{0,80}"#, cuts in prop::collection::vec(0_usize..9, 0..20)) {
            prop_assert_eq!(pass(ResponseEditor::default(), &answer, &cuts).0, answer);
        }
    }
}
