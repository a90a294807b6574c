//! The last requests, byte for byte, so that a test can compare them with what was sent.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Method, Version};
use serde_json::{Value, json};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Counts recorded requests from 0.
    pub sequence: u64,
    /// Method.
    pub method: Method,
    /// Path and query.
    pub path: String,
    /// HTTP version.
    pub version: Version,
    /// Headers; values may be any bytes.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl Recorded {
    /// The first value of a header, where it is text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body as text, with replacement characters where it is none.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn to_json(&self) -> Value {
        let headers: Vec<Value> = self
            .headers
            .iter()
            .map(|(name, value)| {
                let mut header = json!({"name": name.as_str(), "value": String::from_utf8_lossy(value.as_bytes())});
                if std::str::from_utf8(value.as_bytes()).is_err() {
                    header["value_base64"] = base64(value.as_bytes()).into();
                }
                header
            })
            .collect();
        let mut request = json!({
            "sequence": self.sequence,
            "method": self.method.as_str(),
            "path": self.path,
            "version": format!("{:?}", self.version),
            "headers": headers,
        });
        match std::str::from_utf8(&self.body) {
            Ok(text) => request["body"] = text.into(),
            Err(_) => request["body_base64"] = base64(&self.body).into(),
        }
        request
    }
}

/// The last requests, oldest first.
pub(crate) struct Recorder {
    keep: usize,
    state: Mutex<(u64, VecDeque<Recorded>)>,
}

impl Recorder {
    pub(crate) fn new(keep: usize) -> Self {
        Self { keep, state: Mutex::new((0, VecDeque::new())) }
    }

    pub(crate) fn record(&self, parts: &Parts, body: &Bytes) {
        if self.keep == 0 {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (sequence, last) = &mut *state;
        if last.len() >= self.keep {
            last.pop_front();
        }
        last.push_back(Recorded {
            sequence: *sequence,
            method: parts.method.clone(),
            path: parts.uri.path_and_query().map_or_else(|| parts.uri.to_string(), |path| path.as_str().to_owned()),
            version: parts.version,
            headers: parts.headers.clone(),
            body: body.clone(),
        });
        *sequence += 1;
    }

    pub(crate) fn all(&self) -> Vec<Recorded> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1.iter().cloned().collect()
    }

    pub(crate) fn clear(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1.clear();
    }

    pub(crate) fn to_json(&self) -> Value {
        self.all().iter().map(Recorded::to_json).collect()
    }
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let index = (bits >> (18 - 6 * i) & 63) as usize;
            text.push(if i <= chunk.len() { char::from(ALPHABET[index]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_the_standard_one() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0x00]), "//4A");
    }

    #[test]
    fn keeps_the_last_requests_only() {
        let recorder = Recorder::new(2);
        for path in ["/a", "/b?c=d", "/e"] {
            let (parts, ()) = http::Request::builder().uri(path).body(()).unwrap().into_parts();
            recorder.record(&parts, &Bytes::from_static(b"\xff"));
        }
        let paths: Vec<_> = recorder.all().into_iter().map(|request| (request.sequence, request.path)).collect();
        assert_eq!(paths, [(1, "/b?c=d".to_owned()), (2, "/e".to_owned())]);
        assert_eq!(recorder.to_json()[0]["body_base64"], "/w==");
    }
}
