//! Whether a module starts: it is started as Envoy starts it, before it goes to any.

use anyhow::{Context as _, bail};
use pd_host::{LogLevel, Module, SharedStore, Worker, WorkerConfig};

/// How the names of exports begin by which a module says its ABI.
const ABI: &[u8] = b"proxy_abi_version_0_2_";
/// A configuration that every release takes.
const CONFIG: &[u8] = br#"{"endpoints":[{"address":"192.0.2.1:8000","role":"both"}]}"#;
/// What a probe of an Envoy pod asks.
const PROBE: [(&str, &str); 3] = [(":method", "GET"), (":path", "/.pd-ready"), (":authority", "envoy")];

/// Starts the filter's module and asks it whether it is ready.
///
/// # Errors
/// One line when it is no Proxy-Wasm module, does not start, traps, or is another filter.
pub fn check(module: &[u8]) -> anyhow::Result<()> {
    if !module.windows(ABI.len()).any(|bytes| bytes == ABI) {
        bail!("this is no Proxy-Wasm module: it does not export proxy_abi_version_0_2_…");
    }
    let module = Module::from_bytes(module).context("it does not load")?;
    let config = WorkerConfig { plugin_configuration: CONFIG.to_vec(), ..WorkerConfig::default() };
    let worker = Worker::new(&module, SharedStore::new(), config).context("it does not start")?;
    let stream = worker.stream();
    if !worker.is_failed() {
        worker.tick();
        stream.request_headers(PROBE, true);
    }
    if worker.is_failed() {
        let logs = worker.logs();
        let worst = logs.iter().rev().find(|(level, _)| *level >= LogLevel::Error);
        let why = worst.map_or_else(String::new, |(_, text)| format!(": {}", text.lines().next().unwrap_or_default()));
        bail!("it does not start{why}");
    }
    match stream.client().status() {
        Some(200) => Ok(()),
        Some(other) => bail!("asked for /.pd-ready it answers {other}"),
        None => bail!("asked for /.pd-ready it does not answer: it is another filter"),
    }
}
