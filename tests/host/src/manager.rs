//! Envoy's filter manager for the chain `wasm → buffer → router`, and the wasm filter's side of it.
//!
//! The order of steps is the substance here: what is buffered when, who sees it, when a deferred action runs. It follows
//! Envoy's filter manager, wasm context and buffer filter.

use crate::host::{Action, Violation};
use crate::stream::{Forwarded, Iteration, LocalReply, Map, Seen, StreamState, View, state_names};
use crate::worker::Vm;
use crate::{Pairs, find_header};

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

// The request's way down.
impl Vm {
    fn decode_headers(&mut self, id: u32, from: usize, end: bool) {
        for i in from..=ROUTER {
            if self.skips(i) {
                continue;
            }
            self.stream_state(id).decode[i].end_stream = end;
            let was = std::mem::replace(&mut self.stream_state(id).in_decode, true);
            let mut status = match i {
                WASM => self.wasm_request_headers(id, end),
                BUFFER => self.buffer_headers(id, end),
                _ => self.router_headers(id, end),
            };
            self.stream_state(id).in_decode = was;
            if self.stream_state(id).decode_aborted {
                self.execute_prepared_reply(id);
                status = Iteration::StopSingle;
            }
            let s = self.stream_state(id);
            if status == Iteration::Continue {
                s.decode[i].headers_continued = true;
            } else {
                s.decode[i].iteration = status;
                return;
            }
        }
    }

    fn decode_data(&mut self, id: u32, from: usize, mut data: Data, end: bool) {
        if self.stream_state(id).local_complete {
            return;
        }
        for i in from..=ROUTER {
            if self.skips(i) {
                continue;
            }
            let s = self.stream_state(id);
            let filter = &mut s.decode[i];
            if filter.iteration.stopped_all() {
                let streaming = filter.iteration == Iteration::StopAllWatermark;
                return self.buffer_request(id, &mut data, streaming);
            }
            if filter.end_stream {
                return;
            }
            filter.end_stream = end && s.request_trailers.is_none();
            let end_here = filter.end_stream;
            let was = std::mem::replace(&mut s.in_decode, true);
            let status = match i {
                WASM => self.wasm_request_data(id, &mut data, end_here),
                BUFFER => self.buffer_data(id, &data, end_here),
                _ => self.router_data(id, &mut data, end_here),
            };
            let s = self.stream_state(id);
            s.in_decode = was;
            if s.decode_aborted {
                return self.execute_prepared_reply(id);
            }
            if s.ended {
                return;
            }
            match status {
                DataStatus::Continue if s.decode[i].iteration == Iteration::StopSingle => {
                    self.buffer_request(id, &mut data, false);
                    return self.continue_decoding(id, i);
                }
                DataStatus::Continue => {}
                DataStatus::Buffer | DataStatus::Watermark => {
                    s.decode[i].iteration = Iteration::StopSingle;
                    return self.buffer_request(id, &mut data, status == DataStatus::Watermark);
                }
                DataStatus::NoBuffer => {
                    s.decode[i].iteration = Iteration::StopSingle;
                    if s.remote_complete && s.request_trailers.is_none() {
                        s.request_body.buffered.get_or_insert_default();
                    }
                    return;
                }
            }
        }
    }

    fn decode_trailers(&mut self, id: u32, from: usize) {
        if self.stream_state(id).local_complete {
            return;
        }
        for i in from..=ROUTER {
            if self.skips(i) {
                continue;
            }
            let s = self.stream_state(id);
            if s.decode[i].iteration.stopped_all() {
                return;
            }
            let was = std::mem::replace(&mut s.in_decode, true);
            let mut goes_on = match i {
                WASM => self.wasm_request_trailers(id),
                BUFFER => {
                    self.buffer_end(id);
                    true
                }
                _ => {
                    self.router_trailers(id);
                    false
                }
            };
            let s = self.stream_state(id);
            s.decode[i].end_stream = true;
            s.in_decode = was;
            if s.decode_aborted {
                self.execute_prepared_reply(id);
                goes_on = false;
            }
            let iteration = &mut self.stream_state(id).decode[i].iteration;
            if goes_on && *iteration == Iteration::StopSingle {
                return self.continue_decoding(id, i);
            }
            if !goes_on {
                if *iteration == Iteration::Continue {
                    *iteration = Iteration::StopSingle;
                }
                return;
            }
        }
    }

