//! What Envoy keeps of one HTTP stream.

use std::collections::BTreeMap;
use std::fmt;

use crate::abi::{MapType, text, texts};
use crate::{Pairs, Property, find_header};

/// What a callback of the module returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The callback did not arrive: the stream has ended, was stopped at its headers, or the VM is dead.
    Nothing,
    /// `Action::Continue`.
    Continue,
    /// `Action::Pause`, or a value beyond it.
    Pause,
}

/// The request as the router got it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Header fields, with those the route sets.
    pub headers: Pairs,
    /// Body so far.
    pub body: Vec<u8>,
    /// Trailers.
    pub trailers: Option<Pairs>,
    /// The end of the request has reached the router.
    pub complete: bool,
    /// Filter state when the router got the headers, by full name (`wasm.pd.destination`).
    pub filter_state: BTreeMap<String, Vec<u8>>,
    /// When the router got the headers, wall ns.
    pub at_ns: u64,
}

impl Forwarded {
    /// The first value of a header field.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        find_header(&self.headers, name)
    }

    /// Filter state by full name.
    pub fn state(&self, name: &str) -> Option<&[u8]> {
        self.filter_state.get(name).map(Vec::as_slice)
    }
}

/// A reply made in Envoy: by the filter, by the limit on bodies (413), or for a dead VM (503).
#[derive(Clone, PartialEq, Eq)]
pub struct LocalReply {
    /// HTTP status.
    pub code: u32,
    /// Response code details: the filter's own, `request_payload_too_large` or `wasm_fail_stream`.
    pub details: String,
    /// Header fields the filter gave.
    pub headers: Pairs,
    /// Body.
    pub body: Vec<u8>,
}

impl LocalReply {
    pub(crate) fn too_large() -> Self {
        Self::of(413, "request_payload_too_large", "Payload Too Large")
    }

    pub(crate) fn failed_vm() -> Self {
        Self::of(503, "wasm_fail_stream", "")
    }

    fn of(code: u32, details: &str, body: &str) -> Self {
        Self { code, details: details.into(), headers: Pairs::new(), body: body.into() }
    }
}

/// What the client has received.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ClientView {
    /// Response header fields.
    pub headers: Option<Pairs>,
    /// Response body so far.
    pub body: Vec<u8>,
    /// Response trailers.
    pub trailers: Option<Pairs>,
    /// The response has ended.
    pub complete: bool,
    /// The stream was reset, by the client or by Envoy.
    pub reset: bool,
    /// The reply Envoy made itself, if it did.
    pub local_reply: Option<LocalReply>,
}

impl ClientView {
    /// The response status.
    pub fn status(&self) -> Option<u32> {
        std::str::from_utf8(self.header(":status")?).ok()?.parse().ok()
    }

    /// The first value of a response header field.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        find_header(self.headers.as_ref()?, name)
    }
}

/// Iteration state of a filter in Envoy's filter manager.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Iteration {
    #[default]
    Continue,
    StopSingle,
    StopAllBuffer,
    StopAllWatermark,
}

impl Iteration {
    pub(crate) fn stopped_all(self) -> bool {
        matches!(self, Self::StopAllBuffer | Self::StopAllWatermark)
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FilterState {
    pub iteration: Iteration,
    pub headers_continued: bool,
    pub end_stream: bool,
}

/// Which bytes the context's body pointer stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum View {
    #[default]
    None,
    Chunk,
    Buffered,
}

/// A body in one direction: the chunk in flight and the filter manager's buffer, which all filters share.
#[derive(Debug, Default)]
pub(crate) struct Body {
    pub view: View,
    pub chunk: Vec<u8>,
    pub buffered: Option<Vec<u8>>,
    /// The last callback returned Pause, so the module sees the buffer.
    pub buffering: bool,
    pub limit: Option<usize>,
    over_limit: bool,
}

impl Body {
    pub(crate) fn visible(&self) -> &[u8] {
        match (self.buffering, self.view) {
            (true, _) | (false, View::Buffered) => self.buffered.as_deref().unwrap_or_default(),
            (false, View::Chunk) => &self.chunk,
            (false, View::None) => &[],
        }
    }

