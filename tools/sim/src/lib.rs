//! Engine simulator: a server that speaks vLLM's OpenAI API, with vLLM's prefix cache, the strict KV hand-over of its
//! NIXL connector, a cost model for time, and faults on demand.
//!
//! Text is a function of model and prompt, so that an answer made from the wrong KV shows: compare with
//! [`expected_text`]. What a server did stands in its [`Stats`], and the requests it got in [`Handle::requests`], byte
//! for byte.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), pd_sim::StartError> {
//! let prefill = pd_sim::start(pd_sim::Config::of(pd_sim::Role::Prefill)).await?;
//! println!("curl {}/v1/models", prefill.url());
//! assert_eq!(prefill.stats().prefill_legs, 0);
//! prefill.stop().await;
//! # Ok(()) }
//! ```

mod answer;
mod api;
mod api_error;
mod cache;
mod config;
mod connection;
mod dialects;
mod engine;
mod failure;
mod fault;
mod fields;
mod generate;
mod guard;
mod handoff;
mod head;
mod histogram;
mod metrics;
mod nixl;
mod plain;
mod presence;
mod record;
mod request;
mod role;
mod rooms;
mod rules;
mod run;
mod server;
mod shape;
mod stats;
mod stored;
mod stream;
mod timing;
mod tokens;
mod transfer;

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

pub use config::{Computed, Config};
pub use dialects::text_of_ids;
pub use fault::{BadFault, FAULT_HEADER, Fault, FaultKind, Malformed, parse_list as parse_faults};
pub use record::Recorded;
pub use request::{expected_text, expected_texts, expected_texts_of};
pub use role::{Engine, Role};
pub use rules::Api;
pub use stats::Stats;
pub use timing::Timing;
pub use tokens::{BYTES_PER_TOKEN, NATURAL_TOKENS_MAX, NATURAL_TOKENS_MIN, WRONG_PREFIX};

use engine::{Mode, Pod};
use server::Port;

/// How long [`Handle::wait_for`] waits before it gives up.
const WAIT_LIMIT: Duration = Duration::from_secs(10);

/// Why a simulator did not start.
#[derive(Debug)]
pub enum StartError {
    /// The configuration is wrong; the text names the option.
    Config(String),
    /// An address cannot be bound.
    Bind(SocketAddr, io::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(why) => f.write_str(why),
            Self::Bind(address, error) if error.kind() == io::ErrorKind::AddrInUse => {
                write!(f, "cannot listen on {address}: another process has that port")
            }
            Self::Bind(address, error) => write!(f, "cannot listen on {address}: {error}"),
        }
    }
}

impl std::error::Error for StartError {}

/// A running simulator. It stops when this is dropped.
pub struct Handle {
    pod: Arc<Pod>,
    address: SocketAddr,
    tasks: Vec<JoinHandle<()>>,
}

/// Starts a simulator on the current tokio runtime; it serves when this returns.
///
/// # Errors
/// [`StartError`]
pub async fn start(config: Config) -> Result<Handle, StartError> {
    config.validate().map_err(StartError::Config)?;
    let bind = |address: SocketAddr| {
        let listener = server::listen(address).map_err(|error| StartError::Bind(address, error))?;
        let bound = listener.local_addr().map_err(|error| StartError::Bind(address, error))?;
        Ok((listener, bound))
    };
    let (listener, address) = bind(config.listen)?;
    let side_address = config.side_channel.unwrap_or_else(|| SocketAddr::new(address.ip(), 0));
    let (side_listener, side_address) = bind(side_address)?;
    let faults = config.faults.clone();
    // RandomState differs in every process and every call: no engine has another's id or tickets.
    let pod = Arc::new(Pod::new(config, RandomState::new().hash_one(address)));
    let side_host = match side_address.ip() {
        ip if !ip.is_unspecified() => ip,
        ip if ip.is_ipv4() => Ipv4Addr::LOCALHOST.into(),
        _ => Ipv6Addr::LOCALHOST.into(),
    };
    // Set once, here.
    let _ = pod.side_channel.set((side_host.to_string(), side_address.port()));
    api::set_faults(&pod, faults);
    let tasks = vec![
        tokio::spawn(server::accept(Arc::clone(&pod), listener, address, Port::Api)),
        tokio::spawn(server::accept(Arc::clone(&pod), side_listener, side_address, Port::Side)),
        tokio::spawn(Arc::clone(&pod).sweep()),
    ];
    Ok(Handle { pod, address, tasks })
}

