//! Members that no client may send, at whatever depth an engine could read them.
//!
//! Engines copy objects of a request into the place from which they take hand-over parameters: vLLM `vllm_xargs` and
//! `sampling_params.extra_args`, SGLang the `parameters` of `/vertex_generate`. So a forbidden member is cut out of every
//! object of the body, except where the object is content ([`is_content`]): engines read no parameters there, and a tool
//! may have an argument of any name.
//!
//! Sources: the request models of vLLM 0.33, SGLang 0.5.23 and TensorRT-LLM, llm-d's routing sidecar.

use super::key::{Key, KeySet, MAX_MEMBERS};
use crate::body::json::{self, ErrorKind, RawMember, ScanError, Scanner, Span};

/// Members that no client may send to an engine. They name memory or addresses of other servers, or make an engine wait for
/// a part that never comes. `kv_transfer_params` can end a decode server's process.
pub const FORBIDDEN: KeySet = KeySet::of(&[
    Key::KvTransferParams,
    Key::EcTransferParams,
    Key::KvHints,
    Key::BootstrapHost,
    Key::BootstrapPort,
    Key::BootstrapRoom,
    Key::BootstrapPairKey,
    Key::DecodeTpSize,
    Key::EncoderUrls,
    Key::NeedWaitForMmInputs,
    Key::NumItemsAssigned,
    Key::HttpWorkerIpc,
    Key::DataParallelRank,
    Key::RoutedDpRank,
    Key::DisaggPrefillDpRank,
    Key::DisaggregatedParams,
    Key::DisaggPrefillResp,
    Key::PromptTokenIdsB64,
]);

/// Whether a member of this name (without escapes) has content as its value: a prompt, a schema, or a note of the client.
/// Engines read no parameters of a request there.
#[must_use]
pub fn is_content(name: &str) -> bool {
    matches!(
        name,
        "messages"
            | "prompt"
            | "input"
            | "token_ids"
            | "prompt_token_ids"
            | "system"
            | "instructions"
            | "tools"
            | "functions"
            | "tool_choice"
            | "chat_history"
            | "documents"
            | "query"
            | "texts"
            | "response_format"
            | "text"
            | "structured_outputs"
            | "guided_json"
            | "json_schema"
            | "metadata"
            | "chat_template_kwargs"
    )
}

/// Finds the spans to cut out of the value of a top-level member that the scanner just passed.
///
/// The time is linear in the bytes of the value, whatever its depth.
pub(super) fn find(body: &[u8], member: &RawMember, key: Option<Key>, cuts: &mut Vec<Span>) -> Result<(), ErrorKind> {
    let value = member.value.get(body);
    let is_container = matches!(value.first(), Some(b'{' | b'['));
    // A forbidden member is dropped whole.
    if !is_container || key.is_some_and(|key| FORBIDDEN.contains(key)) || is_content_key(member.key.get(body)) {
        return Ok(());
    }
    let mut scanner = Scanner::new(value).map_err(|error| error.kind)?;
    Search { json: value, base: member.value.start, cuts }.value(&mut scanner).map_err(|error| error.kind)
}

/// Spans to cut out of a whole document, in its order: forbidden members of every object that is not content. Empty where
/// there are none.
///
/// # Errors
/// [`ScanError`] where the document is not valid JSON, or has more than [`MAX_MEMBERS`] forbidden members.
pub fn cuts(json: &[u8]) -> Result<Vec<Span>, ScanError> {
    json::validate(json)?;
    let mut cuts = Vec::new();
    Search { json, base: 0, cuts: &mut cuts }.value(&mut Scanner::new(json)?)?;
    Ok(cuts)
}

fn is_content_key(raw: &[u8]) -> bool {
    json::unescape(raw).is_some_and(|name| is_content(&name))
}

/// A walk over a value that was checked already, so that it nests no deeper than [`json::MAX_DEPTH`].
struct Search<'a> {
    json: &'a [u8],
    /// Offset of `json` in the body.
    base: u32,
    cuts: &'a mut Vec<Span>,
}

