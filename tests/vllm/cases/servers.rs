//! vLLM servers of the tiny model, each in processes of its own that end with the test.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use pd_support::admin::{Admin, metrics};
use pd_support::client::{Client, Http};
use pd_support::places::root;
use pd_support::port::Port;
use pd_support::process::{self, Process};
use pd_support::wait::{self, until_true};

use crate::Options;

/// How long servers may take to start: three of them take 100 s on two cores.
pub const START_LIMIT: Duration = Duration::from_secs(420);
/// Between two signs of life while they start.
const NEWS: Duration = Duration::from_secs(15);
/// Between two looks at what takes long.
const PAUSE: Duration = Duration::from_millis(100);
/// How long an answer may take: NIXL's first meeting of two servers takes seconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(150);

/// How the KV cache gets from prefill to decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connector {
    /// NIXL, read by decode.
    Pull,
    /// NIXL, written by prefill.
    Push,
    /// Files in a directory of both.
    Shared,
}

impl Connector {
    /// As `serve.sh` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "push",
            Self::Shared => "shared",
        }
    }
}

/// A server.
pub struct Server {
    /// What it is called here.
    pub name: String,
    /// Where it is.
    pub address: SocketAddr,
    /// Its first process.
    pub process: Process,
    _ports: [Port; 2],
}

impl Server {
    /// Starts one.
    pub fn start(directory: &Path, role: &str, connector: Option<Connector>, options: Options<'_>) -> Self {
        let (port, side) = (Port::reserve(), Port::reserve());
        let Options { failure, parser, kv_lease_s } = options;
        let mut arguments = vec![
            format!("KV_LOAD_FAILURE={failure}"),
            format!("TOOL_PARSER={parser}"),
            format!("KV_LEASE_S={kv_lease_s}"),
        ];
        arguments.push(root().join("tests/vllm/serve.sh").display().to_string());
        arguments.extend([role.to_owned(), port.address().port().to_string()]);
        if let Some(connector) = connector {
            arguments.extend([connector.name().to_owned(), side.address().port().to_string()]);
            arguments.push(directory.join("kv").display().to_string());
        }
        let process = Process::start(role, directory, Path::new("env"), &arguments);
        let name = connector.map_or_else(|| role.to_owned(), |connector| format!("{role} ({})", connector.name()));
        Self { name, address: port.address(), process, _ports: [port, side] }
    }

    /// A client of its own.
    pub async fn client(&self) -> Client {
        client(self.address).await
    }

    /// Prompt tokens that it has got so far from there: `local_compute`, `local_cache_hit`, `external_kv_transfer`.
    pub async fn prompt_tokens(&self, source: &str) -> u64 {
        prompt_tokens(&Admin { address: self.address }, source).await
    }

    async fn is_ready(&self) -> bool {
        let log = || self.process.log_tail(25);
        assert!(self.process.is_running(), "{} has ended:\n{}", self.name, log());
        Admin { address: self.address }.get("/health").await.is_some()
    }
}

/// A client that waits for slow servers.
pub async fn client(address: SocketAddr) -> Client {
    Client::connect(address, Http::One).await.with_patience(ANSWER_LIMIT)
}

/// Prompt tokens that a server has got so far from a source.
pub async fn prompt_tokens(server: &Admin, source: &str) -> u64 {
    let source = format!("source=\"{source}\"");
    let metrics = metrics(&server.get("/metrics").await.unwrap_or_default());
    let of_source = |name: &str| name.starts_with("vllm:prompt_tokens_by_source_total{") && name.contains(&source);
    let found = metrics.iter().find(|(name, _)| of_source(name));
    *found.unwrap_or_else(|| panic!("{} counts no {source}", server.address)).1 as u64
}

/// Waits until `look` finds something, which may take long.
pub async fn within<T>(limit: Duration, what: &str, look: impl AsyncFnMut() -> Option<T>) -> T {
    wait::within(limit, PAUSE, what, look).await
}

/// Waits until none of these processes runs.
pub async fn gone(processes: &[u32]) {
    until_true(format_args!("processes {processes:?} are gone"), async || {
        !processes.iter().any(|pid| process::is_running(*pid))
    })
    .await;
}

/// Waits until all of them are ready.
pub async fn until_ready(servers: &[&Server]) {
    let start = Instant::now();
    let mut news = start;
    let names: Vec<_> = servers.iter().map(|server| server.name.as_str()).collect();
    println!("vllm: starting {}", names.join(", "));
    let mut waiting = servers.to_vec();
    loop {
        let mut left = Vec::new();
        for server in waiting {
            if !server.is_ready().await {
                left.push(server);
            }
        }
        waiting = left;
        let seconds = start.elapsed().as_secs();
        let Some(slow) = waiting.first() else {
            println!("vllm: ready after {seconds} s");
            return;
        };
        assert!(start.elapsed() < START_LIMIT, "{} is not ready:\n{}", slow.name, slow.process.log_tail(25));
        if news.elapsed() > NEWS {
            news = Instant::now();
            println!("vllm: {} of {} not ready after {seconds} s", waiting.len(), servers.len());
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}