impl Handle {
    /// Address of the API.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// `http://` and the address.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// `remote_engine_id` of the parameters it issues; new at every start.
    #[must_use]
    pub fn engine_id(&self) -> &str {
        &self.pod.engine_id
    }

    /// Address of its bootstrap server and side channel.
    ///
    /// # Panics
    /// Never: it was set at the start.
    #[must_use]
    pub fn bootstrap_addr(&self) -> SocketAddr {
        let (host, port) = self.pod.side_channel.get().expect("set at the start");
        SocketAddr::new(host.parse().expect("an address"), *port)
    }

    /// What it has done.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.pod.snapshot()
    }

    /// Sets its counters to zero; gauges, `/metrics` and the cache stay.
    pub fn reset_stats(&self) {
        self.pod.stats.reset();
    }

    /// The last requests, oldest first; `/health`, `/metrics` and the simulator's own endpoints are not among them.
    #[must_use]
    pub fn requests(&self) -> Vec<Recorded> {
        self.pod.recorder.all()
    }

    /// Forgets the recorded requests.
    pub fn clear_requests(&self) {
        self.pod.recorder.clear();
    }

    /// Puts faults in force in place of the earlier ones; blank text clears them.
    ///
    /// # Errors
    /// [`BadFault`]
    pub fn set_faults(&self, specs: &str) -> Result<(), BadFault> {
        api::set_faults(&self.pod, fault::parse_list(specs)?);
        Ok(())
    }

    /// Refuses connections, and closes those it has once their requests are answered, until called with `false`.
    pub fn set_refuse(&self, refuse: bool) {
        self.pod.set_refuse(refuse);
    }

    /// Loads an adapter of the first model.
    pub fn load_lora(&self, name: &str) {
        self.pod.load_lora(name);
    }

    /// Forgets every cached block that no request holds.
    pub fn clear_cache(&self) {
        self.pod.cache.clear();
    }

    /// Ends all leases now, as if their time were over.
    pub fn expire_leases(&self) {
        self.pod.end_leases(true);
    }

    /// Whether the process would be gone.
    #[must_use]
    pub fn is_crashed(&self) -> bool {
        *self.pod.mode.borrow() == Mode::Crashed
    }

    /// Returns when the process would exit.
    pub async fn crashed(&self) {
        // The sender lives in the pod that this handle holds.
        let _ = self.pod.mode.subscribe().wait_for(|mode| *mode == Mode::Crashed).await;
    }

    /// Waits until the statistics meet a condition and returns them.
    ///
    /// # Panics
    /// After ten seconds, with the statistics in the message: it is a test's assertion.
    pub async fn wait_for(&self, condition: impl Fn(&Stats) -> bool) -> Stats {
        let met = async {
            loop {
                let changed = self.pod.stats.changed();
                tokio::pin!(changed);
                changed.as_mut().enable();
                let stats = self.stats();
                if condition(&stats) {
                    return stats;
                }
                changed.await;
            }
        };
        match tokio::time::timeout(WAIT_LIMIT, met).await {
            Ok(stats) => stats,
            Err(_) => panic!("the condition is not met after {WAIT_LIMIT:?}: {:#?}", self.stats()),
        }
    }

    /// Stops; its port is free and its connections are closed when this returns.
    pub async fn stop(mut self) {
        self.pod.mode.send_replace(Mode::Stop);
        let mut tasks = std::mem::take(&mut self.tasks);
        // The sweeper has no reason to look at the mode.
        if let Some(sweeper) = tasks.pop() {
            sweeper.abort();
        }
        for task in tasks {
            let _ = task.await;
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.pod.mode.send_replace(Mode::Stop);
        for task in &self.tasks {
            task.abort();
        }
    }
}
