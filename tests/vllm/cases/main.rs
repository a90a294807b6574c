//! A real vLLM behind a real Envoy: a prefill and a decode server of a tiny random model on this machine's CPU, beside an
//! aggregated server that says what is right. `make test-vllm` installs vLLM and runs this.
//!
//! Every connector has one test, since a pair of servers takes a minute to start; the tests take turns.

mod checks;
mod gate;
mod kv_leases;
mod launcher;
mod servers;
mod tools;

use std::path::PathBuf;
use std::sync::{Arc, Once};
use std::time::Duration;

use pd_support::process::tree;
use pd_tests::rig::{Rig, run};
use serde_json::json;
use tokio::sync::{Mutex, MutexGuard};

use gate::Gate;
use servers::{Connector, Server, gone, until_ready};

/// The aggregated server, and what keeps the tests from running at once. It ends with this process.
static AGGREGATED: Mutex<Option<Arc<Server>>> = Mutex::const_new(None);

/// Form of tool calls that the servers read, unless a test wants another one.
const TOOL_PARSER: &str = "hermes";

/// KV lease of the prefill servers in seconds, unless a test wants another one: on a busy machine NIXL's first meeting of two
/// servers takes longer than vLLM's own 30.
const KV_LEASE_S: u64 = 300;

/// How the servers of a pair differ.
#[derive(Clone, Copy, Debug)]
struct Options<'a> {
    /// What decode does about a KV cache that it cannot get: `fail` or `recompute`.
    failure: &'a str,
    /// Form of tool calls.
    parser: &'a str,
    kv_lease_s: u64,
}

impl<'a> Options<'a> {
    fn new(failure: &'a str) -> Self {
        Self { failure, parser: TOOL_PARSER, kv_lease_s: KV_LEASE_S }
    }
}

/// One connector's servers behind Envoy.
struct Pair {
    connector: Connector,
    aggregated: Arc<Server>,
    prefill: Server,
    decode: Server,
    /// Through it Envoy reaches `decode`.
    gate: Gate,
    rig: Rig,
    _turn: MutexGuard<'static, Option<Arc<Server>>>,
}

impl Pair {
    /// Starts the servers, then Envoy; `failure` is the decode server's policy for a KV cache that it cannot fetch.
    async fn start(connector: Connector, failure: &str) -> Self {
        Self::with(connector, Options::new(failure)).await
    }

    /// As [`start`](Self::start), with servers that differ.
    async fn with(connector: Connector, options: Options<'_>) -> Self {
        limit_time();
        let mut turn = AGGREGATED.lock().await;
        let is_usual = options.parser == TOOL_PARSER;
        let aggregated = || Arc::new(Server::start(&directory("aggregated"), "aggregated", None, options));
        let aggregated = turn.take().filter(|_| is_usual).unwrap_or_else(aggregated);
        let directory = directory(connector.name());
        let [prefill, decode] =
            ["prefill", "decode"].map(|role| Server::start(&directory, role, Some(connector), options));
        until_ready(&[&aggregated, &prefill, &decode]).await;
        *turn = Some(Arc::clone(&aggregated)).filter(|_| is_usual);
        let gate = Gate::to(decode.address).await;
        let engine = if connector == Connector::Shared { "vllm-shared" } else { "vllm-nixl" };
        let rig = Rig::builder().engines(0, 0).other(prefill.address, "prefill").other(gate.address, "decode");
        let rig = rig.pool(Self::pool(options.kv_lease_s)).pool(json!({"engine": engine}));
        let rig = rig.envoy(|config| config.http()["stream_idle_timeout"] = "90s".into()).start();
        Self { connector, aggregated, prefill, decode, gate, rig: rig.await, _turn: turn }
    }
}

impl Pair {
    /// The pool's policy. A token of this model is a byte or two.
    fn pool(kv_lease_s: u64) -> serde_json::Value {
        json!({"bytes_per_token": 1.5, "split": {"uncached_tokens": 64}, "kv_lease_ms": kv_lease_s * 1_000})
    }

    /// Ends it, and makes sure that nothing of it is left.
    async fn stop(self) {
        let processes: Vec<u32> =
            [&self.prefill, &self.decode].into_iter().flat_map(|server| tree(server.process.pid())).collect();
        drop(self);
        gone(&processes).await;
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for server in [&*self.aggregated, &self.prefill, &self.decode] {
                println!("--- {}\n{}", server.name, server.process.log_tail(15));
            }
        }
    }
}

