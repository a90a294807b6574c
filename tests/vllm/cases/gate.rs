//! A TCP relay in front of a server, that can do something before the next bytes go through.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

type Act = Box<dyn FnOnce() + Send>;

/// A relay, for as long as it lives.
pub struct Gate {
    /// Where to connect in place of the server.
    pub address: SocketAddr,
    next: Arc<Mutex<Option<Act>>>,
    accepting: JoinHandle<()>,
}

impl Gate {
    /// A relay to a server.
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let next = Arc::<Mutex<Option<Act>>>::default();
        let acts = Arc::clone(&next);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // If the server is gone, the connection ends, which tells the client.
                if let Ok(server) = TcpStream::connect(server).await {
                    tokio::spawn(relay(client, server, Arc::clone(&acts)));
                }
            }
        });
        Self { address, next, accepting }
    }

    /// Does this when the next bytes come for the server, before it gets them.
    pub fn before_the_next(&self, act: impl FnOnce() + Send + 'static) {
        *self.next.lock().expect("nobody panics with it") = Some(Box::new(act));
    }

    /// Whether it was done.
    pub fn is_done(&self) -> bool {
        self.next.lock().expect("nobody panics with it").is_none()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn relay(client: TcpStream, server: TcpStream, acts: Arc<Mutex<Option<Act>>>) {
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let there = async {
        let mut bytes = vec![0; 65_536];
        while let Ok(read @ 1..) = from_client.read(&mut bytes).await {
            let act = acts.lock().expect("nobody panics with it").take();
            if let Some(act) = act {
                act();
            }
            if to_server.write_all(&bytes[..read]).await.is_err() {
                break;
            }
        }
    };
    let back = tokio::io::copy(&mut from_server, &mut to_client);
    // HTTP needs no half-open connections.
    tokio::select! {
        () = there => {}
        _ = back => {}
    }
}
