//! Clients that never stop asking, and remember every request that failed.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use pd_support::body::words;
use pd_support::client::{Client, Http};
use pd_tests::answer::{is_done, text};
use tokio::task::JoinHandle;

use crate::cluster::until;

/// Clients at once.
pub const CLIENTS: usize = 8;
/// Bytes of a prompt: enough for a prefill leg.
const PROMPT_BYTES: usize = 4_000;

/// Running clients.
pub struct Traffic {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    served: AtomicU64,
    failures: Mutex<Vec<String>>,
    is_over: AtomicBool,
}

impl Traffic {
    /// Starts, and returns once requests are served.
    pub async fn start(address: SocketAddr) -> Self {
        let shared = Arc::new(Shared::default());
        let start = |number| tokio::spawn(ask(address, number, Arc::clone(&shared)));
        let clients = (0..CLIENTS).map(start).collect();
        let traffic = Self { shared, clients };
        traffic.more(100).await;
        traffic
    }

    /// Waits until that many requests more are served or failed.
    pub async fn more(&self, requests: u64) {
        let target = self.done() + requests;
        until(format!("{requests} more requests"), async || (self.done() >= target).then_some(())).await;
    }

    /// Ends and returns how many were served and why others were not.
    pub async fn stop(self) -> (u64, Vec<String>) {
        self.shared.is_over.store(true, Relaxed);
        for client in self.clients {
            client.await.expect("a client");
        }
        let failures = std::mem::take(&mut *self.shared.failures.lock().expect("failures"));
        (self.shared.served.load(Relaxed), failures)
    }

    /// Ends; no request may have failed.
    pub async fn stop_without_loss(self, what: &str) {
        let (served, failures) = self.stop().await;
        eprintln!("{what}: {served} requests, {} lost", failures.len());
        assert!(failures.is_empty(), "{what}: {} of {served} lost: {:#?}", failures.len(), failures.first());
    }

    fn done(&self) -> u64 {
        self.shared.served.load(Relaxed) + self.shared.failures.lock().expect("failures").len() as u64
    }
}

/// Every prompt is new, every other answer a stream.
async fn ask(address: SocketAddr, number: usize, shared: Arc<Shared>) {
    let mut client = None;
    for turn in 0_u64.. {
        if shared.is_over.load(Relaxed) {
            return;
        }
        let seed = format!("{number}/{turn}/{:?}", std::time::SystemTime::now());
        match one(&mut client, address, &words(&seed, PROMPT_BYTES), turn % 2 == 0).await {
            Ok(()) => drop(shared.served.fetch_add(1, Relaxed)),
            Err(why) => {
                client = None;
                let mut failures = shared.failures.lock().expect("failures");
                failures.push(format!("{:?} {why}", std::time::SystemTime::now()));
            }
        }
    }
}

async fn one(kept: &mut Option<Client>, address: SocketAddr, prompt: &str, is_stream: bool) -> Result<(), String> {
    if kept.is_none() {
        *kept = Some(Client::try_connect(address, Http::One).await.map_err(|error| error.to_string())?);
    }
    let Some(client) = kept else { return Err("no client".to_owned()) };
    let body = format!(r#"{{"model":"sim","max_tokens":8,"stream":{is_stream},"prompt":"{prompt}"}}"#);
    let answer = client.try_send(client.json("/v1/completions", body, &[])).await.map_err(|error| error.to_string())?;
    if answer.status != 200 {
        return Err(format!("{}: {}", answer.status, answer.text()));
    }
    if text(&answer.body).is_empty() || is_done(&answer.body) != is_stream {
        return Err(format!("a broken answer: {}", answer.text()));
    }
    Ok(())
}
