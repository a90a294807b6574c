//! Knobs that make things go wrong, and ways to cut a request into pieces.

use crate::{Pairs, Stream, Worker, pairs};

/// How a host call fails instead of doing its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The next call returns this status.
    Once(u32),
    /// Every call returns this status until the fault is cleared.
    Always(u32),
    /// This many calls work, then one returns the status: `(calls, status)`.
    After(u32, u32),
}

/// When the client goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientGone {
    /// Right after the request headers.
    AfterHeaders,
    /// After the first chunk of the body.
    AfterFirstChunk,
    /// After the whole body, with call-outs open.
    AfterBody,
    /// After the response headers.
    AfterResponseHeaders,
    /// After a part of the response body.
    InResponse,
}

impl ClientGone {
    /// Every phase, in order.
    pub const ALL: [Self; 5] =
        [Self::AfterHeaders, Self::AfterFirstChunk, Self::AfterBody, Self::AfterResponseHeaders, Self::InResponse];
}

/// A request to be sent in pieces.
#[derive(Clone, Debug)]
pub struct Request {
    /// Header fields, pseudo headers first.
    pub headers: Pairs,
    /// The body's chunks. Empty: the headers end the stream.
    pub chunks: Vec<Vec<u8>>,
    /// End the body with a chunk of zero bytes instead of the last one.
    pub empty_final_chunk: bool,
    /// Trailers after the body.
    pub trailers: Option<Pairs>,
}

impl Request {
    /// `POST path` with a JSON body in one chunk and a content length.
    pub fn post(path: &str, body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref().to_vec();
        let length = body.len().to_string();
        Self {
            headers: pairs([
                (":method", "POST"),
                (":path", path),
                (":authority", "gateway"),
                (":scheme", "http"),
                ("content-type", "application/json"),
                ("content-length", length.as_str()),
            ]),
            chunks: vec![body],
            empty_final_chunk: false,
            trailers: None,
        }
    }

    /// `GET path` without a body.
    pub fn get(path: &str) -> Self {
        Self {
            headers: pairs([(":method", "GET"), (":path", path), (":authority", "gateway"), (":scheme", "http")]),
            chunks: Vec::new(),
            empty_final_chunk: false,
            trailers: None,
        }
    }

    /// Adds a header field; the value may be any bytes.
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.headers.push((name.as_bytes().to_vec(), value.as_ref().to_vec()));
        self
    }

    /// Cuts the body differently.
    pub fn chunks(mut self, chunks: Vec<Vec<u8>>) -> Self {
        self.chunks = chunks;
        self
    }

    /// Ends the body with an empty chunk.
    pub fn empty_final_chunk(mut self) -> Self {
        self.empty_final_chunk = true;
        self
    }

    /// Adds trailers.
    pub fn trailers(mut self, trailers: Pairs) -> Self {
        self.trailers = Some(trailers);
        self
    }

    /// Sends the whole request on a new stream.
    pub fn send(&self, worker: &Worker) -> Stream {
        let stream = worker.stream();
        self.send_headers(&stream);
        self.send_rest(&stream, 0);
        stream
    }

    /// Sends the request up to the phase in which the client goes away, then resets the stream. Phases of the response
    /// are driven with a plain 200, if the request was forwarded.
    pub fn send_then_leave(&self, worker: &Worker, gone: ClientGone) -> Stream {
        let stream = worker.stream();
        self.send_headers(&stream);
        if gone != ClientGone::AfterHeaders {
            match (gone, self.chunks.first()) {
                (ClientGone::AfterFirstChunk, Some(first)) => drop(stream.request_body(first, false)),
                _ => self.send_rest(&stream, 0),
            }
        }
        if matches!(gone, ClientGone::AfterResponseHeaders | ClientGone::InResponse) && stream.forwarded().is_some() {
            stream.response_headers([(":status", "200")], false);
            if gone == ClientGone::InResponse {
                stream.response_body(b"{", false);
            }
        }
        stream.reset();
        stream
    }

    fn send_headers(&self, stream: &Stream) {
        let end = self.chunks.is_empty() && !self.empty_final_chunk && self.trailers.is_none();
        stream.request_headers(self.headers.iter().map(|(k, v)| (k, v)), end);
    }

    fn send_rest(&self, stream: &Stream, from: usize) {
        let last = self.chunks.len();
        for (i, chunk) in self.chunks.iter().enumerate().skip(from) {
            let end = i + 1 == last && !self.empty_final_chunk && self.trailers.is_none();
            stream.request_body(chunk, end);
        }
        if self.empty_final_chunk {
            stream.request_body(b"", self.trailers.is_none());
        }
        if let Some(trailers) = &self.trailers {
            stream.request_trailers(trailers.iter().map(|(k, v)| (k, v)));
        }
    }
}

/// Every way to cut a body in two, the cuts at its ends included.
pub fn split_at_each_byte(body: &[u8]) -> impl Iterator<Item = Vec<Vec<u8>>> + '_ {
    (0..=body.len()).map(|bytes| vec![body[..bytes].to_vec(), body[bytes..].to_vec()])
}

/// Cuts a body into chunks of 0 to `max` bytes, the same ones for the same seed.
pub fn random_chunks(body: &[u8], max: usize, seed: u64) -> Vec<Vec<u8>> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut rest = body;
    let mut chunks = Vec::new();
    while !rest.is_empty() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let len = usize::try_from(state % (max.max(1) as u64 + 1)).unwrap_or(1).min(rest.len());
        let (head, tail) = rest.split_at(len);
        chunks.push(head.to_vec());
        rest = tail;
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_add_up_to_the_body() {
        let body: Vec<u8> = (0..=255).collect();
        for seed in 0..50 {
            assert_eq!(random_chunks(&body, 7, seed).concat(), body);
        }
        assert_eq!(split_at_each_byte(&body).count(), 257);
        assert!(split_at_each_byte(&body).all(|c| c.concat() == body));
    }
}