    fn continue_decoding(&mut self, id: u32, i: usize) {
        let s = self.stream_state(id);
        if s.local_complete || s.decode[i].iteration == Iteration::Continue {
            return;
        }
        let start = if s.decode[i].iteration.stopped_all() { i } else { i + 1 };
        s.decode[i].iteration = Iteration::Continue;
        if !std::mem::replace(&mut s.decode[i].headers_continued, true) {
            let end = s.remote_complete && s.request_body.buffered.is_none() && s.request_trailers.is_none();
            self.decode_headers(id, i + 1, end);
        }
        let s = self.stream_state(id);
        let has_trailers = s.request_trailers.is_some();
        if s.request_body.buffered.is_some() {
            let end = s.remote_complete && !has_trailers;
            self.decode_data(id, start, Data::Buffered, end);
        }
        if has_trailers {
            self.decode_trailers(id, start);
        }
    }

    /// Moves a chunk into the shared buffer; over the limit that is a 413, or a stop to reading.
    fn buffer_request(&mut self, id: u32, data: &mut Data, streaming: bool) {
        let Data::Chunk(chunk) = data else { return };
        let s = self.stream_state(id);
        s.request_body.buffered.get_or_insert_default().append(chunk);
        if !s.request_body.check_limit() {
            return;
        }
        if streaming {
            s.read_disabled = true;
        } else {
            self.send_local_reply(id, LocalReply::too_large());
        }
    }

    fn skips(&self, filter: usize) -> bool {
        filter == BUFFER && !self.host().config.buffer_filter
    }

    fn buffer_headers(&mut self, id: u32, end: bool) -> Iteration {
        self.stream_state(id).buffer_engaged = !end;
        if end { Iteration::Continue } else { Iteration::StopSingle }
    }

    /// Counts what passes, also what it has counted already.
    fn buffer_data(&mut self, id: u32, data: &Data, end: bool) -> DataStatus {
        let s = self.stream_state(id);
        s.counted_length += data.len(s) as u64;
        if !end {
            return DataStatus::Buffer;
        }
        self.buffer_end(id);
        DataStatus::Continue
    }

    fn buffer_end(&mut self, id: u32) {
        let s = self.stream_state(id);
        if s.buffer_engaged && find_header(&s.request.fields, "content-length").is_none() {
            let length = s.counted_length.to_string().into_bytes();
            s.request.fields.push((b"content-length".to_vec(), length));
        }
    }

    fn router_headers(&mut self, id: u32, end: bool) -> Iteration {
        let at_ns = self.host().config.clock.now_ns();
        let route_headers = self.host().config.route_headers.clone();
        let s = self.stream_state(id);
        let mut headers = s.request.fields.clone();
        for (header, state) in route_headers {
            if let Some(value) = s.filter_state.get(state.as_bytes()) {
                headers.retain(|(k, _)| k != header.as_bytes());
                headers.push((header.into_bytes(), value.clone()));
            }
        }
        let filter_state = state_names(&s.filter_state);
        s.forwarded = Some(Forwarded { headers, filter_state, at_ns, ..Forwarded::default() });
        if end {
            self.router_end(id);
        }
        Iteration::StopSingle
    }

    fn router_data(&mut self, id: u32, data: &mut Data, end: bool) -> DataStatus {
        let s = self.stream_state(id);
        let bytes = data.take(&mut s.request_body.buffered);
        if let Some(forwarded) = &mut s.forwarded {
            forwarded.body.extend_from_slice(&bytes);
        }
        if end {
            self.router_end(id);
        }
        DataStatus::NoBuffer
    }

    fn router_trailers(&mut self, id: u32) {
        let s = self.stream_state(id);
        let trailers = s.request_trailers.as_ref().map(|m| m.fields.clone());
        if let Some(forwarded) = &mut s.forwarded {
            forwarded.trailers = trailers;
        }
        self.router_end(id);
    }

    fn router_end(&mut self, id: u32) {
        let Some(forwarded) = &mut self.stream_state(id).forwarded else { return };
        forwarded.complete = true;
        let actual = forwarded.body.len() as u64;
        let declared = forwarded.header("content-length").and_then(|v| std::str::from_utf8(v).ok()?.parse().ok());
        if let Some(declared) = declared.filter(|d| *d != actual) {
            self.host_mut().violate(Violation::ContentLengthMismatch { context: id, declared, actual });
        }
    }
}