impl Search<'_> {
    fn value(&mut self, scanner: &mut Scanner<'_>) -> Result<(), ScanError> {
        scanner.white_space();
        if scanner.eat(b'{') {
            return self.object(scanner);
        }
        if !scanner.eat(b'[') {
            return scanner.value(0).map(|_| ());
        }
        scanner.white_space();
        if scanner.eat(b']') {
            return Ok(());
        }
        loop {
            self.value(scanner)?;
            scanner.white_space();
            if !scanner.eat(b',') {
                return if scanner.eat(b']') { Ok(()) } else { Err(scanner.error(ErrorKind::ExpectedComma)) };
            }
        }
    }

    /// The rest of an object, behind its opening brace.
    fn object(&mut self, scanner: &mut Scanner<'_>) -> Result<(), ScanError> {
        // Where a cut begins: at the comma before the member or, as long as all members so far were cut, behind what
        // stood before it. Those take the comma behind them along.
        let mut start = scanner.offset();
        let mut is_first_left = true;
        scanner.white_space();
        if scanner.eat(b'}') {
            return Ok(());
        }
        loop {
            scanner.white_space();
            let key = scanner.key()?.get(self.json);
            let is_cut = Key::read(key).is_some_and(|key| FORBIDDEN.contains(key));
            if is_cut || is_content_key(key) {
                scanner.value(0)?;
            } else {
                self.value(scanner)?;
            }
            let end = scanner.offset();
            scanner.white_space();
            let comma = scanner.offset();
            let more = scanner.eat(b',');
            if !more && !scanner.eat(b'}') {
                return Err(scanner.error(ErrorKind::ExpectedComma));
            }
            if is_cut {
                let end = match (is_first_left, more) {
                    (true, true) => scanner.offset(),
                    (true, false) => comma,
                    (false, _) => end,
                };
                if self.cuts.len() >= MAX_MEMBERS {
                    return Err(scanner.error(ErrorKind::TooManyMembers));
                }
                let Span { start, end } = Span::new(start, end);
                self.cuts.push(Span { start: self.base.saturating_add(start), end: self.base.saturating_add(end) });
            }
            is_first_left &= is_cut;
            start = if is_first_left { scanner.offset() } else { comma };
            if !more {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::form::without;

    fn left(json: &str) -> String {
        String::from_utf8(without(json.as_bytes(), &cuts(json.as_bytes()).unwrap())).unwrap()
    }

    #[test]
    fn forbidden_members_go_at_any_depth_with_one_comma() {
        for (json, expected) in [
            (r#"{"vllm_xargs":{"kv_transfer_params":0}}"#, r#"{"vllm_xargs":{}}"#),
            (r#"{"a":{ "kv_transfer_params" : "" , "b":1.0e5 }}"#, r#"{"a":{ "b":1.0e5 }}"#),
            (r#"{"a":{"b":1 , "kv_transfer_params":[] }}"#, r#"{"a":{"b":1  }}"#),
            (r#"{"a":{"b":1,"kv_transfer_params":{},"ec_transfer_params":{},"c":2}}"#, r#"{"a":{"b":1,"c":2}}"#),
            (r#"{"a":{"kv_transfer_params":1,"kv_transfer_params":2}}"#, r#"{"a":{}}"#),
            (r#"{"a":{"kv_\u0074ransfer_params":1,"b":2}}"#, r#"{"a":{"b":2}}"#),
            (
                r#"{"sampling_params":{"extra_args":{"kv_transfer_params":{"remote_host":"h"},"x":[{"kv_hints":1}]}}}"#,
                r#"{"sampling_params":{"extra_args":{"x":[{}]}}}"#,
            ),
            (r#"[[{"bootstrap_host":"h"}],{"kv_transfer_params":1}]"#, r#"[[{}],{}]"#),
        ] {
            assert_eq!(left(json), expected);
        }
    }

    #[test]
    fn content_is_left_alone() {
        for json in [
            r#"{"messages":[{"role":"user","content":[{"kv_transfer_params":1}]}]}"#,
            r#"{"tools":[{"function":{"parameters":{"properties":{"kv_transfer_params":{"type":"object"}}}}}]}"#,
            r#"{"response_format":{"json_schema":{"schema":{"kv_transfer_params":{}}}},"metadata":{"kv_hints":"x"}}"#,
            r#"{"kv_transfer_param":1,"a":"\"kv_transfer_params\":1"}"#,
        ] {
            assert_eq!(left(json), json);
        }
    }

    #[test]
    fn a_document_that_is_cut_too_often_is_refused() {
        let json = format!("[{}0]", r#"{"kv_hints":1},"#.repeat(MAX_MEMBERS.saturating_add(1)));
        assert_eq!(cuts(json.as_bytes()).unwrap_err().kind, ErrorKind::TooManyMembers);
    }
}