    pub(crate) fn edit(&mut self) -> Option<&mut Vec<u8>> {
        match (self.buffering, self.view) {
            (true, _) | (false, View::Buffered) => self.buffered.as_mut(),
            (false, View::Chunk) => Some(&mut self.chunk),
            (false, View::None) => None,
        }
    }

    /// Whether the buffer has just passed the limit.
    pub(crate) fn check_limit(&mut self) -> bool {
        let over = self.limit.is_some_and(|limit| self.buffered.as_ref().is_some_and(|b| b.len() > limit));
        let passed = over && !self.over_limit;
        self.over_limit = over;
        passed
    }
}

#[derive(Debug, Default)]
pub(crate) struct Map {
    pub fields: Pairs,
    /// The module can reach it now.
    pub live: bool,
}

/// What Envoy keeps of a stream: the wasm context, the filter manager, the client.
#[derive(Debug, Default)]
pub(crate) struct StreamState {
    pub root: u32,
    pub created: bool,
    pub destroyed: bool,
    pub ended: bool,
    pub failed: bool,
    pub failure_reply_sent: bool,
    pub in_log: bool,
    pub properties: BTreeMap<String, Property>,
    pub filter_state: BTreeMap<Vec<u8>, Vec<u8>>,
    pub property_writes: Vec<(Vec<u8>, Vec<u8>)>,
    pub request: Map,
    pub request_trailers: Option<Map>,
    pub response: Map,
    pub response_trailers: Option<Map>,
    pub request_body: Body,
    pub response_body: Body,
    pub received_bytes: u64,
    pub start_ns: u64,
    pub end_ns: Option<u64>,

    pub decode: [FilterState; 3],
    pub encode: FilterState,
    pub in_decode: bool,
    pub in_encode: bool,
    pub decode_aborted: bool,
    pub encode_aborted: bool,
    pub prepared_reply: Option<LocalReply>,
    pub remote_complete: bool,
    pub local_complete: bool,
    pub response_started: bool,
    pub response_encoded: bool,
    pub read_disabled: bool,
    pub counted_length: u64,
    pub buffer_engaged: bool,

    pub seen: Option<Seen>,
    pub resumed: u32,
    pub forwarded: Option<Forwarded>,
    pub client: ClientView,
    pub orphaned: bool,
}

impl StreamState {
    pub(crate) fn map(&self, kind: MapType) -> Option<&Pairs> {
        let live = |map: &Map| map.live;
        match kind {
            MapType::RequestHeaders => Some(&self.request).filter(|m| m.live || self.in_log).map(|m| &m.fields),
            MapType::ResponseHeaders => {
                Some(&self.response).filter(|m| m.live || self.in_log && self.response_started).map(|m| &m.fields)
            }
            MapType::RequestTrailers if self.in_log => None,
            MapType::RequestTrailers => self.request_trailers.as_ref().filter(|m| live(m)).map(|m| &m.fields),
            MapType::ResponseTrailers => {
                self.response_trailers.as_ref().filter(|m| m.live || self.in_log).map(|m| &m.fields)
            }
            _ => None,
        }
    }

    pub(crate) fn map_mut(&mut self, kind: MapType) -> Option<&mut Pairs> {
        let map = match kind {
            MapType::RequestHeaders => Some(&mut self.request),
            MapType::RequestTrailers => self.request_trailers.as_mut(),
            MapType::ResponseHeaders => Some(&mut self.response),
            MapType::ResponseTrailers => self.response_trailers.as_mut(),
            _ => None,
        };
        map.filter(|m| m.live).map(|m| &mut m.fields)
    }

    pub(crate) fn body(&self, request: bool) -> &Body {
        if request { &self.request_body } else { &self.response_body }
    }

    /// What a resume does to the context before anything else.
    pub(crate) fn forget_request(&mut self) {
        self.request.live = false;
        self.request_body.view = View::None;
        if let Some(trailers) = &mut self.request_trailers {
            trailers.live = false;
        }
    }