// The response's way up.
impl Vm {
    pub(crate) fn send_local_reply(&mut self, id: u32, reply: LocalReply) {
        let s = self.stream_state(id);
        if s.in_decode {
            s.decode_aborted = true;
        } else if s.in_encode {
            s.encode_aborted = true;
        }
        if !s.response_started {
            if s.in_decode { s.prepare_reply(reply) } else { self.execute_reply(id, reply) }
        } else if !s.response_encoded {
            // Straight to the client, past the filters.
            s.response_encoded = true;
            s.client.headers = Some(reply_headers(&reply));
            s.client.body = reply.body.clone();
            s.client.complete = true;
            s.client.local_reply = Some(reply);
            self.end_stream(id);
        } else {
            self.reset(id);
        }
    }

    fn execute_prepared_reply(&mut self, id: u32) {
        if let Some(reply) = self.stream_state(id).prepared_reply.take() {
            self.execute_reply(id, reply);
        }
    }

    /// Through the filters like a response, this one's own callbacks included.
    fn execute_reply(&mut self, id: u32, reply: LocalReply) {
        if self.stream_state(id).destroyed {
            return;
        }
        let (headers, body) = (reply_headers(&reply), reply.body.clone());
        self.stream_state(id).client.local_reply = Some(reply);
        self.encode_headers(id, headers, body.is_empty());
        if !body.is_empty() && !self.stream_state(id).ended {
            self.encode_data(id, Data::Chunk(body), true, Entry::Upstream);
        }
    }

    fn encode_headers(&mut self, id: u32, headers: Pairs, end: bool) {
        let s = self.stream_state(id);
        s.response_started = true;
        s.local_complete = end;
        s.response = Map { fields: headers, live: false };
        s.encode.end_stream = end;
        let was = std::mem::replace(&mut s.in_encode, true);
        let status = self.wasm_response_headers(id, end);
        let s = self.stream_state(id);
        s.in_encode = was;
        if s.encode_aborted {
            s.encode.iteration = Iteration::StopSingle;
        } else if status == Iteration::Continue {
            s.encode.headers_continued = true;
            self.send_headers(id, end);
        } else {
            s.encode.iteration = status;
        }
    }

    fn encode_data(&mut self, id: u32, mut data: Data, end: bool, entry: Entry) {
        let s = self.stream_state(id);
        if entry == Entry::Upstream {
            s.local_complete = end;
        }
        if entry != Entry::Codec {
            if s.encode.iteration.stopped_all() {
                return self.buffer_response(id, &mut data);
            }
            if s.encode.end_stream {
                return;
            }
            s.encode.end_stream = end && s.response_trailers.is_none();
            let end_here = s.encode.end_stream;
            let was = std::mem::replace(&mut s.in_encode, true);
            let status = self.wasm_response_data(id, &mut data, end_here);
            let s = self.stream_state(id);
            s.in_encode = was;
            if s.encode_aborted || s.ended {
                return;
            }
            match status {
                DataStatus::Continue if s.encode.iteration == Iteration::StopSingle => {
                    self.buffer_response(id, &mut data);
                    return self.continue_encoding(id);
                }
                DataStatus::Continue => {}
                DataStatus::Buffer | DataStatus::Watermark => {
                    s.encode.iteration = Iteration::StopSingle;
                    return self.buffer_response(id, &mut data);
                }
                DataStatus::NoBuffer => {
                    s.encode.iteration = Iteration::StopSingle;
                    if s.local_complete && s.response_trailers.is_none() {
                        s.response_body.buffered.get_or_insert_default();
                    }
                    return;
                }
            }
        }
        let s = self.stream_state(id);
        let bytes = data.take(&mut s.response_body.buffered);
        s.client.body.extend_from_slice(&bytes);
        if end {
            s.client.complete = true;
            self.end_stream(id);
        }
    }

    fn encode_trailers(&mut self, id: u32, entry: Entry) {
        if entry != Entry::Codec {
            let s = self.stream_state(id);
            if s.encode.iteration.stopped_all() {
                return;
            }
            let was = std::mem::replace(&mut s.in_encode, true);
            let goes_on = self.wasm_response_trailers(id);
            let s = self.stream_state(id);
            s.encode.end_stream = true;
            s.in_encode = was;
            if s.encode_aborted || s.ended {
                return;
            }
            if goes_on && s.encode.iteration == Iteration::StopSingle {
                return self.continue_encoding(id);
            }
            if !goes_on {
                s.encode.iteration = Iteration::StopSingle;
                return;
            }
        }
        let s = self.stream_state(id);
        s.client.trailers = s.response_trailers.as_ref().map(|m| m.fields.clone());
        s.client.complete = true;
        self.end_stream(id);
    }

