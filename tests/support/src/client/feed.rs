//! Bodies of requests: of known length, or fed while the request runs.

use std::io;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::channel::mpsc;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;

/// Body of a request.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The end of a request body from which it is fed. Dropping it ends the body; see also [`Feed::break_off`].
pub struct Feed(mpsc::UnboundedSender<io::Result<Frame<Bytes>>>);

impl Feed {
    /// A body to feed, chunked in HTTP/1.1.
    #[must_use]
    pub fn new() -> (Self, Body) {
        let (sender, receiver) = mpsc::unbounded();
        (Self(sender), StreamBody::new(receiver.map(|frame: io::Result<Frame<Bytes>>| frame)).boxed_unsync())
    }

    /// Sends a part. Does nothing if the request has ended.
    pub fn send(&self, part: impl Into<Bytes>) {
        let _ = self.0.unbounded_send(Ok(Frame::data(part.into())));
    }

    /// Ends the body by an error: the client gives the request up.
    pub fn break_off(self) {
        let _ = self.0.unbounded_send(Err(io::ErrorKind::BrokenPipe.into()));
    }
}

/// A body of known length.
#[must_use]
pub fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}
