//! The response's way up, local replies among them.

use super::{Data, DataStatus, Entry};
use crate::stream_state::{Iteration, LocalReply, Map};
use crate::vm::Vm;
use crate::{Pairs, find_header};

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

    pub(super) fn execute_prepared_reply(&mut self, id: u32) {
        if let Some(reply) = self.stream_state(id).prepared_reply.take() {
            self.execute_reply(id, reply);
        }
    }

    /// Through the filters like a response, this one's own callbacks included.
    pub(super) fn execute_reply(&mut self, id: u32, reply: LocalReply) {
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

    pub(super) fn encode_headers(&mut self, id: u32, headers: Pairs, end: bool) {
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

    pub(super) fn encode_data(&mut self, id: u32, mut data: Data, end: bool, entry: Entry) {
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

    pub(super) fn encode_trailers(&mut self, id: u32, entry: Entry) {
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

    pub(super) fn continue_encoding(&mut self, id: u32) {
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

    pub(super) fn send_headers(&mut self, id: u32, end: bool) {
        let s = self.stream_state(id);
        s.response_encoded = true;
        s.client.headers = Some(s.response.fields.clone());
        if end {
            s.client.complete = true;
            self.end_stream(id);
        }
    }

    pub(super) fn buffer_response(&mut self, id: u32, data: &mut Data) {
        if let Data::Chunk(chunk) = data {
            self.stream_state(id).response_body.buffered.get_or_insert_default().append(chunk);
        }
    }
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