    fn continue_encoding(&mut self, id: u32) {
        let s = self.stream_state(id);
        if s.client.complete || s.encode.iteration == Iteration::Continue {
            return;
        }
        let entry = if s.encode.iteration.stopped_all() { Entry::Resumed } else { Entry::Codec };
        s.encode.iteration = Iteration::Continue;
        if !std::mem::replace(&mut s.encode.headers_continued, true) {
            let end = s.local_complete && s.response_body.buffered.is_none() && s.response_trailers.is_none();
            self.send_headers(id, end);
        }
        let s = self.stream_state(id);
        let has_trailers = s.response_trailers.is_some();
        if s.response_body.buffered.is_some() && !s.ended {
            let end = s.local_complete && !has_trailers;
            self.encode_data(id, Data::Buffered, end, entry);
        }
        if has_trailers && !self.stream_state(id).ended {
            self.encode_trailers(id, entry);
        }
    }

    fn send_headers(&mut self, id: u32, end: bool) {
        let s = self.stream_state(id);
        s.response_encoded = true;
        s.client.headers = Some(s.response.fields.clone());
        if end {
            s.client.complete = true;
            self.end_stream(id);
        }
    }

    fn buffer_response(&mut self, id: u32, data: &mut Data) {
        if let Data::Chunk(chunk) = data {
            self.stream_state(id).response_body.buffered.get_or_insert_default().append(chunk);
        }
    }
}

// The wasm filter.
impl Vm {
    /// The context is made at the first callback; a stream that never got one is made known for its log.
    fn create_context(&mut self, id: u32) {
        let s = self.stream_state(id);
        if std::mem::replace(&mut s.created, true) {
            return;
        }
        let root = s.root;
        self.call_void2("proxy_on_context_create", id, root, |e| e.context_create.clone());
        self.run_actions();
    }

    fn wasm_request_headers(&mut self, id: u32, end: bool) -> Iteration {
        self.create_context(id);
        let s = self.stream_state(id);
        s.request.live = true;
        let count = s.request.fields.len() as u32;
        let status = self.headers_callback("proxy_on_request_headers", id, count, end);
        if status == Iteration::Continue {
            self.stream_state(id).request.live = false;
        } else if !self.stream_state(id).decode_aborted && !self.host().failed {
            self.host_mut().violate(Violation::PausedOnHeaders { context: id });
        }
        status
    }

    fn wasm_request_data(&mut self, id: u32, data: &mut Data, end: bool) -> DataStatus {
        let s = self.stream_state(id);
        if !s.created {
            return DataStatus::Continue;
        }
        if s.request_body.buffering {
            self.buffer_request(id, data, false);
            if self.stream_state(id).destroyed {
                return DataStatus::Buffer;
            }
        }
        lend(data, self.stream_state(id), true);
        let size = self.stream_state(id).request_body.visible().len() as u32;
        let status = self.data_callback("proxy_on_request_body", id, size, end);
        let s = self.stream_state(id);
        take_back(data, s, true);
        s.request_body.buffering = status == DataStatus::Buffer;
        status
    }

    fn wasm_request_trailers(&mut self, id: u32) -> bool {
        let s = self.stream_state(id);
        if !s.created {
            return true;
        }
        let count = live_trailers(&mut s.request_trailers);
        let goes_on = self.trailers_callback("proxy_on_request_trailers", id, count);
        if let Some(trailers) = self.stream_state(id).request_trailers.as_mut().filter(|_| goes_on) {
            trailers.live = false;
        }
        goes_on
    }

    fn wasm_response_headers(&mut self, id: u32, end: bool) -> Iteration {
        let s = self.stream_state(id);
        if !s.created || s.failure_reply_sent {
            return Iteration::Continue;
        }
        s.response.live = true;
        let count = s.response.fields.len() as u32;
        let status = self.headers_callback("proxy_on_response_headers", id, count, end);
        if status == Iteration::Continue {
            self.stream_state(id).response.live = false;
        }
        status
    }

    fn wasm_response_data(&mut self, id: u32, data: &mut Data, end: bool) -> DataStatus {
        let s = self.stream_state(id);
        if !s.created || s.failure_reply_sent {
            return DataStatus::Continue;
        }
        if s.response_body.buffering {
            self.buffer_response(id, data);
        }
        lend(data, self.stream_state(id), false);
        let size = self.stream_state(id).response_body.visible().len() as u32;
        let status = self.data_callback("proxy_on_response_body", id, size, end);
        let s = self.stream_state(id);
        take_back(data, s, false);
        s.response_body.buffering = status == DataStatus::Buffer;
        status
    }

