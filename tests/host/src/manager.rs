//! Envoy's filter manager for the chain `wasm → buffer → router`, and the wasm filter's side of it.
//!
//! The order of steps is the substance here: when data is buffered, which filter sees it, when a deferred action runs. It
//! follows Envoy's filter manager, wasm context and buffer filter.

use crate::Pairs;
use crate::host::{Action, Violation};
use crate::stream_state::{Iteration, Map, StreamState};
use crate::vm::Vm;

mod request;
mod response;
mod wasm;

const WASM: usize = 0;
const BUFFER: usize = 1;
const ROUTER: usize = 2;

/// A piece of body on its way: on its own, or all that is buffered.
enum Data {
    Chunk(Vec<u8>),
    Buffered,
}

/// What a filter says to a piece of body.
#[derive(Clone, Copy, PartialEq, Eq)]
enum DataStatus {
    Continue,
    Buffer,
    Watermark,
    NoBuffer,
}

/// Where a piece of the response comes in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entry {
    Upstream,
    Resumed,
    Codec,
}

// What arrives from outside.
impl Vm {
    pub(crate) fn request_headers(&mut self, id: u32, headers: Pairs, end: bool) {
        let now = self.host().config.clock.now_ns();
        let limit = self.host().config.request_limit_bytes;
        let s = self.stream_state(id);
        s.start_ns = now;
        s.request = Map { fields: headers, live: false };
        s.request_body.limit = limit;
        s.remote_complete = end;
        self.decode_headers(id, WASM, end);
    }

    pub(crate) fn request_body(&mut self, id: u32, chunk: Vec<u8>, end: bool) {
        let s = self.stream_state(id);
        if s.ended {
            return;
        }
        s.received_bytes += chunk.len() as u64;
        s.remote_complete = end;
        self.decode_data(id, WASM, Data::Chunk(chunk), end);
    }

    pub(crate) fn request_trailers(&mut self, id: u32, fields: Pairs) {
        let s = self.stream_state(id);
        if s.ended {
            return;
        }
        s.remote_complete = true;
        s.request_trailers = Some(Map { fields, live: false });
        self.decode_trailers(id, WASM);
    }

    pub(crate) fn response_headers(&mut self, id: u32, headers: Pairs, end: bool) {
        if !self.stream_state(id).ended {
            self.encode_headers(id, headers, end);
        }
    }

    pub(crate) fn response_body(&mut self, id: u32, chunk: Vec<u8>, end: bool) {
        if !self.stream_state(id).ended {
            self.encode_data(id, Data::Chunk(chunk), end, Entry::Upstream);
        }
    }

    pub(crate) fn response_trailers(&mut self, id: u32, fields: Pairs) {
        let s = self.stream_state(id);
        if s.ended {
            return;
        }
        s.local_complete = true;
        s.response_trailers = Some(Map { fields, live: false });
        self.encode_trailers(id, Entry::Upstream);
    }

    pub(crate) fn reset(&mut self, id: u32) {
        let s = self.stream_state(id);
        if !s.ended {
            s.client.reset = true;
            s.local_complete = true;
            self.end_stream(id);
        }
    }

    /// Access log first, then the filters go: the module sees log, done, delete.
    pub(crate) fn end_stream(&mut self, id: u32) {
        let now = self.host().config.clock.now_ns();
        let s = self.stream_state(id);
        if std::mem::replace(&mut s.ended, true) {
            return;
        }
        s.end_ns = Some(now);
        s.local_complete = true;
        self.create_context(id);
        self.stream_state(id).in_log = true;
        self.call_void1("proxy_on_log", id, |e| e.log.clone());
        self.stream_state(id).in_log = false;
        self.stream_state(id).destroyed = true;
        self.call_word1("proxy_on_done", id, 1, |e| e.done.clone());
        self.run_actions();
        self.call_void1("proxy_on_delete", id, |e| e.delete.clone());
    }

    /// What the module asked for during a callback, now that the VM has returned.
    pub(crate) fn run_actions(&mut self) {
        self.host_mut().stop_iteration = false;
        while let Some(action) = self.host_mut().actions.pop_front() {
            match action {
                Action::ContinueRequest(id) => self.resume_request(id),
                Action::ContinueResponse(id) => {
                    if self.is_live(id, "resume of the response") {
                        self.continue_encoding(id);
                    }
                }
                Action::Reset(id) => {
                    if self.is_live(id, "reset") {
                        self.reset(id);
                    }
                }
                Action::LocalReply(id, reply) => {
                    if self.is_live(id, "local reply") {
                        self.send_local_reply(id, reply);
                    }
                }
                Action::DeleteRoot(id) => self.delete_root(id),
                Action::ForgetAnswer => {
                    self.host_mut().call_response = None;
                    self.host_mut().status_message = "";
                }
            }
        }
    }

    fn resume_request(&mut self, id: u32) {
        if !self.is_live(id, "resume") {
            return;
        }
        let s = self.stream_state(id);
        s.resumed += 1;
        let iteration = s.decode[WASM].iteration;
        if s.local_complete {
            return;
        }
        if iteration == Iteration::Continue {
            return self.host_mut().violate(Violation::ResumeWithoutPause { context: id });
        }
        if !s.remote_complete && !iteration.stopped_all() {
            self.host_mut().violate(Violation::ResumeBeforeEndOfStream { context: id });
        }
        self.continue_decoding(id, WASM);
    }

    fn is_live(&mut self, id: u32, action: &'static str) -> bool {
        let live = !self.stream_state(id).ended;
        if !live {
            self.host_mut().violate(Violation::ActionAfterEnd { context: id, action });
        }
        live
    }
}

impl Data {
    fn len(&self, s: &StreamState) -> usize {
        match self {
            Self::Chunk(chunk) => chunk.len(),
            Self::Buffered => s.request_body.buffered.as_ref().map_or(0, Vec::len),
        }
    }

    /// Takes the bytes; of a buffer an empty one stays.
    fn take(&mut self, buffered: &mut Option<Vec<u8>>) -> Vec<u8> {
        match self {
            Self::Chunk(chunk) => std::mem::take(chunk),
            Self::Buffered => buffered.as_mut().map(std::mem::take).unwrap_or_default(),
        }
    }
}
