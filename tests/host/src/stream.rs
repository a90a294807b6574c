//! The handle by which a test drives one HTTP stream.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use crate::shared::lock;
use crate::stream_state::{ClientView, Forwarded, Iteration, Seen, StreamState, lossy, state_names};
use crate::vm::Vm;
use crate::{Property, pairs};

/// One request in flight on a worker. Dropping the handle does not end the stream.
pub struct Stream {
    pub(crate) vm: Arc<Mutex<Vm>>,
    pub(crate) id: u32,
}

impl Stream {
    /// Identifier of the context in the VM.
    pub fn context(&self) -> u32 {
        self.id
    }

    /// The request's header fields arrive.
    pub fn request_headers<K: AsRef<[u8]>, V: AsRef<[u8]>>(
        &self,
        headers: impl IntoIterator<Item = (K, V)>,
        end_of_stream: bool,
    ) -> Seen {
        let headers = pairs(headers);
        self.drive(|vm| vm.request_headers(self.id, headers, end_of_stream))
    }

    /// A chunk of the request's body arrives; it may be empty.
    pub fn request_body(&self, chunk: impl AsRef<[u8]>, end_of_stream: bool) -> Seen {
        self.drive(|vm| vm.request_body(self.id, chunk.as_ref().to_vec(), end_of_stream))
    }

    /// The request's trailers arrive and end it.
    pub fn request_trailers<K: AsRef<[u8]>, V: AsRef<[u8]>>(&self, fields: impl IntoIterator<Item = (K, V)>) -> Seen {
        let fields = pairs(fields);
        self.drive(|vm| vm.request_trailers(self.id, fields))
    }

    /// The upstream's response header fields arrive, `:status` among them.
    pub fn response_headers<K: AsRef<[u8]>, V: AsRef<[u8]>>(
        &self,
        headers: impl IntoIterator<Item = (K, V)>,
        end_of_stream: bool,
    ) -> Seen {
        let headers = pairs(headers);
        self.drive(|vm| vm.response_headers(self.id, headers, end_of_stream))
    }

    /// A chunk of the upstream's response arrives.
    pub fn response_body(&self, chunk: impl AsRef<[u8]>, end_of_stream: bool) -> Seen {
        self.drive(|vm| vm.response_body(self.id, chunk.as_ref().to_vec(), end_of_stream))
    }

    /// The upstream's trailers arrive and end the response.
    pub fn response_trailers<K: AsRef<[u8]>, V: AsRef<[u8]>>(&self, fields: impl IntoIterator<Item = (K, V)>) -> Seen {
        let fields = pairs(fields);
        self.drive(|vm| vm.response_trailers(self.id, fields))
    }

    /// Ends the stream if it has not ended by itself: log, done, delete, in Envoy's order. A response that ends, and a
    /// local reply, do this by themselves.
    pub fn done(&self) {
        self.drive(|vm| vm.end_stream(self.id));
    }

    /// The client, or the upstream after its headers, goes away.
    pub fn reset(&self) {
        self.drive(|vm| vm.reset(self.id));
    }

    /// Sets a property of this stream, by path with dots.
    pub fn set_property(&self, path: &str, value: impl Into<Property>) {
        let value = value.into();
        self.with(|s| drop(s.properties.insert(path.to_owned(), value)));
    }

    /// The request as it reached the router, `None` as long as nothing did.
    pub fn forwarded(&self) -> Option<Forwarded> {
        self.with(|s| s.forwarded.clone())
    }

    /// What the client has got so far.
    pub fn client(&self) -> ClientView {
        self.with(|s| s.client.clone())
    }

    /// The request side is paused by the filter.
    pub fn is_paused(&self) -> bool {
        self.with(|s| !s.ended && !s.local_complete && s.decode[0].iteration != Iteration::Continue)
    }

    /// How often the filter resumed the request.
    pub fn resumed(&self) -> u32 {
        self.with(|s| s.resumed)
    }

    /// Envoy has stopped reading from the client because a buffer is full; more of the body would never arrive.
    pub fn is_stalled(&self) -> bool {
        self.with(|s| s.read_disabled)
    }

    /// The stream is over and its context deleted.
    pub fn is_ended(&self) -> bool {
        self.with(|s| s.ended)
    }

    /// Filter state now, by full name.
    pub fn filter_state(&self) -> BTreeMap<String, Vec<u8>> {
        self.with(|s| state_names(&s.filter_state))
    }

    /// Every write of filter state in order, by full name.
    pub fn property_writes(&self) -> Vec<(String, Vec<u8>)> {
        self.with(|s| s.property_writes.iter().map(|(k, v)| (lossy(k), v.clone())).collect())
    }

    fn drive(&self, step: impl FnOnce(&mut Vm)) -> Seen {
        let mut vm = lock(&self.vm);
        vm.stream_state(self.id).seen = None;
        step(&mut vm);
        vm.sweep();
        vm.stream_state(self.id).seen.unwrap_or(Seen::Nothing)
    }

    fn with<T>(&self, read: impl FnOnce(&mut StreamState) -> T) -> T {
        read(lock(&self.vm).stream_state(self.id))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        lock(&self.vm).drop_stream(self.id);
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("context", &self.id).finish_non_exhaustive()
    }
}