/// Gives up after `PD_VLLM_MINUTES`, 20 by default. The end of this process is the end of all servers.
fn limit_time() {
    static LIMITED: Once = Once::new();
    LIMITED.call_once(|| {
        let minutes = std::env::var("PD_VLLM_MINUTES").map_or(20, |minutes| minutes.parse().expect("PD_VLLM_MINUTES"));
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(minutes * 60));
            println!("vllm: not done after {minutes} minutes (PD_VLLM_MINUTES)");
            std::process::exit(1);
        });
    });
}

/// A directory of its own, empty, below the workspace's `target/`: logs stay there.
fn directory(name: &str) -> PathBuf {
    let directory = pd_support::places::root().join("target/vllm").join(name);
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(directory.join("kv")).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    directory
}

#[test]
fn nixl_pull() {
    run(async {
        let pair = Pair::start(Connector::Pull, "fail").await;
        checks::until_met(&pair).await;
        checks::answers_are_those_of_one_server(&pair).await;
        checks::a_second_turn_is_right(&pair).await;
        checks::many_at_once_are_right(&pair).await;
        kv_leases::the_engines_tell_what_the_filter_reads(&pair).await;
        kv_leases::a_healthy_split_raises_no_alarm(&pair).await;
        tools::forced_calls_and_schemas_are_right(&pair).await;
        checks::a_clients_parameters_end_no_server(&pair).await;
        checks::a_prefill_server_killed_between_the_legs_is_an_error(&pair, 500).await;
        pair.stop().await;
    });
}

#[test]
fn nixl_push() {
    run(async {
        let pair = Pair::start(Connector::Push, "fail").await;
        checks::until_met(&pair).await;
        checks::answers_are_those_of_one_server(&pair).await;
        checks::a_second_turn_is_right(&pair).await;
        checks::many_at_once_are_right(&pair).await;
        // vLLM waits for what nobody will push, whatever its policy: Envoy's limit ends it.
        checks::a_prefill_server_killed_between_the_legs_is_an_error(&pair, 504).await;
        pair.stop().await;
    });
}

#[test]
fn a_kv_cache_that_does_not_come_raises_the_alarm() {
    run(async {
        let pair = Pair::start(Connector::Pull, "recompute").await;
        checks::until_met(&pair).await;
        kv_leases::a_healthy_split_raises_no_alarm(&pair).await;
        checks::a_prefill_server_killed_between_the_legs_goes_unnoticed(&pair).await;
        kv_leases::a_prompt_that_decode_computed_raises_the_alarm(&pair).await;
        pair.stop().await;
    });
}

#[test]
fn a_kv_lease_that_expires() {
    run(async {
        let kv_lease_s = 12;
        let pair = Pair::with(Connector::Pull, Options { kv_lease_s, ..Options::new("fail") }).await;
        checks::until_met(&pair).await;
        let lease = Duration::from_secs(kv_lease_s);
        kv_leases::a_decode_server_that_stands_still_gives_no_wrong_text(&pair, lease).await;
        pair.stop().await;
    });
}

#[test]
fn other_tool_parsers() {
    run(async {
        for parser in ["xlam", "pythonic"] {
            let pair = Pair::with(Connector::Pull, Options { parser, ..Options::new("fail") }).await;
            checks::until_met(&pair).await;
            tools::forced_calls_and_schemas_are_right(&pair).await;
            pair.stop().await;
        }
    });
}

#[test]
fn shared_directory() {
    run(async {
        let pair = Pair::start(Connector::Shared, "fail").await;
        checks::answers_are_those_of_one_server(&pair).await;
        checks::a_second_turn_is_right(&pair).await;
        checks::many_at_once_are_right(&pair).await;
        checks::a_prefill_server_killed_between_the_legs_goes_unnoticed(&pair).await;
        pair.stop().await;
    });
}

#[test]
fn the_launcher_starts_a_pair() {
    run(async {
        // Takes turns with the others, and needs no aggregated server.
        let mut turn = AGGREGATED.lock().await;
        turn.take();
        launcher::runs_a_pair("INT").await;
    });
}
