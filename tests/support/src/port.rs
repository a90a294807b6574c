//! Free ports, and ports that stay ours.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use tokio::net::TcpSocket;

/// A loopback port that no other process gets while this lives. It is bound and does not listen: connections are
/// refused until a process that sets `SO_REUSEADDR`, as servers do, listens there.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    _socket: TcpSocket,
}

impl Port {
    /// A free port.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn reserve() -> Self {
        let reserve = || {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
            Ok::<_, std::io::Error>(Self { address: socket.local_addr()?, _socket: socket })
        };
        reserve().unwrap_or_else(|error| panic!("no free port: {error}"))
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Whether nobody listens on a loopback port.
#[must_use]
pub fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}
