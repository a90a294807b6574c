//! An HTTP client of one connection at a time, over HTTP/1.1 or HTTP/2 with prior knowledge, that hands bytes on as they
//! are. It connects again when the peer has closed or announced that it will, never to send a request again.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use futures::channel::mpsc;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::ext::Protocol;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::wait::PATIENCE;

/// Protocol of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Http {
    /// HTTP/1.1.
    One,
    /// HTTP/2 with prior knowledge.
    Two,
}

/// Both protocols.
pub const BOTH: [Http; 2] = [Http::One, Http::Two];

/// Body of a request.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Why there is no answer.
#[derive(Debug)]
pub struct Broken(String);

impl Broken {
    /// That there is none for this reason.
    #[must_use]
    pub fn of(why: &str) -> Self {
        Self(why.to_owned())
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Broken {}

fn broken(error: impl fmt::Debug) -> Broken {
    Broken(format!("{error:?}"))
}

/// A connection. Dropping it closes it, in whatever state its requests are.
pub struct Client {
    address: SocketAddr,
    http: Http,
    sender: Sender,
    driver: JoinHandle<()>,
    connections: u32,
    is_closing: bool,
    patience: Duration,
}

enum Sender {
    One(http1::SendRequest<Body>),
    Two(http2::SendRequest<Body>),
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

/// An answer whose body is read as it comes.
pub struct Streaming {
    /// Status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    body: Incoming,
    read: BytesMut,
}

/// The end of a request body from which it is fed. Dropping it ends the body; see also [`Feed::break_off`].
pub struct Feed(mpsc::UnboundedSender<io::Result<Frame<Bytes>>>);

impl Client {
    /// Connects.
    ///
    /// # Panics
    /// When that fails.
    pub async fn connect(address: SocketAddr, http: Http) -> Self {
        Self::try_connect(address, http).await.unwrap_or_else(|error| panic!("{address}: {error}"))
    }

    /// Connects.
    ///
    /// # Errors
    /// [`Broken`]
    pub async fn try_connect(address: SocketAddr, http: Http) -> Result<Self, Broken> {
        let stream = TcpStream::connect(address).await.map_err(broken)?;
        let _ = stream.set_nodelay(true);
        let io = TokioIo::new(stream);
        let (sender, driver) = match http {
            Http::One => {
                let (sender, connection) = http1::handshake(io).await.map_err(broken)?;
                (Sender::One(sender), tokio::spawn(async { drop(connection.await) }))
            }
            Http::Two => {
                let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.map_err(broken)?;
                (Sender::Two(sender), tokio::spawn(async { drop(connection.await) }))
            }
        };
        Ok(Self { address, http, sender, driver, connections: 1, is_closing: false, patience: PATIENCE })
    }

    /// Waits that long for whole answers.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Protocol.
    #[must_use]
    pub fn http(&self) -> Http {
        self.http
    }

    /// Connections that it took so far: an HTTP/1.1 server may close one after an answer, any server when it drains.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.connections
    }

    /// A request without headers or body.
    ///
    /// # Panics
    /// When method or path is none.
    #[must_use]
    pub fn request(&self, method: &str, path: &str) -> Request<Body> {
        self.try_request(method, path).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    fn try_request(&self, method: &str, path: &str) -> Result<Request<Body>, Broken> {
        let request = Request::builder().method(method);
        let request = match self.http {
            Http::One => request.uri(path).header("host", self.address.to_string()),
            Http::Two => request.uri(format!("http://{}{path}", self.address)),
        };
        request.body(full(Bytes::new())).map_err(broken)
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// [`Broken`]
    pub async fn try_send(&mut self, request: Request<Body>) -> Result<Answer, Broken> {
        let patience = self.patience;
        let whole = async {
            let response = self.start(request).await?;
            let (parts, body) = response.into_parts();
            let body = body.collect().await.map_err(broken)?.to_bytes();
            Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, body })
        };
        tokio::time::timeout(patience, whole).await.map_err(broken)?
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Panics
    /// When there is none.
    pub async fn send(&mut self, request: Request<Body>) -> Answer {
        let what = format!("{} {} over {:?}", request.method(), request.uri(), self.http);
        self.try_send(request).await.unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// Sends a request and returns once the answer's headers are there.
    ///
    /// # Panics
    /// When they do not come.
    pub async fn open(&mut self, request: Request<Body>) -> Streaming {
        self.try_open(request).await.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Sends a request and returns once the answer's headers are there.
    ///
    /// # Errors
    /// [`Broken`]
    pub async fn try_open(&mut self, request: Request<Body>) -> Result<Streaming, Broken> {
        let response = tokio::time::timeout(self.patience, self.start(request)).await.map_err(broken)?;
        let (parts, body) = response?.into_parts();
        Ok(Streaming { status: parts.status.as_u16(), headers: parts.headers, body, read: BytesMut::new() })
    }

    /// Asks for a WebSocket over HTTP/2 (RFC 8441): the answer, and the connection if the answer takes it.
    ///
    /// # Errors
    /// [`Broken`]
    pub async fn web_socket(&mut self, path: &str) -> Result<(Answer, Option<TokioIo<Upgraded>>), Broken> {
        // The server allows it in its settings, which are there with the first answer.
        self.get("/.pd-ready").await;
        let mut request = self.request("CONNECT", path);
        request.extensions_mut().insert(Protocol::from_static("websocket"));
        let mut response = tokio::time::timeout(PATIENCE, self.start(request)).await.map_err(broken)??;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        if status == 200 {
            let upgraded = hyper::upgrade::on(&mut response).await.map_err(broken)?;
            return Ok((Answer { status, headers, body: Bytes::new() }, Some(TokioIo::new(upgraded))));
        }
        let body = response.into_body().collect().await.map_err(broken)?.to_bytes();
        Ok((Answer { status, headers, body }, None))
    }

    /// `GET path`.
    pub async fn get(&mut self, path: &str) -> Answer {
        self.send(self.request("GET", path)).await
    }

    /// `POST path` with a JSON body.
    pub async fn post(&mut self, path: &str, body: impl Into<Bytes>) -> Answer {
        self.send(self.json(path, body, &[])).await
    }

    /// A `POST` request with a JSON body and more headers, whose values may be any bytes that HTTP allows.
    ///
    /// # Panics
    /// When a header is none.
    #[must_use]
    pub fn json(&self, path: &str, body: impl Into<Bytes>, headers: &[(&str, &[u8])]) -> Request<Body> {
        let mut request = self.request("POST", path);
        *request.body_mut() = full(body.into());
        let own: [(&str, &[u8]); 1] = [("content-type", b"application/json")];
        for (name, value) in own.iter().chain(headers) {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap_or_else(|_| panic!("header {name}"));
            let value = HeaderValue::from_bytes(value).unwrap_or_else(|_| panic!("value of {name}"));
            request.headers_mut().append(name, value);
        }
        request
    }

    async fn start(&mut self, mut request: Request<Body>) -> Result<Response<Incoming>, Broken> {
        loop {
            if self.is_closing || !self.is_ready().await {
                let connections = self.connections + 1;
                *self = Self::try_connect(self.address, self.http).await?.with_patience(self.patience);
                self.connections = connections;
            }
            let sent = match &mut self.sender {
                Sender::One(sender) => sender.try_send_request(request).await,
                Sender::Two(sender) => sender.try_send_request(request).await,
            };
            match sent.map_err(|mut error| (error.take_message(), error.into_error())) {
                Ok(response) => {
                    self.is_closing = response.headers().get("connection").is_some_and(|value| value == "close");
                    return Ok(response);
                }
                // The peer announced the connection's end before the first byte left.
                Err((Some(unsent), _)) => (self.is_closing, request) = (true, unsent),
                Err((None, error)) => return Err(broken(error)),
            }
        }
    }

    async fn is_ready(&mut self) -> bool {
        match &mut self.sender {
            Sender::One(sender) => sender.ready().await.is_ok(),
            Sender::Two(sender) => sender.ready().await.is_ok(),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Answer {
    /// This answer, if its status is 200.
    ///
    /// # Errors
    /// [`Broken`] with another status.
    pub fn ok(self) -> Result<Self, Broken> {
        if self.status == 200 {
            Ok(self)
        } else {
            Err(Broken(format!("status {} {}", self.status, self.text().trim())))
        }
    }

    /// Body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Body as JSON; `null` where it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// A header's first value, where it is text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The filter's reason code.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.header("x-pd-reason")
    }
}

impl Streaming {
    /// The next piece of the body; `None` at its end.
    ///
    /// # Errors
    /// [`Broken`] when the body breaks off.
    pub async fn piece(&mut self) -> Result<Option<Bytes>, Broken> {
        let next = async {
            while let Some(frame) = self.body.frame().await {
                if let Ok(data) = frame.map_err(broken)?.into_data() {
                    return Ok(Some(data));
                }
            }
            Ok(None)
        };
        tokio::time::timeout(PATIENCE, next).await.map_err(broken)?
    }

    /// The next server-sent event with its empty line; `None` at the end.
    ///
    /// # Errors
    /// [`Broken`] when the body breaks off.
    pub async fn event(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            if let Some(end) = self.read.windows(2).position(|two| two == b"\n\n") {
                return Ok(Some(self.read.split_to(end + 2).freeze()));
            }
            match self.piece().await? {
                Some(piece) => self.read.extend_from_slice(&piece),
                None => return Ok(None),
            }
        }
    }

    /// All that is left of the body.
    ///
    /// # Errors
    /// [`Broken`] when the body breaks off.
    pub async fn rest(mut self) -> Result<Bytes, Broken> {
        while let Some(piece) = self.piece().await? {
            self.read.extend_from_slice(&piece);
        }
        Ok(self.read.freeze())
    }
}

impl Feed {
    /// A body to feed, chunked in HTTP/1.1.
    #[must_use]
    pub fn new() -> (Self, Body) {
        let (sender, receiver) = mpsc::unbounded();
        (Self(sender), StreamBody::new(receiver.map(|frame: io::Result<Frame<Bytes>>| frame)).boxed_unsync())
    }

    /// Sends a part. Whoever does not want it any more is no error.
    pub fn send(&self, part: impl Into<Bytes>) {
        let _ = self.0.unbounded_send(Ok(Frame::data(part.into())));
    }

    /// Ends the body by an error: the client gives the request up.
    pub fn break_off(self) {
        let _ = self.0.unbounded_send(Err(io::ErrorKind::BrokenPipe.into()));
    }
}

/// The answer to a `GET`, over a connection of its own.
///
/// # Errors
/// [`Broken`]
pub async fn get(address: SocketAddr, path: &str) -> Result<Answer, Broken> {
    let mut client = Client::try_connect(address, Http::One).await?;
    client.try_send(client.try_request("GET", path)?).await
}

/// A body of known length.
#[must_use]
pub fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// Writes bytes to a new connection and reads until the peer closes or falls silent for a while after an answer.
///
/// # Panics
/// When there is no connection.
pub async fn raw(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap_or_else(|error| panic!("{address}: {error}"));
    // The peer may have answered and closed before it has read all.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    answer
}
