//! The HTTP client for a running pd-control.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::http::{Request, StatusCode, Uri};
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::access::tls::{self, Trust};
use crate::api::status::StatusView;

/// Longest answer, in bytes: as many endpoints as a list may have fit.
const MAX_BYTES: usize = 256 << 20;
/// Time limit of an answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The pd-control to ask.
#[derive(Debug, Args)]
pub struct Server {
    /// URL of pd-control
    #[arg(long, env = "PD_CONTROL_SERVER", value_name = "URL", default_value = "http://127.0.0.1:9000")]
    server: Uri,
    /// Certificates to trust pd-control by, PEM [default: the system's]
    #[arg(long, env = "PD_CONTROL_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Name in its certificate, if that is not the host of the URL, as through a forwarded port
    #[arg(long, env = "PD_CONTROL_TLS_SERVER_NAME", value_name = "NAME")]
    tls_server_name: Option<String>,
    /// Environment variable with the bearer token
    #[arg(long, value_name = "NAME", default_value = "PD_CONTROL_TOKEN")]
    token_env: String,
    /// File with the bearer token, in place of the variable
    #[arg(long, env = "PD_CONTROL_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl Server {
    /// Asks for `/v1/status`.
    ///
    /// # Errors
    /// One line that says why there is no answer.
    pub async fn status(&self) -> anyhow::Result<StatusView> {
        let Some(scheme @ ("http" | "https")) = self.server.scheme_str() else {
            bail!("--server {}: must begin with http:// or https://", self.server);
        };
        let authority = self.server.authority().with_context(|| format!("--server {}: no host", self.server))?;
        let mut request = Request::get(format!("{scheme}://{authority}/v1/status"));
        if let Some(token) = self.token()? {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let client = Client::builder(TokioExecutor::new()).build(self.connector(scheme == "https")?);
        let answer = tokio::time::timeout(TIMEOUT, client.request(request.body(Empty::<Bytes>::new())?));
        let answer = answer.await.with_context(|| format!("{} did not answer in {TIMEOUT:?}", self.server))?;
        let answer = answer.with_context(|| format!("cannot reach {}", self.server))?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED => bail!("pd-control requires a token: set {} or --token-file", self.token_env),
            other => bail!("pd-control answers {other}"),
        }
        let body = Limited::new(answer.into_body(), MAX_BYTES).collect().await.map_err(anyhow::Error::from_boxed)?;
        Ok(serde_json::from_slice(&body.to_bytes())?)
    }

    fn token(&self) -> anyhow::Result<Option<String>> {
        let Some(file) = &self.token_file else { return Ok(std::env::var(&self.token_env).ok()) };
        let text = std::fs::read_to_string(file).with_context(|| format!("--token-file {}", file.display()))?;
        Ok(Some(text.trim().to_owned()))
    }

    fn connector(&self, is_tls: bool) -> anyhow::Result<HttpsConnector<HttpConnector>> {
        let trust = match &self.ca_file {
            Some(path) => Trust::File { option: "--ca-file", path },
            // A machine without system certificates can still speak plain HTTP.
            None if !is_tls => Trust::Nobody,
            None => Trust::System,
        };
        let name = self.tls_server_name.as_ref();
        let name =
            name.map(|name| ServerName::try_from(name.clone()).with_context(|| format!("--tls-server-name {name}")));
        tls::connector(trust, name.transpose()?)
    }
}
