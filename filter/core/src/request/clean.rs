//! Bodies without a prompt: they are forwarded without the members that no client may send.

use super::head::{RequestHead, decoded_path};
use crate::body::form::{Form, without};
use crate::body::json::ScanError;
use crate::body::splice::HeadEdit;
use crate::body::{self, KeySet};
use crate::engine::legs;
use crate::paths;
use crate::request::reply::Rejection;

/// The edit that frees a body of [`FORBIDDEN`](body::FORBIDDEN) members.
///
/// # Errors
/// [`Rejection`] of a body that an engine could read and this filter cannot.
pub(super) fn cleaned(head: &RequestHead, body: &[u8]) -> Result<HeadEdit, Rejection> {
    let whole = |edited| HeadEdit { drain: u32::try_from(body.len()).unwrap_or(u32::MAX), head: edited };
    if let Some(encoding) = &head.form {
        let form = Form::read(body, encoding.clone()).and_then(|form| form.edited(body, None));
        return form.map(|edited| edited.map(whole).unwrap_or_default()).map_err(Rejection::InvalidForm);
    }
    let refused = |error: ScanError| Rejection::InvalidJson(error.to_string());
    match body::scan(body) {
        Ok(scan) => Ok(legs::decode_plan(body, &scan, KeySet::EMPTY, None).with_insert(b"")),
        Err(_) if body.trim_ascii_start().first() == Some(&b'[') && is_json(head) => {
            let cuts = body::cuts(body).map_err(refused)?;
            Ok(if cuts.is_empty() { HeadEdit::default() } else { whole(without(body, &cuts)) })
        }
        Err(error) if may_be_object(head, body) => Err(refused(error)),
        Err(_) => Ok(HeadEdit::default()),
    }
}

/// Whether an engine may take the body for JSON: on paths of inference APIs whatever the content type says.
fn is_json(head: &RequestHead) -> bool {
    let content_type = head.headers.get("content-type").unwrap_or_default();
    let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    let is_allowed_only = head.headers.get(":path").is_none_or(|path| !paths::is_inference(&decoded_path(path)));
    !is_allowed_only || essence.is_empty() || essence.to_ascii_lowercase().ends_with(b"json")
}

/// Whether an engine could read an object, and hand-over parameters in it, where our scan finds none. Python's parser
/// takes UTF-16 and UTF-32, byte order marks, `NaN`, halves of surrogate pairs and any depth.
fn may_be_object(head: &RequestHead, body: &[u8]) -> bool {
    let first = body.trim_ascii_start().first();
    is_json(head) && !matches!(first, None | Some(b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n'))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::Config;
    use crate::headers::Headers;
    use crate::request::head::Claims;

    #[test]
    fn on_unknown_paths_only_what_a_lenient_parser_may_take_for_an_object_is_suspect() {
        let may_be = |content_type: &str, body: &[u8]| {
            let headers = Headers::from_pairs([("content-type", content_type), (":path", "/own")]);
            let config = Arc::new(Config::parse(b"").unwrap());
            let claims = Claims::default();
            let head = RequestHead {
                config,
                headers,
                api: None,
                form: None,
                phase: None,
                prefiller: None,
                claims,
                subset: None,
            };
            may_be_object(&head, body)
        };
        let suspects: [&[u8]; 5] = [b"{", b" {\"x\":NaN}", b"\xef\xbb\xbf{}", b"{\0}\0", b"\0{\0}"];
        for body in suspects {
            assert!(may_be("application/json; charset=utf-16", body), "{body:?}");
            assert!(may_be("", body) && may_be("application/x+JSON", body), "{body:?}");
            assert!(!may_be("application/octet-stream", body), "{body:?}");
        }
        for body in [&b"[NaN]"[..], b"", b" ", b"null", b"\"x"] {
            assert!(!may_be("application/json", body), "{body:?}");
        }
    }
}