    /// Keeps the first reply for after the callback.
    pub(crate) fn prepare_reply(&mut self, reply: LocalReply) {
        self.decode_aborted = true;
        self.prepared_reply.get_or_insert(reply);
    }

    /// Attributes of the stream. Those of request headers live as long as the header map does.
    pub(crate) fn property(&self, path: &[u8], dotted: &str) -> Option<Vec<u8>> {
        if let Some(value) = self.properties.get(dotted) {
            return Some(value.to_bytes());
        }
        let parts: Vec<&[u8]> = path.split(|b| *b == 0).collect();
        let field = |kind, name: &[u8]| {
            let fields = self.map(kind)?;
            let values: Vec<&[u8]> = fields.iter().filter(|(k, _)| k == name).map(|(_, v)| v.as_slice()).collect();
            (!values.is_empty()).then(|| values.join(&b','))
        };
        let request = |name: &str| field(MapType::RequestHeaders, name.as_bytes());
        let path_parts = || {
            let path = request(":path")?;
            let end = path.iter().position(|b| *b == b'?').unwrap_or(path.len());
            let query = path.get(end + 1..).unwrap_or_default().to_vec();
            Some((path[..end].to_vec(), query))
        };
        let int = |n: u64| Some((n as i64).to_le_bytes().to_vec());
        match parts.as_slice() {
            [b"request", b"headers", name] => field(MapType::RequestHeaders, name),
            [b"request", b"path"] => request(":path"),
            [b"request", b"url_path"] => path_parts().map(|(path, _)| path),
            [b"request", b"query"] => path_parts().map(|(_, query)| query),
            [b"request", b"host"] => request(":authority"),
            [b"request", b"method"] => request(":method"),
            [b"request", b"scheme"] => request(":scheme"),
            [b"request", b"referer"] => request("referer"),
            [b"request", b"useragent"] => request("user-agent"),
            [b"request", b"id"] => request("x-request-id"),
            [b"request", b"time"] => int(self.start_ns),
            [b"request", b"protocol"] => Some(b"HTTP/1.1".to_vec()),
            [b"request", b"size"] => int(self.received_bytes),
            [b"request", b"duration"] => int(self.end_ns?.saturating_sub(self.start_ns)),
            [b"response", b"headers", name] => field(MapType::ResponseHeaders, name),
            [b"response", b"code"] => int(self.response_code()?),
            [b"response", b"code_details"] => Some(self.client.local_reply.as_ref()?.details.as_bytes().to_vec()),
            _ => None,
        }
    }

    fn response_code(&self) -> Option<u64> {
        let status = find_header(&self.response.fields, ":status").filter(|_| self.response_started)?;
        std::str::from_utf8(status).ok()?.parse().ok()
    }
}

impl fmt::Debug for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state: Vec<String> = self.filter_state.iter().map(|(k, v)| format!("{k}: {}", text(v))).collect();
        f.debug_struct("Forwarded")
            .field("headers", &texts(&self.headers))
            .field("body", &text(&self.body))
            .field("trailers", &self.trailers.as_ref().map(texts))
            .field("complete", &self.complete)
            .field("filter_state", &state)
            .field("at_ns", &self.at_ns)
            .finish()
    }
}

impl fmt::Debug for LocalReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalReply")
            .field("code", &self.code)
            .field("details", &self.details)
            .field("headers", &texts(&self.headers))
            .field("body", &text(&self.body))
            .finish()
    }
}

impl fmt::Debug for ClientView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientView")
            .field("headers", &self.headers.as_ref().map(texts))
            .field("body", &text(&self.body))
            .field("trailers", &self.trailers.as_ref().map(texts))
            .field("complete", &self.complete)
            .field("reset", &self.reset)
            .field("local_reply", &self.local_reply)
            .finish()
    }
}

pub(crate) fn state_names(state: &BTreeMap<Vec<u8>, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    state.iter().map(|(k, v)| (lossy(k), v.clone())).collect()
}

pub(crate) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
