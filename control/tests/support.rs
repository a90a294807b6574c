//! A pd-control in a directory of its own, and the filter that polls it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::{HeaderMap, Request, Response, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioExecutor;
use pd_control::access::token::Token;
use pd_control::publish::eds::EdsFile;
use pd_control::{Config, Control};
use pd_core::wire::Snapshot;
pub use pd_support::file::replace;
pub use pd_support::port::Port;
pub use pd_support::wait::{PATIENCE, until_true};
use tempfile::TempDir;

/// A running pd-control, its directory, and a client.
pub struct Rig {
    pub directory: TempDir,
    pub config: Config,
    pub control: Control,
    pub client: HttpClient,
}

#[derive(Clone)]
pub struct HttpClient {
    pub address: SocketAddr,
    pub token: Option<&'static str>,
    pub client: Client<HttpConnector, Full<Bytes>>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

/// What a filter remembers between polls.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub epoch: String,
    pub version: u64,
    pub table: BTreeMap<String, f64>,
}

/// An endpoints file with these ports and weights.
pub fn endpoints(ports_and_weights: &[(u16, f64)]) -> String {
    let line = |(port, weight): &(u16, f64)| format!("- {{address: 127.0.0.1:{port}, role: both, weight: {weight}}}\n");
    format!("endpoints:\n{}", ports_and_weights.iter().map(line).collect::<String>())
}

/// Four endpoints, the first of this weight.
pub fn four(weight: f64) -> String {
    endpoints(&[(1, weight), (2, 1.0), (3, 1.0), (4, 1.0)])
}

impl Rig {
    pub async fn start(text: &str) -> Self {
        Self::start_with(text, |_, _| {}).await
    }

    /// Starts with a configuration that the test may change; it also gets the directory.
    pub async fn start_with(text: &str, adapt: impl FnOnce(&mut Config, &Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let endpoints = directory.path().join("endpoints.yaml");
        std::fs::write(&endpoints, text).unwrap();
        let mut config = Config {
            endpoints: Some(endpoints),
            kubernetes: None,
            named: Vec::new(),
            networks: pd_control::sources::allow::AllowedNetworks::default(),
            scrape: None,
            engines: Default::default(),
            replicas: None,
            tls: None,
            log: None,
            listen: ([127, 0, 0, 1], 0).into(),
            scaler: None,
            eds: None,
            token: None,
            operator: None,
            replicas_token: None,
            // Out of the way: what is seen, the kernel has reported.
            poll: Duration::from_secs(3_600),
        };
        adapt(&mut config, directory.path());
        let control = Control::start(config.clone()).await.unwrap();
        let client = HttpClient::new(control.address());
        Self { directory, config, control, client }
    }

    /// Starts without a file; the test has to name another source.
    pub async fn start_without_file(adapt: impl FnOnce(&mut Config)) -> Self {
        Self::start_with("endpoints: []", |config, _| {
            config.endpoints = None;
            adapt(config);
        })
        .await
    }

    pub fn file(&self) -> PathBuf {
        self.directory.path().join("endpoints.yaml")
    }

    /// A filter that knows the list in force.
    pub async fn filter(&self) -> Filter {
        let mut filter = Filter::default();
        filter.poll(&self.client, PATIENCE).await.unwrap();
        filter
    }
}

pub fn with_eds(config: &mut Config, directory: &Path) {
    config.eds = Some(EdsFile::new(directory.join("eds.json"), "engines".into()));
}

pub fn with_token(config: &mut Config, _: &Path) {
    config.token = Token::new("secret");
}

impl HttpClient {
    pub fn new(address: SocketAddr) -> Self {
        Self { address, token: None, client: Client::builder(TokioExecutor::new()).build_http() }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.request("GET", path).await.unwrap()
    }

    pub async fn request(&self, method: &str, path: &str) -> Result<Answer, Error> {
        let (parts, body) = self.send(method, path, Bytes::new()).await?.into_parts();
        let body = String::from_utf8(body.into()).unwrap();
        Ok(Answer { status: parts.status, headers: parts.headers, body })
    }

    pub async fn send(&self, method: &str, path: &str, body: impl Into<Bytes>) -> Result<Response<Bytes>, Error> {
        let mut request = Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        if let Some(token) = self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let response = self.client.request(request.body(Full::new(body.into())).unwrap()).await?;
        let (parts, body) = response.into_parts();
        Ok(Response::from_parts(parts, body.collect().await.unwrap().to_bytes()))
    }

    /// The value of one line of `/metrics`.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").await.body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }
}

impl Filter {
    pub async fn request(&self, client: &HttpClient, wait: Duration) -> Answer {
        let Self { epoch, version, .. } = self;
        client.get(&format!("/v1/watch?epoch={epoch}&since={version}&wait_ms={}", wait.as_millis())).await
    }

    /// One poll; the snapshot, if there was one, is applied as a filter would.
    pub async fn poll(&mut self, client: &HttpClient, wait: Duration) -> Option<Snapshot> {
        let answer = self.request(client, wait).await;
        if answer.status == StatusCode::NOT_MODIFIED {
            return None;
        }
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
        let snapshot = Snapshot::parse(answer.body.as_bytes()).unwrap();
        match snapshot.base {
            None => self.table.clear(),
            Some(base) => assert_eq!((base, &snapshot.epoch), (self.version, &self.epoch)),
        }
        for id in &snapshot.removed {
            assert!(self.table.remove(id).is_some(), "{id} was never announced");
        }
        self.table.extend(snapshot.endpoints.iter().map(|endpoint| (endpoint.id().to_string(), endpoint.weight)));
        (self.epoch, self.version) = (snapshot.epoch.clone(), snapshot.version);
        Some(snapshot)
    }

    /// Polls until the first endpoint of [`four`] has this weight.
    pub async fn until_weight(&mut self, client: &HttpClient, weight: f64) {
        while self.table.get("127.0.0.1:1") != Some(&weight) {
            assert!(self.poll(client, PATIENCE).await.is_some(), "weight {weight} never came");
        }
    }
}
