//! Requests that flow while something happens to the gateway: none of them may fail.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pd_sim::{Handle, expected_text};
use tokio::task::JoinHandle;

use crate::answer::text;
use pd_support::body::{CHAT, chat, words};
use pd_support::client::{Client, Http};
use pd_support::wait::until;

/// Pause of a client between two requests: constant load, not all that the machine can do.
const PAUSE: Duration = Duration::from_millis(5);

/// Clients that send one request after the other: long prompts, which are split, and short ones, whole answers and streams.
#[derive(Debug)]
pub struct Traffic {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    is_over: AtomicBool,
    answered: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Traffic {
    /// Starts that many clients.
    #[must_use]
    pub fn start(address: SocketAddr, clients: usize) -> Self {
        Self::start_with(address, clients, true)
    }

    /// As [`start`](Self::start), with long prompts only.
    #[must_use]
    pub fn start_long(address: SocketAddr, clients: usize) -> Self {
        Self::start_with(address, clients, false)
    }

    fn start_with(address: SocketAddr, clients: usize, has_short: bool) -> Self {
        let shared = Arc::new(Shared::default());
        let start = |number| tokio::spawn(flow(address, number, has_short, Arc::clone(&shared)));
        let clients = (0..clients).map(start).collect();
        Self { shared, clients }
    }

    /// Right answers so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Relaxed)
    }

    /// Waits until so many more requests were answered.
    ///
    /// # Panics
    /// When one has failed.
    pub async fn more(&self, requests: u64) {
        let wanted = self.answered() + requests;
        until(format_args!("{requests} more answers"), async || {
            self.check();
            (self.answered() >= wanted).then_some(())
        })
        .await;
    }

    /// Waits until none of many requests goes to an engine any more, and says how long the last one did.
    ///
    /// # Panics
    /// When one has failed.
    pub async fn until_spared(&self, engine: &Handle) -> Duration {
        let start = Instant::now();
        until(format_args!("{} gets nothing", engine.addr()), async || {
            let (before, lasted) = (engine.stats().requests, start.elapsed());
            self.more(40).await;
            (engine.stats().requests == before).then_some(lasted)
        })
        .await
    }

    /// Ends it; returns how many requests were answered.
    ///
    /// # Panics
    /// When one has failed.
    pub async fn stop(self) -> u64 {
        self.shared.is_over.store(true, Relaxed);
        for client in self.clients {
            client.await.expect("a client");
        }
        let failures = self.shared.failures.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(failures.is_empty(), "{} requests failed: {:?}", failures.len(), failures.first());
        self.shared.answered.load(Relaxed)
    }

    fn check(&self) {
        let failures = self.shared.failures.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(failures.is_empty(), "{} requests failed: {:?}", failures.len(), failures.first());
    }
}

async fn flow(address: SocketAddr, number: usize, has_short: bool, shared: Arc<Shared>) {
    let http = if number.is_multiple_of(2) { Http::One } else { Http::Two };
    let mut client = Client::connect(address, http).await;
    for round in 0_u64.. {
        if shared.is_over.load(Relaxed) {
            return;
        }
        let bytes = if has_short && round.is_multiple_of(3) { 40 } else { 4_000 };
        let stream = if round.is_multiple_of(2) { r#","stream":true"# } else { "" };
        let body = chat(&[&words(&format!("{number}-{round}"), bytes)], &format!(r#","max_tokens":8{stream}"#));
        let failure = match client.try_send(client.json(CHAT, body.clone(), &[])).await {
            Ok(answer) if answer.status == 200 && text(&answer.body) == expected_text("sim", &body) => None,
            Ok(answer) => Some(format!("{} {}", answer.status, answer.text())),
            Err(error) => Some(format!("{error:?}")),
        };
        match failure {
            None => drop(shared.answered.fetch_add(1, Relaxed)),
            Some(failure) => shared.failures.lock().unwrap_or_else(PoisonError::into_inner).push(failure),
        }
        tokio::time::sleep(PAUSE).await;
    }
}
