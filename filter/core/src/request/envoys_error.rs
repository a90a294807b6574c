//! Errors that Envoy answers itself (a time limit, no healthy host, a body beyond its buffer), put into the form of the
//! client's API.
//!
//! Envoy answers them as plain text, which clients of these APIs do not read. Status and headers stay, and Envoy's text
//! becomes the message. An answer of another type stays as it is: a filter or the operator's `local_reply_config` chose it.

use super::effect::{Effect, Flow, Outcome};
use crate::body::splice::HeadEdit;
use crate::request::reply::{ErrorForm, REASON_HEADER, Reply, error_body};

/// Reason code of such an answer.
pub(super) const REASON: &str = "envoy";
/// Bytes of Envoy's text that the message may have.
const MAX_TEXT_BYTES: usize = 4_096;

/// An error of Envoy's own on its way to the client.
#[derive(Debug)]
pub(super) struct EnvoysError {
    status: u16,
    form: ErrorForm,
    /// Envoy's text, as far as it has come.
    text: Vec<u8>,
}

/// What becomes of the headers of such an answer.
pub(super) enum Respelt {
    /// They go on; the body follows.
    Body(EnvoysError, Outcome),
    /// There is no body to change.
    NoBody(Outcome),
}

impl EnvoysError {
    /// The headers are there. `None` where the answer stays as it is.
    ///
    /// `ends`: no body follows them; `is_head`: because the request was HEAD.
    pub(super) fn headers(
        form: ErrorForm,
        status: u16,
        content_type: Option<&[u8]>,
        is_head: bool,
        ends: bool,
    ) -> Option<Respelt> {
        let essence = content_type.unwrap_or_default().split(|byte| *byte == b';').next().unwrap_or_default();
        let essence = essence.trim_ascii();
        if status < 400 || !(essence.is_empty() || essence.eq_ignore_ascii_case(b"text/plain")) {
            return None;
        }
        let error = Self { status, form, text: Vec::new() };
        if ends && !is_head {
            let headers = vec![("content-type", "application/json".to_owned()), (REASON_HEADER, REASON.to_owned())];
            let reply = Effect::Reply(Reply { status, headers, body: error.body(), reason: REASON });
            return Some(Respelt::NoBody(Outcome { flow: Flow::Pause, effects: vec![reply] }));
        }
        let effects = vec![
            Effect::RemoveResponseHeader("content-length"),
            Effect::RemoveResponseHeader("content-type"),
            Effect::AddResponseHeader("content-type", "application/json".to_owned()),
            Effect::AddResponseHeader(REASON_HEADER, REASON.to_owned()),
        ];
        let outcome = Outcome { flow: Flow::Continue, effects };
        Some(if ends { Respelt::NoBody(outcome) } else { Respelt::Body(error, outcome) })
    }

    /// A part of Envoy's text came. It goes on as a whole, in the form of the API, with the last part.
    pub(super) fn part(&mut self, part: &[u8], is_last: bool) -> Outcome {
        let room = MAX_TEXT_BYTES.saturating_sub(self.text.len()).min(part.len());
        self.text.extend_from_slice(part.get(..room).unwrap_or_default());
        let drain = u32::try_from(part.len()).unwrap_or(u32::MAX);
        let head = if is_last { self.body() } else { Vec::new() };
        Outcome { flow: Flow::Continue, effects: vec![Effect::EditResponse(HeadEdit { drain, head })] }
    }

    fn body(&self) -> Vec<u8> {
        let text = String::from_utf8_lossy(&self.text);
        let message = match text.trim() {
            "" => format!("the gateway answered with status {}", self.status),
            text => text.to_owned(),
        };
        error_body(self.form, self.status, &message, REASON)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn respelt(form: ErrorForm, parts: &[&str]) -> Value {
        let Some(Respelt::Body(mut error, _)) =
            EnvoysError::headers(form, 504, Some(b"text/plain; charset=utf-8"), false, false)
        else {
            panic!("not respelt")
        };
        let mut body = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let outcome = error.part(part.as_bytes(), index + 1 == parts.len());
            let [Effect::EditResponse(edit)] = outcome.effects.as_slice() else { panic!("{outcome:?}") };
            assert_eq!(edit.drain as usize, part.len());
            body.extend_from_slice(&edit.head);
        }
        serde_json::from_slice(&body).unwrap()
    }

    #[test]
    fn a_text_in_parts_becomes_one_error() {
        let expected = json!({"error": {
            "message": "upstream \"request\" timeout", "type": "server_error", "param": null, "code": "envoy"
        }});
        assert_eq!(respelt(ErrorForm::OpenAi, &["upstream \"re", "", "quest\" timeout", ""]), expected);
        let expected = json!({"type": "error", "error": {"type": "timeout_error", "message": "a"}});
        assert_eq!(respelt(ErrorForm::Anthropic, &[" a\n"]), expected);
        let long = "é".repeat(9_000);
        let message = respelt(ErrorForm::OpenAi, &[&long])["error"]["message"].as_str().unwrap().len();
        assert!((MAX_TEXT_BYTES..MAX_TEXT_BYTES + 8).contains(&message), "{message}");
        assert_eq!(respelt(ErrorForm::OpenAi, &[""])["error"]["message"], "the gateway answered with status 504");
    }

    #[test]
    fn an_answer_of_another_kind_stays() {
        for (status, content_type) in [
            (503, "application/json"),
            (403, "text/html"),
            (404, "text/event-stream"),
            (302, "text/plain"),
            (200, "text/plain"),
        ] {
            let answer = EnvoysError::headers(ErrorForm::OpenAi, status, Some(content_type.as_bytes()), false, false);
            assert!(answer.is_none(), "{status} {content_type}");
        }
    }

    #[test]
    fn an_answer_without_a_body_gets_one_unless_head_asked() {
        let Some(Respelt::NoBody(outcome)) = EnvoysError::headers(ErrorForm::OpenAi, 404, None, false, true) else {
            panic!("no reply")
        };
        assert!(matches!(outcome.effects.as_slice(), [Effect::Reply(Reply { status: 404, .. })]), "{outcome:?}");
        let Some(Respelt::NoBody(outcome)) =
            EnvoysError::headers(ErrorForm::OpenAi, 404, Some(b"text/plain"), true, true)
        else {
            panic!("a body")
        };
        assert!(!outcome.effects.iter().any(|effect| matches!(effect, Effect::Reply(_))), "{outcome:?}");
    }
}
