//! The wasm filter's side of it: callbacks of the module, and what their results mean.

use super::{Data, DataStatus};
use crate::host::Violation;
use crate::stream_state::{Iteration, LocalReply, Map, Seen, StreamState, View};
use crate::vm::Vm;

impl Vm {
    /// The context is made at the first callback; a stream that never got one is made known for its log.
    pub(super) fn create_context(&mut self, id: u32) {
        let s = self.stream_state(id);
        if std::mem::replace(&mut s.created, true) {
            return;
        }
        let root = s.root;
        self.call_void2("proxy_on_context_create", id, root, |e| e.context_create.clone());
        self.run_actions();
    }

    pub(super) fn wasm_request_headers(&mut self, id: u32, end: bool) -> Iteration {
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

    pub(super) fn wasm_request_data(&mut self, id: u32, data: &mut Data, end: bool) -> DataStatus {
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

    pub(super) fn wasm_request_trailers(&mut self, id: u32) -> bool {
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

    pub(super) fn wasm_response_headers(&mut self, id: u32, end: bool) -> Iteration {
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

    pub(super) fn wasm_response_data(&mut self, id: u32, data: &mut Data, end: bool) -> DataStatus {
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

    pub(super) fn wasm_response_trailers(&mut self, id: u32) -> bool {
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

    pub(super) fn headers_callback(&mut self, name: &'static str, id: u32, count: u32, end: bool) -> Iteration {
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

    pub(super) fn data_callback(&mut self, name: &'static str, id: u32, size: u32, end: bool) -> DataStatus {
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

    pub(super) fn trailers_callback(&mut self, name: &'static str, id: u32, count: u32) -> bool {
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
    pub(super) fn fails_stream(&mut self, id: u32) -> bool {
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

    pub(super) fn note(&mut self, id: u32, result: Option<u32>) {
        self.stream_state(id).seen = result.map(|r| if r == 0 { Seen::Continue } else { Seen::Pause });
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
