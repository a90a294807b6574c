//! Clients whose requests change on order.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use pd_support::body::words;
use pd_support::client::{Client, Http};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What clients ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Clients that ask at once; none: the end.
    clients: usize,
    /// Bytes of a prompt.
    bytes: usize,
    /// Tokens of an answer.
    tokens: u64,
    /// Whether each prompt is a new one.
    is_new: bool,
}

/// Long prompts and short answers: six seconds of prefill work come while one server computes two.
pub const PROMPTS: Kind = Kind { clients: 6, bytes: 40_000, tokens: 4, is_new: true };
/// Long answers.
pub const ANSWERS: Kind = Kind { clients: 48, bytes: 600, tokens: 1_000, is_new: true };
/// One prompt again and again.
pub const REPEATED: Kind = Kind { clients: 48, bytes: 2_400, tokens: 1_000, is_new: false };
const NOTHING: Kind = Kind { clients: 0, bytes: 0, tokens: 0, is_new: false };
/// Most clients of any kind.
const CLIENTS: usize = 48;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Running clients.
pub struct Load {
    kind: watch::Sender<Kind>,
    clients: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    served: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Load {
    /// Starts.
    pub async fn start(address: SocketAddr, kind: Kind) -> Self {
        let (sender, receiver) = watch::channel(kind);
        let shared = Arc::new(Shared::default());
        let start = |number| tokio::spawn(ask(address, number, receiver.clone(), Arc::clone(&shared)));
        Self { kind: sender, clients: (0..CLIENTS).map(start).collect(), shared }
    }

    /// From now on, clients ask for something else.
    pub fn turn(&self, kind: Kind) {
        self.kind.send_replace(kind);
    }

    /// Ends; at least 95 % of the requests must have been served.
    pub async fn stop_without_loss(self) {
        self.turn(NOTHING);
        drop(self.kind);
        for client in self.clients {
            client.await.expect("a client");
        }
        let failures = self.shared.failures.lock().expect("failures");
        let served = self.shared.served.load(Relaxed);
        eprintln!("{served} requests served, {} lost", failures.len());
        assert!(failures.len() as u64 * 20 <= served, "{served} served, {} lost: {failures:#?}", failures.len());
    }
}

async fn ask(address: SocketAddr, number: usize, mut kind: watch::Receiver<Kind>, shared: Arc<Shared>) {
    let mut turn = 0_u64;
    loop {
        let of = *kind.borrow_and_update();
        if number >= of.clients {
            if kind.changed().await.is_err() {
                return;
            }
            continue;
        }
        turn += 1;
        match one(address, of, &format!("{number}/{turn}")).await {
            Ok(()) => drop(shared.served.fetch_add(1, Relaxed)),
            Err(why) => shared.failures.lock().expect("failures").push(why),
        }
    }
}

async fn one(address: SocketAddr, kind: Kind, seed: &str) -> Result<(), String> {
    let client = Client::try_connect(address, Http::One).await.map_err(|error| error.to_string())?;
    let mut client = client.with_patience(PATIENCE);
    let seed = if kind.is_new { format!("{seed} {:?}", SystemTime::now()) } else { "the same".to_owned() };
    let (prompt, tokens) = (words(&seed, kind.bytes), kind.tokens);
    let body = format!(r#"{{"model":"sim","max_tokens":{tokens},"ignore_eos":true,"prompt":"{prompt}"}}"#);
    let answer = client.try_send(client.json("/v1/completions", body, &[])).await.map_err(|error| error.to_string())?;
    if answer.status == 200 { Ok(()) } else { Err(format!("{}: {}", answer.status, answer.text())) }
}

/// Sends so many requests at once; returns the status of each.
pub async fn ask_at_once(address: SocketAddr, count: usize) -> Vec<u16> {
    let kind = Kind { clients: 1, bytes: 4_000, tokens: 4, is_new: true };
    let ask = async |number: usize| match one(address, kind, &number.to_string()).await {
        Ok(()) => 200,
        Err(why) => {
            eprintln!("{why}");
            why.get(..3).and_then(|status| status.parse().ok()).unwrap_or(0)
        }
    };
    futures::future::join_all((0..count).map(ask)).await
}
