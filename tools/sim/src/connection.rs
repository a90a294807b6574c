//! A connection that can be broken on purpose.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// Lets a request break the connection it came by, and knows when the last one was.
pub(crate) struct Connection {
    pub(crate) broken: AtomicBool,
    pub(crate) wake: Notify,
    /// Closed for being idle; the client does not know yet.
    pub(crate) is_closed: AtomicBool,
    /// Requests whose answer has not begun.
    pub(crate) open: AtomicUsize,
    /// When bytes last went either way.
    active: Mutex<Instant>,
}

impl Default for Connection {
    fn default() -> Self {
        Self {
            broken: AtomicBool::new(false),
            wake: Notify::new(),
            is_closed: AtomicBool::new(false),
            open: AtomicUsize::new(0),
            active: Mutex::new(Instant::now()),
        }
    }
}

impl Connection {
    fn active(&self) -> MutexGuard<'_, Instant> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the connection has had no request for so long; for ever, where there is no limit.
    pub(crate) async fn idle(&self, limit: Option<Duration>) {
        let Some(limit) = limit else { return std::future::pending().await };
        loop {
            let end = *self.active() + limit;
            sleep_until(end).await;
            if self.open.load(Relaxed) > 0 {
                *self.active() = Instant::now();
            } else if *self.active() + limit <= Instant::now() {
                return;
            }
        }
    }

    /// Ends the connection by TCP RST.
    pub(crate) fn reset(&self) {
        self.broken.store(true, Relaxed);
        self.wake.notify_one();
    }
}

/// A TCP stream that closes by RST when its connection has been broken on purpose.
pub(crate) struct Breakable {
    pub(crate) stream: TcpStream,
    pub(crate) control: Arc<Connection>,
}

impl Drop for Breakable {
    fn drop(&mut self) {
        if self.control.broken.load(Relaxed) {
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Breakable {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            if self.control.is_closed.load(Relaxed) {
                buf.set_filled(before);
                self.control.broken.store(true, Relaxed);
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            *self.control.active() = Instant::now();
        }
        read
    }
}

impl AsyncWrite for Breakable {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        *self.control.active() = Instant::now();
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        *self.control.active() = Instant::now();
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
