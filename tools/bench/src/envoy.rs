//! An Envoy process with a configuration made from `envoy/local.yaml`.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// How long Envoy may take to start: it compiles the module first.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Root of the repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap_or_else(|_| PathBuf::from("."))
}

/// The Envoy that `envoy/version` names, where `make` puts it.
#[must_use]
pub fn default_binary() -> PathBuf {
    let version = fs::read_to_string(root().join("envoy/version")).unwrap_or_default();
    root().join(format!(".cache/envoy-{}/bin/envoy", version.trim()))
}

/// The module as the `filter` profile builds it.
#[must_use]
pub fn default_module() -> PathBuf {
    root().join("target/wasm32-wasip1/filter/pd_filter.wasm")
}

/// A configuration, to be edited before Envoy starts.
pub struct Config(Value);

fn at<'a>(value: &'a mut Value, path: &str) -> Result<&'a mut Value> {
    value.pointer_mut(path).with_context(|| format!("envoy/local.yaml has no {path} any more"))
}

const LISTENER: &str = "/static_resources/listeners/0";
const MANAGER: &str = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config";
const ENGINES: &str = "/static_resources/clusters/0";

impl Config {
    /// `envoy/local.yaml` with free ports, no access log, and these engine endpoints in place of EDS.
    ///
    /// # Errors
    /// When the file is not as this module knows it.
    pub fn local(module: &Path, endpoints: &[SocketAddr]) -> Result<Self> {
        let path = root().join("envoy/local.yaml");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let mut config: Value = serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?;
        *at(&mut config, "/admin/address/socket_address/port_value")? = json!(0);
        *at(&mut config, &format!("{LISTENER}/address/socket_address/port_value"))? = json!(0);
        if let Some(manager) = at(&mut config, MANAGER)?.as_object_mut() {
            manager.remove("access_log");
        }
        let mut this = Self(config);
        *this.wasm("/vm_config/code/local/filename")? = json!(module.canonicalize().with_context(|| {
            format!(
                "{}: build it with `cargo build -p pd-filter --profile filter --target wasm32-wasip1`",
                module.display()
            )
        })?);
        let host = |address: &SocketAddr| {
            json!({"endpoint": {"address": {"socket_address":
                {"address": address.ip().to_string(), "port_value": address.port()}}}})
        };
        let hosts: Vec<_> = endpoints.iter().map(host).collect();
        let cluster = at(&mut this.0, ENGINES)?.as_object_mut().context("the first cluster is no object")?;
        cluster.remove("eds_cluster_config");
        cluster.insert("type".to_owned(), json!("STATIC"));
        let assignment = json!({"cluster_name": "engines", "endpoints": [{"lb_endpoints": hosts}]});
        cluster.insert("load_assignment".to_owned(), assignment);
        Ok(this)
    }

    fn wasm(&mut self, path: &str) -> Result<&mut Value> {
        at(&mut self.0, &format!("{MANAGER}/http_filters/0/typed_config/config{path}"))
    }

    /// Edits the filter's own configuration; `control` is left out of it.
    ///
    /// # Errors
    /// When it is not JSON.
    pub fn edit_filter(&mut self, edit: impl FnOnce(&mut Value)) -> Result<()> {
        let text = self.wasm("/configuration/value")?;
        let mut config: Value = serde_json::from_str(text.as_str().unwrap_or_default())?;
        if let Some(config) = config.as_object_mut() {
            config.remove("control");
        }
        edit(&mut config);
        *text = json!(config.to_string());
        Ok(())
    }

    /// Takes out the filter and what is there for its sake: the buffer filter, the destination header and the
    /// `override_host` policy around its fallback.
    ///
    /// # Errors
    /// When the file is not as this module knows it.
    pub fn make_plain(&mut self, retries: bool) -> Result<()> {
        let filters = at(&mut self.0, &format!("{MANAGER}/http_filters"))?.as_array_mut().context("http_filters")?;
        filters.retain(|filter| filter["name"] == "envoy.filters.http.router");
        let route = at(&mut self.0, &format!("{MANAGER}/route_config/virtual_hosts/0/routes/0"))?;
        let route = route.as_object_mut().context("route")?;
        route.remove("request_headers_to_add");
        if !retries && let Some(action) = route.get_mut("route").and_then(Value::as_object_mut) {
            action.remove("retry_policy");
        }
        let policy = at(&mut self.0, &format!("{ENGINES}/load_balancing_policy"))?;
        *policy = at(policy, "/policies/0/typed_extension_config/typed_config/fallback_policy")?.take();
        Ok(())
    }
}

