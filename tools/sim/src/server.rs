//! Listeners and connections: HTTP/1.1 and HTTP/2 with prior knowledge on one port, and ways to break them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::answer::Body;
use crate::api;
use crate::connection::{Breakable, Connection};
use crate::engine::{Mode, Pod};

/// Connections that the kernel holds before they are accepted.
const BACKLOG: u32 = 1_024;
/// Pause after an accept that failed for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// Which of a server's two listeners.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Port {
    Api,
    /// Where other servers fetch KV.
    Side,
}

/// Binds with `SO_REUSEADDR`, so that a restart need not wait for old connections.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    bind(address)?.listen(BACKLOG)
}

/// Accepts until the server stops; connections end with this future.
pub(crate) async fn accept(pod: Arc<Pod>, listener: TcpListener, address: SocketAddr, port: Port) {
    let mut mode = pod.mode.subscribe();
    let mut connections = JoinSet::new();
    let mut listener = Some(listener);
    // A socket that is bound and does not listen keeps the port ours and refuses connections.
    let mut holder: Option<TcpSocket> = None;
    loop {
        let now = *mode.borrow_and_update();
        match now {
            Mode::Stop | Mode::Crashed => return,
            Mode::Refuse if port == Port::Api => {
                if listener.take().is_some() {
                    holder = bind(address).ok();
                }
            }
            Mode::Serve | Mode::Refuse => {
                if listener.is_none() {
                    let reopened = match holder.take() {
                        Some(holder) => holder.listen(BACKLOG),
                        None => listen(address),
                    };
                    match reopened {
                        Ok(reopened) => listener = Some(reopened),
                        Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                    }
                }
            }
        }
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None if now == Mode::Refuse => std::future::pending().await,
                // The port was taken meanwhile: try again.
                None => Err(io::ErrorKind::AddrInUse.into()),
            }
        };
        tokio::select! {
            changed = mode.changed() => if changed.is_err() { return },
            accepted = accepted => match accepted {
                Ok((stream, _)) => {
                    pod.stats.add(&pod.stats.connections, u64::from(port == Port::Api));
                    connections.spawn(drive(Arc::clone(&pod), stream, port));
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn drive(pod: Arc<Pod>, stream: TcpStream, port: Port) {
    let mut mode = pod.mode.subscribe();
    let _ = stream.set_nodelay(true);
    let control = Arc::new(Connection::default());
    let io = TokioIo::new(Breakable { stream, control: Arc::clone(&control) });
    let service =
        service_fn(|request: Request<Incoming>| answer(Arc::clone(&pod), Arc::clone(&control), port, request));
    let builder = auto::Builder::new(TokioExecutor::new());
    let connection = builder.serve_connection(io, service);
    tokio::pin!(connection);
    if *mode.borrow_and_update() == Mode::Refuse && port == Port::Api {
        connection.as_mut().graceful_shutdown();
    }
    loop {
        tokio::select! {
            _ = connection.as_mut() => return,
            () = control.wake.notified() => return,
            () = control.idle(pod.config.keep_alive), if !control.is_closed.load(Relaxed) => {
                control.is_closed.store(true, Relaxed);
                pod.stats.add(&pod.stats.idle_closed, 1);
            }
            changed = mode.changed() => match *mode.borrow_and_update() {
                _ if changed.is_err() => return,
                Mode::Stop | Mode::Crashed => return,
                Mode::Refuse if port == Port::Api => connection.as_mut().graceful_shutdown(),
                Mode::Serve | Mode::Refuse => {}
            },
        }
    }
}

fn answer(
    pod: Arc<Pod>,
    control: Arc<Connection>,
    port: Port,
    request: Request<Incoming>,
) -> Pin<Box<dyn Future<Output = Result<Response<Body>, std::convert::Infallible>> + Send>> {
    Box::pin(async move {
        control.open.fetch_add(1, Relaxed);
        let answer = match port {
            Port::Api => api::serve(pod, Arc::clone(&control), request).await,
            Port::Side => api::serve_side(pod, request).await,
        };
        control.open.fetch_sub(1, Relaxed);
        Ok(answer)
    })
}