    fn wasm_response_trailers(&mut self, id: u32) -> bool {
        let s = self.stream_state(id);
        if !s.created || s.failure_reply_sent {
            return true;
        }
        let count = live_trailers(&mut s.response_trailers);
        let goes_on = self.trailers_callback("proxy_on_response_trailers", id, count);
        if let Some(trailers) = self.stream_state(id).response_trailers.as_mut().filter(|_| goes_on) {
            trailers.live = false;
        }
        goes_on
    }

    fn headers_callback(&mut self, name: &'static str, id: u32, count: u32, end: bool) -> Iteration {
        if self.fails_stream(id) {
            return Iteration::StopAllWatermark;
        }
        let result = self.call_word3(name, id, (count, end), |e| match name {
            "proxy_on_request_headers" => e.request_headers.clone(),
            _ => e.response_headers.clone(),
        });
        let status = match result {
            Some(0) if !self.host().stop_iteration => Iteration::Continue,
            // Plain Pause too: stock Envoy turns it into "stop everything".
            Some(2) if !self.host().stop_iteration => Iteration::StopAllBuffer,
            _ => Iteration::StopAllWatermark,
        };
        self.note(id, result);
        let failed = self.fails_stream(id);
        self.run_actions();
        if failed { Iteration::StopAllWatermark } else { status }
    }

    fn data_callback(&mut self, name: &'static str, id: u32, size: u32, end: bool) -> DataStatus {
        if self.fails_stream(id) {
            return DataStatus::NoBuffer;
        }
        let result = self.call_word3(name, id, (size, end), |e| match name {
            "proxy_on_request_body" => e.request_body.clone(),
            _ => e.response_body.clone(),
        });
        let status = match result {
            _ if self.host().stop_iteration => DataStatus::NoBuffer,
            Some(0) => DataStatus::Continue,
            Some(1) => DataStatus::Buffer,
            Some(2) => DataStatus::Watermark,
            _ => DataStatus::NoBuffer,
        };
        self.note(id, result);
        let failed = self.fails_stream(id);
        self.run_actions();
        if failed { DataStatus::NoBuffer } else { status }
    }

    fn trailers_callback(&mut self, name: &'static str, id: u32, count: u32) -> bool {
        if self.fails_stream(id) {
            return false;
        }
        let result = self.call_word2(name, id, count, 0, |e| match name {
            "proxy_on_request_trailers" => e.request_trailers.clone(),
            _ => e.response_trailers.clone(),
        });
        let goes_on = result == Some(0) && !self.host().stop_iteration;
        self.note(id, result);
        let failed = self.fails_stream(id);
        self.run_actions();
        goes_on && !failed
    }

    /// A dead VM answers 503 at the stream's next callback, once.
    fn fails_stream(&mut self, id: u32) -> bool {
        if !self.host().failed {
            return false;
        }
        let s = self.stream_state(id);
        if !std::mem::replace(&mut s.failed, true) && !s.failure_reply_sent {
            s.failure_reply_sent = true;
            self.send_local_reply(id, LocalReply::failed_vm());
        }
        true
    }

    fn note(&mut self, id: u32, result: Option<u32>) {
        self.stream_state(id).seen = result.map(|r| if r == 0 { Seen::Continue } else { Seen::Pause });
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

/// Lets the module see a piece of body during a callback.
fn lend(data: &mut Data, s: &mut StreamState, request: bool) {
    let body = if request { &mut s.request_body } else { &mut s.response_body };
    match data {
        Data::Chunk(chunk) => {
            body.chunk = std::mem::take(chunk);
            body.view = View::Chunk;
        }
        Data::Buffered => body.view = View::Buffered,
    }
}

fn take_back(data: &mut Data, s: &mut StreamState, request: bool) {
    let body = if request { &mut s.request_body } else { &mut s.response_body };
    body.view = View::None;
    if let Data::Chunk(chunk) = data {
        *chunk = std::mem::take(&mut body.chunk);
    }
}

fn live_trailers(trailers: &mut Option<Map>) -> u32 {
    trailers.as_mut().map_or(0, |map| {
        map.live = true;
        map.fields.len() as u32
    })
}

/// The reply's header fields as Envoy completes them.
fn reply_headers(reply: &LocalReply) -> Pairs {
    let mut headers = vec![(b":status".to_vec(), reply.code.to_string().into_bytes())];
    headers.extend(reply.headers.iter().cloned());
    if !reply.body.is_empty() {
        headers.retain(|(k, _)| k != b"content-length");
        headers.push((b"content-length".to_vec(), reply.body.len().to_string().into_bytes()));
        if find_header(&headers, "content-type").is_none() {
            headers.push((b"content-type".to_vec(), b"text/plain".to_vec()));
        }
    }
    headers
}
