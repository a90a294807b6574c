//! Bodies without a prompt: which model they name, and which of their bytes go to the endpoint.

use std::borrow::Cow;

use super::head::{RequestHead, decoded_path};
use crate::body::form::{Form, without};
use crate::body::json::{ScanError, Span};
use crate::body::media::{Media, payloads};
use crate::body::splice::HeadEdit;
use crate::body::{self, Key, KeySet, Scan};
use crate::config::Pool;
use crate::endpoints::fitted_media::{CLASSES, MediaTokens};
use crate::engine::legs;
use crate::paths;
use crate::request::models::Served;
use crate::request::reply::Rejection;

/// A body without a prompt that was read.
pub(super) enum ReadBody {
    /// An object.
    Object(Scan),
    /// A JSON array, and the spans to cut out of it.
    Array(Vec<Span>),
    /// A form.
    Form(Form),
    /// No JSON that an engine could read as an object, and no form.
    Other,
}

impl ReadBody {
    /// # Errors
    /// [`Rejection`] of a body that an engine could read and this filter cannot.
    pub(super) fn read(head: &RequestHead, body: &[u8]) -> Result<Self, Rejection> {
        if let Some(encoding) = &head.form {
            return Form::read(body, encoding.clone()).map(Self::Form).map_err(Rejection::InvalidForm);
        }
        let refused = |error: ScanError| Rejection::InvalidJson(error.to_string());
        match body::scan(body) {
            Ok(scan) => Ok(Self::Object(scan)),
            Err(_) if body.trim_ascii_start().first() == Some(&b'[') && is_json(head) => {
                body::cuts(body).map(Self::Array).map_err(refused)
            }
            Err(error) if may_be_object(head, body) => Err(refused(error)),
            Err(_) => Ok(Self::Other),
        }
    }

    /// The model that the body names; `None` where it names none, or not by a string.
    pub(super) fn model<'a>(&self, body: &'a [u8]) -> Option<Cow<'a, str>> {
        match self {
            Self::Object(scan) => scan.str(body, Key::Model),
            Self::Form(form) => form.text(body, Key::Model.name()),
            Self::Array(_) | Self::Other => None,
        }
    }

    /// Estimated tokens of the body, by the pool's configuration. A form has a recording or an image, and some text.
    pub(super) fn tokens(&self, body: &[u8], pool: &Pool) -> f64 {
        let of_text = |bytes: usize| bytes as f64 / pool.bytes_per_token;
        let without = |media: &[Media]| {
            let payloads = media.iter().map(|media| media.payload.len()).fold(0, usize::saturating_add);
            let media = MediaTokens::of(&pool.media, media).total(&[1.0; CLASSES]);
            of_text(body.len().saturating_sub(payloads)) + media
        };
        match self {
            Self::Object(scan) if !scan.media().is_empty() => without(scan.media()),
            Self::Object(_) | Self::Array(_) => without(&payloads(body)),
            Self::Form(_) => of_text(body.len()).min(pool.media.audio_tokens),
            Self::Other => of_text(body.len()),
        }
    }

    /// The edit that frees the body of [`FORBIDDEN`](body::FORBIDDEN) members and writes another model into it where one
    /// serves in place of the named one.
    ///
    /// # Errors
    /// [`Rejection::InvalidForm`] of a form with a field that an engine could read as JSON and this filter cannot.
    pub(super) fn edit(&self, body: &[u8], served: Option<&Served>) -> Result<HeadEdit, Rejection> {
        let whole = |edited| HeadEdit { drain: u32::try_from(body.len()).unwrap_or(u32::MAX), head: edited };
        let other = served.filter(|served| served.rewrite.is_some());
        Ok(match self {
            Self::Object(scan) => {
                let model = other.and_then(|served| served.rewrite.as_deref());
                legs::decode_plan(body, scan, KeySet::EMPTY, model).with_insert(b"")
            }
            Self::Array(cuts) if !cuts.is_empty() => whole(without(body, cuts)),
            Self::Form(form) => {
                let edited = form.edited(body, other.map(|served| served.model.as_str()));
                edited.map_err(Rejection::InvalidForm)?.map(whole).unwrap_or_default()
            }
            Self::Array(_) | Self::Other => HeadEdit::default(),
        })
    }
}

/// Whether an engine may take the body for JSON: on paths of inference APIs whatever the content type says.
fn is_json(head: &RequestHead) -> bool {
    let content_type = head.headers.get("content-type").unwrap_or_default();
    let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    let is_allowed_only = head.headers.get(":path").is_none_or(|path| {
        let path = decoded_path(path);
        !paths::is_inference(paths::engines_path(&path, &head.config.path_prefixes))
    });
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
