//! Accepts connections, up to a bound, and closes them when pd-control stops.

use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use crate::access::tls::Tls;
use crate::api::app::ClientAddress;
use crate::counters::Counters;

/// Connections open at a time. Each Envoy holds two, probes and people a few.
pub const MAX_CONNECTIONS: usize = 4_096;
/// Time limit for the head of the next request of a connection, idle time included. Longer than any pause between the
/// polls of a filter, so that the server closes only abandoned connections.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit of a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest request head, in bytes. A poll has a few hundred.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// Time limit for open answers after the signal to stop.
const STOP_TIMEOUT: Duration = Duration::from_millis(800);
/// Pause after a failed accept, such as for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves connections until `stopping` becomes true, then ends the open ones in order.
///
/// It closes connections beyond `max_connections` at once, and counts them.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    router: Router,
    counters: Arc<Counters>,
    mut stopping: watch::Receiver<bool>,
    max_connections: usize,
) {
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
            (graceful.watcher(), router.clone().layer(Extension(ClientAddress(peer.ip()))), tls.clone());
        let open = counters.connections.clone();
        open.inc();
        tokio::spawn(async move {
            // Answers are single writes, which Nagle's algorithm would only delay.
            let _ = stream.set_nodelay(true);
            let outcome = match tls {
                None => watcher.watch(connection(stream, router)).await,
                Some(tls) => match timeout(HANDSHAKE_TIMEOUT, tls.acceptor().accept(stream)).await {
                    Ok(Ok(stream)) => watcher.watch(connection(stream, router)).await,
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

type Connection<S> = http1::Connection<TokioIo<S>, TowerToHyperService<Router>>;

fn connection<S: AsyncRead + AsyncWrite + Unpin>(stream: S, router: Router) -> Connection<S> {
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
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
        let server = tokio::spawn(serve(listener, None, Router::new(), Arc::clone(&counters), stopping, 2));
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
