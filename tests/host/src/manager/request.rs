//! The request's way down: wasm filter, buffer filter, router.

use super::{BUFFER, Data, DataStatus, ROUTER, WASM};
use crate::find_header;
use crate::host::Violation;
use crate::stream_state::{Forwarded, Iteration, LocalReply, state_names};
use crate::vm::Vm;

impl Vm {
    pub(super) fn decode_headers(&mut self, id: u32, from: usize, end: bool) {
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

    pub(super) fn decode_data(&mut self, id: u32, from: usize, mut data: Data, end: bool) {
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

    pub(super) fn decode_trailers(&mut self, id: u32, from: usize) {
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

    pub(super) fn continue_decoding(&mut self, id: u32, i: usize) {
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
    pub(super) fn buffer_request(&mut self, id: u32, data: &mut Data, streaming: bool) {
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

    pub(super) fn skips(&self, filter: usize) -> bool {
        filter == BUFFER && !self.host().config.buffer_filter
    }

    pub(super) fn buffer_headers(&mut self, id: u32, end: bool) -> Iteration {
        self.stream_state(id).buffer_engaged = !end;
        if end { Iteration::Continue } else { Iteration::StopSingle }
    }

    /// Counts each byte that passes, also bytes that it has counted before.
    pub(super) fn buffer_data(&mut self, id: u32, data: &Data, end: bool) -> DataStatus {
        let s = self.stream_state(id);
        s.counted_length += data.len(s) as u64;
        if !end {
            return DataStatus::Buffer;
        }
        self.buffer_end(id);
        DataStatus::Continue
    }

    pub(super) fn buffer_end(&mut self, id: u32) {
        let s = self.stream_state(id);
        if s.buffer_engaged && find_header(&s.request.fields, "content-length").is_none() {
            let length = s.counted_length.to_string().into_bytes();
            s.request.fields.push((b"content-length".to_vec(), length));
        }
    }

    pub(super) fn router_headers(&mut self, id: u32, end: bool) -> Iteration {
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

    pub(super) fn router_data(&mut self, id: u32, data: &mut Data, end: bool) -> DataStatus {
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

    pub(super) fn router_trailers(&mut self, id: u32) {
        let s = self.stream_state(id);
        let trailers = s.request_trailers.as_ref().map(|m| m.fields.clone());
        if let Some(forwarded) = &mut s.forwarded {
            forwarded.trailers = trailers;
        }
        self.router_end(id);
    }

    pub(super) fn router_end(&mut self, id: u32) {
        let Some(forwarded) = &mut self.stream_state(id).forwarded else { return };
        forwarded.complete = true;
        let actual = forwarded.body.len() as u64;
        let declared = forwarded.header("content-length").and_then(|v| std::str::from_utf8(v).ok()?.parse().ok());
        if let Some(declared) = declared.filter(|d| *d != actual) {
            self.host_mut().violate(Violation::ContentLengthMismatch { context: id, declared, actual });
        }
    }
}
