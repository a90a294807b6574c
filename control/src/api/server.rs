//! Accepts connections within bounds, and ends them in order.

use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use crate::access::tls::{Protocol, Tls};
use crate::api::app::Peer;
use crate::counters::Counters;

/// Connections open at a time; each filter holds one, probes and people a few.
pub const MAX_CONNECTIONS: usize = 4_096;
/// The same for KEDA, which holds a connection for each of its replicas.
pub const MAX_SCALER_CONNECTIONS: usize = 64;
/// How long a connection may take over the head of its next request, idle time included. Longer than any pause between
/// a filter's polls, so that only forgotten connections are closed.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after which an HTTP/2 connection is asked for a sign of life, and how long that may take.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests of one HTTP/2 connection at a time: KEDA has one stream for each ScaledObject, and short questions.
const MAX_STREAMS: u32 = 1_024;
/// How long TLS may take to stand.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a request head; a poll needs a few hundred.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// How long answers may take after the signal to stop.
const STOP_TIMEOUT: Duration = Duration::from_millis(800);
/// Pause after a failed accept, such as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What is served on an address.
#[derive(Debug)]
pub struct Serving {
    /// What is spoken there.
    pub protocol: Protocol,
    /// Certificate; none: no TLS.
    pub tls: Option<Arc<Tls>>,
    /// What answers.
    pub router: Router,
    /// Connections open at a time; more are closed at once.
    pub max_connections: usize,
}

/// Serves connections until `stopping`, then answers the open ones.
pub async fn serve(
    listener: TcpListener,
    serving: Serving,
    counters: Arc<Counters>,
    mut stopping: watch::Receiver<bool>,
) {
    let Serving { protocol, tls, router, max_connections } = serving;
    let slots = Arc::new(Semaphore::new(max_connections));
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|is_stopping| *is_stopping) => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            counters.connections_refused.inc();
            continue;
        };
        let (watcher, router, tls) =
            (graceful.watcher(), router.clone().layer(Extension(Peer(peer.ip()))), tls.clone());
        let open = counters.connections.clone();
        open.inc();
        tokio::spawn(async move {
            // Answers are single writes; waiting to fill a segment would only delay them.
            let _ = stream.set_nodelay(true);
            let outcome = match tls {
                None => drive(protocol, stream, router, watcher).await,
                Some(tls) => match timeout(HANDSHAKE_TIMEOUT, tls.acceptor().accept(stream)).await {
                    Ok(Ok(stream)) => drive(protocol, stream, router, watcher).await,
                    Ok(Err(error)) => {
                        tracing::debug!("TLS: {error}");
                        Ok(())
                    }
                    Err(_) => Ok(()),
                },
            };
            if let Err(error) = outcome {
                tracing::debug!("connection: {error}");
            }
            drop(slot);
            open.dec();
        });
    }
    drop(listener);
    if timeout(STOP_TIMEOUT, graceful.shutdown()).await.is_err() {
        tracing::warn!("some connections did not end in {STOP_TIMEOUT:?}");
    }
}

/// Answers what comes over one connection, until it ends.
async fn drive<S>(protocol: Protocol, stream: S, router: Router, watcher: Watcher) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (stream, service) = (TokioIo::new(stream), TowerToHyperService::new(router));
    match protocol {
        Protocol::Http1 => {
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(MAX_HEAD_BYTES);
            watcher.watch(builder.serve_connection(stream, service)).await
        }
        Protocol::Http2 => {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .keep_alive_interval(KEEP_ALIVE_INTERVAL)
                .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
                .max_concurrent_streams(MAX_STREAMS)
                .max_header_list_size(MAX_HEAD_BYTES as u32);
            watcher.watch(builder.serve_connection(stream, service)).await
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    /// Whether a connection is served; it stays open.
    async fn ask(stream: &mut TcpStream) -> bool {
        let mut answer = Vec::new();
        if stream.write_all(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n").await.is_err() {
            return false;
        }
        // Of a 404 there is a head only.
        while !answer.ends_with(b"\r\n\r\n") {
            if !matches!(stream.read_buf(&mut answer).await, Ok(1..)) {
                return false;
            }
        }
        answer.starts_with(b"HTTP/1.1 404")
    }

    #[tokio::test]
    async fn connections_beyond_the_bound_are_closed_and_counted_until_one_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let counters = Arc::new(Counters::default());
        let (stop, stopping) = watch::channel(false);
        let serving = Serving { protocol: Protocol::Http1, tls: None, router: Router::new(), max_connections: 2 };
        let server = tokio::spawn(serve(listener, serving, Arc::clone(&counters), stopping));
        let (mut first, mut second) =
            (TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap());
        assert!(ask(&mut first).await && ask(&mut second).await);
        assert!(!ask(&mut TcpStream::connect(address).await.unwrap()).await);
        assert_eq!((counters.connections.get(), counters.connections_refused.get()), (2, 1));
        assert!(ask(&mut second).await, "the others are not disturbed");
        drop(first);
        let is_free = async {
            while counters.connections.get() > 1 {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(10), is_free).await.unwrap();
        assert!(ask(&mut TcpStream::connect(address).await.unwrap()).await);
        stop.send_replace(true);
        server.await.unwrap();
    }
}
