//! An Envoy process with a configuration made from `envoy/local.yaml`.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use pd_support::config::Config;
use pd_support::places;
use pd_support::port::Port;
use pd_support::process::{self, Process};
use serde_json::Value;

/// How long Envoy may take to start: it compiles the module first.
const START_LIMIT: Duration = Duration::from_secs(30);

/// `envoy/local.yaml` with no access log, and with these engine endpoints in place of EDS.
///
/// # Errors
/// When the file is not as it was, or the module is not there.
pub fn local(module: &Path, endpoints: &[SocketAddr]) -> Result<Config> {
    let mut config = Config::read(&places::local_yaml())?;
    config.http().as_object_mut().context("the HTTP connection manager is no object")?.remove("access_log");
    config.set_module(&module.canonicalize().with_context(|| {
        format!(
            "{}: build it with `cargo build -p pd-filter --profile filter --target wasm32-wasip1`",
            module.display()
        )
    })?);
    config.set_engines(endpoints);
    Ok(config)
}

/// Edits the filter's own configuration; `control` is left out of it.
pub fn edit_filter(config: &mut Config, edit: impl FnOnce(&mut Value)) {
    let mut plugin = config.plugin_configuration();
    if let Some(plugin) = plugin.as_object_mut() {
        plugin.remove("control");
    }
    edit(&mut plugin);
    config.set_plugin_configuration(&plugin.to_string());
}

/// Takes out the filter and what is there for its sake: the buffer filter, the destination header and the
/// `override_host` policy around its fallback.
///
/// # Errors
/// When the file is not as this module knows it.
pub fn make_plain(config: &mut Config, retries: bool) -> Result<()> {
    config.http_filters().retain(|filter| filter["name"] == "envoy.filters.http.router");
    let route = config.routes().pop().context("no route")?;
    *config.routes() = vec![route];
    let route = config.routes()[0].as_object_mut().context("route")?;
    route.remove("request_headers_to_add");
    if !retries && let Some(action) = route.get_mut("route").and_then(Value::as_object_mut) {
        action.remove("retry_policy");
    }
    let policy = &mut config.cluster("engines")["load_balancing_policy"];
    let fallback = policy.pointer_mut("/policies/0/typed_extension_config/typed_config/fallback_policy");
    *policy = fallback.context("no fallback policy")?.take();
    Ok(())
}

/// A running Envoy. It is killed when this is dropped.
pub struct Envoy {
    process: Process,
    /// Where the gateway listens.
    pub gateway: SocketAddr,
    /// Where the admin interface listens.
    pub admin: SocketAddr,
    _ports: [Port; 2],
}

impl Envoy {
    /// Starts Envoy on free ports and waits until it listens. Its files go to `directory`.
    ///
    /// # Errors
    /// When it does not start, with the end of its log.
    pub async fn start(binary: &Path, config: &Config, directory: &Path, concurrency: u32) -> Result<Self> {
        anyhow::ensure!(binary.exists(), "{} is missing: run `make envoy`", binary.display());
        fs::create_dir_all(directory)?;
        let ports = [Port::reserve(), Port::reserve()];
        let [gateway, admin] = ports.each_ref().map(Port::address);
        let mut config = config.clone();
        config.set_listener(gateway);
        config.set_admin(admin);
        let path = directory.join("envoy.json");
        fs::write(&path, serde_json::to_vec_pretty(&config.root)?)?;
        let (path, concurrency) = (path.display().to_string(), concurrency.to_string());
        let arguments = ["-c", &path, "--concurrency", &concurrency, "--log-level", "warning", "--disable-hot-restart"];
        let process = Process::start("envoy", directory, binary, &arguments.map(str::to_owned));
        process::ready(&process, admin, "/ready", START_LIMIT).await?;
        Ok(Self { process, gateway, admin, _ports: ports })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

#[cfg(test)]
mod tests {
    use pd_support::config::merge;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_local_configuration_can_be_edited() {
        // Any file will do for the module: nothing starts here.
        let module = places::local_yaml();
        let engine = SocketAddr::from(([127, 0, 0, 1], 8000));
        let mut config = local(&module, &[engine]).unwrap();
        edit_filter(&mut config, |filter| merge(filter, &json!({"prefix": {"block_bytes": 1024}})));
        let text = config.root.to_string();
        assert!(text.contains("block_bytes") && text.contains("override_host") && !text.contains("StdoutAccessLog"));
        make_plain(&mut config, true).unwrap();
        let text = config.root.to_string();
        assert!(!text.contains("pd_filter") && !text.contains("local.yaml") && !text.contains("override_host"));
        assert!(text.contains("retry_policy") && text.contains("least_request"));
    }
}
