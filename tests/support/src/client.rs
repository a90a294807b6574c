//! An HTTP client of one connection at a time, over HTTP/1.1 or HTTP/2 with prior knowledge, that hands bytes on as they
//! are. It connects again when the peer has closed or announced that it will, never to send a request again.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderName, HeaderValue, Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::ext::Protocol;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::wait::PATIENCE;

use answer::broken;
pub use answer::{Answer, Broken, Streaming};
pub use feed::{Body, Feed, full};

mod answer;
mod feed;

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

/// The answer to a `GET`, over a connection of its own.
///
/// # Errors
/// [`Broken`]
pub async fn get(address: SocketAddr, path: &str) -> Result<Answer, Broken> {
    let mut client = Client::try_connect(address, Http::One).await?;
    client.try_send(client.try_request("GET", path)?).await
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