/// Lays one JSON value over another: objects are merged, everything else is replaced.
pub fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// A running Envoy. It is killed when this is dropped.
pub struct Envoy {
    child: Child,
    /// Where the gateway listens.
    pub gateway: SocketAddr,
    /// Where the admin interface listens.
    pub admin: SocketAddr,
}

impl Envoy {
    /// Starts Envoy and waits until it listens. Its files go to `directory`.
    ///
    /// # Errors
    /// When it does not start, with the end of its log.
    pub async fn start(binary: &Path, config: &Config, directory: &Path, concurrency: u32) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let (config_path, admin_path) = (directory.join("envoy.json"), directory.join("admin"));
        let log_path = directory.join("envoy.log");
        fs::write(&config_path, serde_json::to_vec_pretty(&config.0)?)?;
        let _ = fs::remove_file(&admin_path);
        let log = fs::File::create(&log_path)?;
        let child = Command::new(binary)
            .current_dir(root())
            .arg("-c")
            .arg(&config_path)
            .arg("--admin-address-path")
            .arg(&admin_path)
            .args(["--concurrency", &concurrency.to_string(), "--log-level", "warning", "--disable-hot-restart"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{}: is Envoy there? `make` fetches it", binary.display()))?;
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut envoy = Self { child, gateway: nowhere, admin: nowhere };
        let begun = Instant::now();
        while begun.elapsed() < START_LIMIT {
            if let Some(status) = envoy.child.try_wait()? {
                bail!("Envoy ended with {status}:\n{}", tail(&log_path));
            }
            if let Ok(gateway) = envoy.find_listener(&admin_path).await {
                envoy.gateway = gateway;
                return Ok(envoy);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("Envoy was not ready after {START_LIMIT:?}:\n{}", tail(&log_path))
    }

    async fn find_listener(&mut self, admin_path: &Path) -> Result<SocketAddr> {
        self.admin = fs::read_to_string(admin_path)?.trim().parse()?;
        if !get(self.admin, "/ready").await?.contains("LIVE") {
            bail!("not ready");
        }
        let listeners: Value = serde_json::from_str(&get(self.admin, "/listeners?format=json").await?)?;
        let address = &listeners["listener_statuses"][0]["local_address"]["socket_address"];
        let (ip, port) = (address["address"].as_str().context("no address")?, &address["port_value"]);
        Ok(format!("{ip}:{port}").parse()?)
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

/// Body of an answer to GET from a server on the loopback interface.
///
/// # Errors
/// When there is no answer, or another status than 200.
pub async fn get(server: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(server).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8(answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    if !head.contains(" 200") {
        bail!("{path}: {}", head.lines().next().unwrap_or_default());
    }
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") { unchunked(body) } else { Ok(body.to_owned()) }
}

fn unchunked(mut body: &str) -> Result<String> {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").context("a chunk without its size")?;
        let size = usize::from_str_radix(size, 16)?;
        if size == 0 {
            return Ok(whole);
        }
        whole.push_str(rest.get(..size).context("a chunk is cut")?);
        body = rest.get(size + 2..).context("a chunk without its end")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined() {
        assert_eq!(unchunked("3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n").unwrap(), "abcd");
        assert!(unchunked("5\r\nab").is_err());
    }

    #[test]
    fn objects_merge_and_the_rest_is_replaced() {
        let mut config = json!({"a": {"b": 1, "c": [1, 2]}, "d": 2});
        merge(&mut config, &json!({"a": {"c": [3], "e": {"f": 4}}}));
        assert_eq!(config, json!({"a": {"b": 1, "c": [3], "e": {"f": 4}}, "d": 2}));
    }

    #[test]
    fn the_local_configuration_can_be_edited() {
        // Any file will do for the module: nothing starts here.
        let module = root().join("envoy/local.yaml");
        let engine = SocketAddr::from(([127, 0, 0, 1], 8000));
        let mut config = Config::local(&module, &[engine]).unwrap();
        config.edit_filter(|filter| merge(filter, &json!({"prefix": {"block_bytes": 1024}}))).unwrap();
        let text = config.0.to_string();
        assert!(text.contains("block_bytes") && text.contains("override_host") && !text.contains("access_log"));
        config.make_plain(true).unwrap();
        let text = config.0.to_string();
        assert!(!text.contains("pd_filter") && !text.contains("local.yaml") && !text.contains("override_host"));
        assert!(text.contains("retry_policy") && text.contains("least_request"));
    }
}
