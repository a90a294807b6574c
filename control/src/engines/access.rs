//! How pd-control reaches engines: over HTTP or HTTPS, with the engines' API key or without.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::Empty;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio_rustls::rustls::pki_types::ServerName;

use crate::access::tls::{self, Trust};
use crate::access::token::Token;

/// Time after which the token's file is read again: Kubernetes replaces files of Secrets within a minute or two.
const MAX_AGE: Duration = Duration::from_secs(30);

/// Options of the command line about access to engines.
#[derive(Clone, Debug, Default)]
pub struct EngineAccess {
    /// TLS; none: engines speak plain HTTP.
    pub tls: Option<EngineTls>,
    /// File with the bearer token that engines require; none: pd-control sends none.
    pub token_file: Option<PathBuf>,
}

/// How pd-control verifies engines over TLS.
#[derive(Clone, Debug, Default)]
pub struct EngineTls {
    /// Certificates to trust, PEM; none: the system's.
    pub ca_file: Option<PathBuf>,
    /// Host that the engines' certificates are for; none: their IP addresses.
    pub server_name: Option<String>,
}

/// A client that keeps one connection to each engine open.
pub(super) type EngineClient = Client<HttpsConnector<HttpConnector>, Empty<Bytes>>;

/// How pd-control reaches engines: a client, a scheme and a token.
pub(super) struct Reach {
    pub(super) client: EngineClient,
    /// `http` or `https`.
    pub(super) scheme: &'static str,
    token: Option<TokenFile>,
}

/// A token in a file.
struct TokenFile {
    path: PathBuf,
    present: Mutex<(Token, Instant)>,
}

impl EngineAccess {
    /// Checks the options: that the files can be read, and the name.
    ///
    /// # Errors
    /// One line that names the option.
    pub fn check(&self) -> anyhow::Result<()> {
        self.reach().map(drop)
    }

    /// A client without open connections.
    ///
    /// # Errors
    /// One line that names the option.
    pub(super) fn reach(&self) -> anyhow::Result<Reach> {
        let connector = match &self.tls {
            None => tls::connector(Trust::Nobody, None),
            Some(EngineTls { ca_file, server_name }) => {
                let trust = match ca_file {
                    Some(path) => Trust::File { option: "--engine-ca-file", path },
                    None => Trust::System,
                };
                let name = server_name.as_ref();
                let name = name.map(|name| {
                    ServerName::try_from(name.clone()).with_context(|| format!("--engine-server-name {name}"))
                });
                tls::connector(trust, name.transpose()?)
            }
        };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(1)
            .build(connector?);
        let token = self.token_file.as_deref().map(TokenFile::open).transpose()?;
        Ok(Reach { client, scheme: if self.tls.is_some() { "https" } else { "http" }, token })
    }
}

impl Reach {
    /// Value of the `authorization` header; `None` where engines get no token.
    pub(super) fn authorization(&self) -> Option<String> {
        self.token.as_ref().map(TokenFile::header)
    }

    /// What to do about an answer 401 or 403.
    pub(super) fn remedy(&self) -> &'static str {
        match self.token {
            Some(_) => "the engine refuses the token of --engine-token-file",
            None => "name the file with its API key by --engine-token-file",
        }
    }
}

impl TokenFile {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let present = Mutex::new((read(path)?, Instant::now()));
        Ok(Self { path: path.to_owned(), present })
    }

    /// The header's value. Where the file has become unreadable, the last good token stays in force.
    fn header(&self) -> String {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if present.1.elapsed() >= MAX_AGE {
            match read(&self.path) {
                Ok(token) => present.0 = token,
                Err(error) => tracing::error!("the last good token stays in force: {error:#}"),
            }
            present.1 = Instant::now();
        }
        present.0.header()
    }
}

/// The token of a file, without space around it.
fn read(path: &Path) -> anyhow::Result<Token> {
    let option = || format!("--engine-token-file {}", path.display());
    let text = std::fs::read_to_string(path).with_context(option)?;
    Token::new(text.trim()).context("a token is printable ASCII without spaces").with_context(option)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(token_file: &Path) -> EngineAccess {
        EngineAccess { tls: None, token_file: Some(token_file.to_owned()) }
    }

    #[test]
    fn a_token_is_read_from_its_file_and_not_shown() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("key");
        std::fs::write(&file, "s3cret\n").unwrap();
        assert_eq!(access(&file).reach().unwrap().authorization().unwrap(), "Bearer s3cret");
        assert!(!format!("{:?}", access(&file)).contains("s3cret"));
        for wrong in ["", "a b", "s3crét"] {
            std::fs::write(&file, wrong).unwrap();
            let error = format!("{:#}", access(&file).check().unwrap_err());
            assert!(error.starts_with("--engine-token-file ") && error.ends_with("without spaces"), "{error}");
        }
        let missing = format!("{:#}", access(&directory.path().join("none")).check().unwrap_err());
        assert!(missing.starts_with("--engine-token-file "), "{missing}");
    }

    #[test]
    fn a_token_that_changes_is_read_again_and_a_file_that_is_gone_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("key");
        std::fs::write(&file, "first").unwrap();
        let reach = access(&file).reach().unwrap();
        let token = reach.token.as_ref().unwrap();
        let after_a_while = || {
            token.present.lock().unwrap().1 = Instant::now().checked_sub(MAX_AGE).unwrap();
            reach.authorization().unwrap()
        };
        std::fs::write(&file, "second").unwrap();
        assert_eq!(reach.authorization().unwrap(), "Bearer first", "files are not read for each question");
        assert_eq!(after_a_while(), "Bearer second");
        std::fs::write(&file, "third\n").unwrap();
        assert_eq!(after_a_while(), "Bearer third");
        for wrong in [None, Some(""), Some("a b")] {
            match wrong {
                None => std::fs::remove_file(&file).unwrap(),
                Some(text) => std::fs::write(&file, text).unwrap(),
            }
            assert_eq!(after_a_while(), "Bearer third", "{wrong:?}");
        }
        std::fs::write(&file, "fourth").unwrap();
        assert_eq!(after_a_while(), "Bearer fourth");
    }

    #[test]
    fn certificates_and_the_name_are_checked_at_the_start() {
        let tls = |ca_file, server_name: Option<&str>| EngineAccess {
            tls: Some(EngineTls { ca_file, server_name: server_name.map(str::to_owned) }),
            token_file: None,
        };
        let error = |access: EngineAccess| format!("{:#}", access.check().unwrap_err());
        assert!(error(tls(Some("none.pem".into()), None)).starts_with("--engine-ca-file none.pem"));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ca.pem");
        std::fs::write(&file, "no PEM").unwrap();
        assert!(error(tls(Some(file), None)).starts_with("--engine-ca-file "));
    }
}
