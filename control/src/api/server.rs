//! Accepts connections, up to a bound, and closes them when pd-control stops.

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
use crate::api::app::ClientAddress;
use crate::counters::Counters;

/// Connections open at a time. Each Envoy holds two, probes and people a few.
pub const MAX_CONNECTIONS: usize = 4_096;
/// Connections of KEDA open at a time. Each replica of its operator holds one.
pub const MAX_SCALER_CONNECTIONS: usize = 64;
/// Time limit for the head of the next request of a connection, idle time included. Longer than any pause between the
/// polls of a filter, so that the server closes only abandoned connections.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// Idle time after which the server pings an HTTP/2 connection.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// Time limit for the answer to a ping.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Open requests of one HTTP/2 connection. KEDA has one stream for each ScaledObject, and short requests.
const MAX_STREAMS: u32 = 1_024;
/// Time limit of a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest request head, in bytes. A poll has a few hundred.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// Time limit for open answers after the signal to stop.
const STOP_TIMEOUT: Duration = Duration::from_millis(800);
/// Pause after a failed accept, such as for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// One address that pd-control serves.
#[derive(Debug)]
pub struct Serving {
    /// Protocol of the address.
    pub protocol: Protocol,
    /// Certificate; none: no TLS.
    pub tls: Option<Arc<Tls>>,
    /// Routes of the address.
    pub router: Router,
    /// Connections open at a time; more are closed at once.
    pub max_connections: usize,
}

/// Serves connections until `stopping` becomes true, then ends the open ones in order.
///
/// It closes connections beyond [`Serving::max_connections`] at once, and counts them.
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
        let (stream, client) = match accepted {
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
            (graceful.watcher(), router.clone().layer(Extension(ClientAddress(client.ip()))), tls.clone());
        let open = counters.connections.clone();
        open.inc();
        tokio::spawn(async move {
            // Answers are single writes, which Nagle's algorithm would only delay.
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
        tracing::warn!("closing connections that did not end in {STOP_TIMEOUT:?}");
    }
}

/// Answers the requests of one connection until it ends.
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
