//! The command line, and the configuration that it describes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::access::tls::TlsFiles;
use crate::access::token::Token;
use crate::cli::client::Server;
use crate::cli::top::Shown;
use crate::control::{Config, DEFAULT_POLL, Kubernetes};
use crate::engines::access::{EngineAccess, EngineTls};
use crate::engines::scrape;
use crate::envoys::relay::{Replicas, ReplicasTls};
use crate::publish::eds::EdsFile;
use crate::sources::allow::AllowedNetworks;
use crate::sources::kubernetes::KubernetesConfig;
use crate::sources::kubernetes::follow::Limits;
use crate::sources::names::NamedEndpoint;
use crate::sources::yaml;

/// Environment variable with the token, unless `--token-env` names another one.
pub(crate) const TOKEN_VARIABLE: &str = "PD_CONTROL_TOKEN";
/// Environment variable with the token of operators, unless `--operator-token-env` names another one.
const OPERATOR_TOKEN_VARIABLE: &str = "PD_CONTROL_OPERATOR_TOKEN";
/// Environment variable with the token of replicas, unless `--peers-token-env` names another one.
const PEERS_TOKEN_VARIABLE: &str = "PD_CONTROL_PEERS_TOKEN";

/// Publishes the list of endpoints to the prefill/decode filter of every Envoy.
///
/// pd-control follows the pods of a cluster, a file of endpoints or both, and pushes every change to the filters that poll.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub(super) command: Option<Command>,
    #[command(flatten)]
    pub(super) serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check files before they are applied: names every fault, and warns of lists that cannot serve
    Check {
        /// Endpoints files, files for --kubernetes-config, plugin configurations (JSON), Kubernetes manifests; - for
        /// standard input
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Manifests in force now, to check the rollout from them: `kubectl get -o yaml` of the same kinds
        #[arg(long, value_name = "FILE")]
        applied: Option<PathBuf>,
    },
    /// Read manifests of llm-d, the Inference Extension or AIBrix and print values for this project's Helm chart
    ///
    /// It reads InferencePool, InferenceObjective, InferenceModel, InferenceModelRewrite, HTTPRoute, the endpoint picker's
    /// configuration, flags of routing sidecars and variables of AIBrix' gateway. For each setting, a line on standard
    /// error names the value that it became, or the reason why it became none.
    Migrate {
        /// Manifests, such as `kubectl get -o yaml` prints; - for standard input
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// List the endpoints of a running pd-control
    Endpoints {
        #[command(flatten)]
        server: Server,
    },
    /// Explain why a pod or an endpoint is in the list as it is, or is not in it
    Explain {
        #[command(flatten)]
        server: Server,
        /// Address of an endpoint, or name of a pod with or without its namespace
        name: String,
    },
    /// Show pools, failing and busy endpoints, Envoys and decisions
    Top {
        #[command(flatten)]
        server: Server,
        #[command(flatten)]
        shown: Shown,
        /// Print once, instead of every two seconds
        #[arg(long)]
        once: bool,
    },
}

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Endpoints file to serve and follow, YAML or JSON
    #[arg(long, env = "PD_CONTROL_ENDPOINTS", value_name = "FILE")]
    endpoints: Option<PathBuf>,
    /// Follow the pods of pd-control's own cluster, or of the cluster that KUBECONFIG names
    #[arg(long, env = "PD_CONTROL_KUBERNETES")]
    kubernetes: bool,
    /// Namespaces to follow, separated by commas [default: its own]
    #[arg(long, value_name = "NS", value_delimiter = ',', env = "PD_CONTROL_NAMESPACE")]
    namespace: Vec<String>,
    /// File with the selectors, InferencePools and networks to follow. Implies --kubernetes
    #[arg(long, env = "PD_CONTROL_KUBERNETES_CONFIG", value_name = "FILE")]
    kubernetes_config: Option<PathBuf>,
    /// Endpoint by address or DNS name, with role=ROLE and other keys of an endpoint. May be repeated
    #[arg(long, value_name = "HOST:PORT,KEY=VALUE,…")]
    endpoint: Vec<NamedEndpoint>,
    /// Allow-list for the addresses of pods and DNS names [default: all but loopback, link-local and metadata]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', env = "PD_CONTROL_ALLOWED_CIDR")]
    allowed_cidr: Vec<IpNet>,
    /// Seconds between two requests to an engine for its metrics; 0: none [default: 5 with --kubernetes, else 0]
    #[arg(long, value_name = "SECONDS", env = "PD_CONTROL_SCRAPE_INTERVAL")]
    scrape_interval: Option<f64>,
    /// Ask engines for their metrics and models over TLS
    #[arg(long, env = "PD_CONTROL_ENGINE_TLS")]
    engine_tls: bool,
    /// Certificates to trust engines by, PEM [default: the system's]
    #[arg(long, value_name = "FILE", env = "PD_CONTROL_ENGINE_CA_FILE", requires = "engine_tls")]
    engine_ca_file: Option<PathBuf>,
    /// Host that the engines' certificates are for [default: their IP addresses]
    #[arg(long, value_name = "NAME", env = "PD_CONTROL_ENGINE_SERVER_NAME", requires = "engine_tls")]
    engine_server_name: Option<String>,
    /// File with the API key that engines require, sent as a bearer token. pd-control reads it again when it changes
    #[arg(long, value_name = "FILE", env = "PD_CONTROL_ENGINE_TOKEN_FILE")]
    engine_token_file: Option<PathBuf>,
    /// Name that resolves to every replica of pd-control (a headless Service): replicas relay what Envoys exchange
    #[arg(long, value_name = "HOST:PORT", env = "PD_CONTROL_PEERS")]
    peers: Option<String>,
    /// Certificates to trust replicas by, PEM. With --tls-cert, replicas speak TLS, and each one's certificate is for
    /// the host that --peers names [default: the system's]
    #[arg(long, value_name = "FILE", env = "PD_CONTROL_PEERS_CA_FILE", requires = "peers", requires = "tls_cert")]
    peers_ca_file: Option<PathBuf>,
    /// Certificate for TLS, PEM. pd-control reads it again when it changes
    #[arg(long, value_name = "FILE", env = "PD_CONTROL_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Key of the certificate, PEM
    #[arg(long, value_name = "FILE", env = "PD_CONTROL_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Address to listen on
    #[arg(long, env = "PD_CONTROL_LISTEN", value_name = "IP:PORT", default_value = "127.0.0.1:9000")]
    listen: SocketAddr,
    /// Address to serve KEDA's external scaler on, by gRPC
    #[arg(long, env = "PD_CONTROL_SCALER_LISTEN", value_name = "IP:PORT")]
    scaler_listen: Option<SocketAddr>,
    /// EDS file to write for a plain Envoy: the hosts of its cluster
    #[arg(long, env = "PD_CONTROL_EDS_FILE", value_name = "FILE")]
    eds_file: Option<PathBuf>,
    /// Envoy cluster of the EDS file
    #[arg(long, env = "PD_CONTROL_EDS_CLUSTER", value_name = "NAME", default_value = "engines")]
    eds_cluster: String,
    /// Environment variable with the bearer token that /v1/ paths require [default: PD_CONTROL_TOKEN, if set]
    #[arg(long, value_name = "NAME")]
    token_env: Option<String>,
    /// Environment variable with the bearer token of operators, which changing the log level requires [default:
    /// PD_CONTROL_OPERATOR_TOKEN, if set; else the token of the filters]
    #[arg(long, value_name = "NAME")]
    operator_token_env: Option<String>,
    /// Environment variable with the bearer token that replicas send each other. Only a client with this token may send
    /// records of other Envoys [default: PD_CONTROL_PEERS_TOKEN, if set; else the token of the filters]
    #[arg(long, value_name = "NAME")]
    peers_token_env: Option<String>,
    /// Log level: error, warn, info, debug, trace, or a filter such as info,pd_control=debug
    #[arg(long, env = "PD_CONTROL_LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    pub(super) log_level: String,
    /// How to log: lines for people, or one JSON object a line
    #[arg(long, env = "PD_CONTROL_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    Text,
    Json,
}

/// Files that the command line names.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Files {
    pub(crate) endpoints: Option<PathBuf>,
    pub(crate) kubernetes_config: Option<PathBuf>,
    /// Whether pd-control follows pods.
    pub(crate) follows_pods: bool,
    /// Whether pd-control asks engines, and how.
    pub(crate) asks_engines: Option<AsksEngines>,
}

/// How pd-control asks engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AsksEngines {
    /// Over TLS.
    pub(crate) tls: bool,
    /// With a token.
    pub(crate) token: bool,
}

/// Reads the arguments and environment variables of a container.
///
/// # Errors
/// One line for the first fault.
pub(crate) fn files_of(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Files, String> {
    let mut line = vec!["pd-control".to_owned()];
    for argument in ServeArgs::augment_args(clap::Command::new("pd-control")).get_arguments() {
        let value = argument.get_env().and_then(|name| variables.iter().find(|(known, _)| name == *known));
        let long = argument.get_long().filter(|long| !arguments.iter().any(|it| it.starts_with(&format!("--{long}"))));
        let (Some((_, value)), Some(long)) = (value, long) else { continue };
        match argument.get_action().takes_values() {
            true => line.push(format!("--{long}={value}")),
            false if *value != "false" => line.push(format!("--{long}")),
            false => {}
        }
    }
    line.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    let first = |text: String| text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    let cli = Cli::try_parse_from(line).map_err(|error| first(error.to_string()))?;
    if cli.command.is_some() {
        return Err("the arguments run a command that ends, not the server".to_owned());
    }
    let serve = cli.serve;
    let follows_pods = serve.kubernetes || serve.kubernetes_config.is_some();
    let asks = serve.scrape_interval.map_or(follows_pods, |seconds| seconds > 0.0);
    let how = AsksEngines { tls: serve.engine_tls, token: serve.engine_token_file.is_some() };
    Ok(Files {
        endpoints: serve.endpoints,
        kubernetes_config: serve.kubernetes_config,
        follows_pods,
        asks_engines: asks.then_some(how),
    })
}

/// The token in the variable that an option names, or in the usual one; `None` where neither is set.
fn token_of(
    option: &str,
    named: Option<&str>,
    usual: &str,
    variable: &impl Fn(&str) -> Option<String>,
) -> anyhow::Result<Option<Token>> {
    let text = match named {
        Some(name) => Some(variable(name).with_context(|| format!("{option} {name}: the variable is not set"))?),
        None => variable(usual).filter(|text| !text.is_empty()),
    };
    let name = named.unwrap_or(usual);
    text.map(|text| Token::new(&text).with_context(|| format!("{name}: a token is printable ASCII without spaces")))
        .transpose()
}

impl ServeArgs {
    pub(super) fn config(self, variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<Config> {
        let kubernetes = self.kubernetes()?;
        if self.endpoints.is_none() && kubernetes.is_none() && self.endpoint.is_empty() {
            bail!("--endpoints FILE, --endpoint or --kubernetes is needed (see --help)");
        }
        let token = token_of("--token-env", self.token_env.as_deref(), TOKEN_VARIABLE, &variable)?;
        let named = self.operator_token_env.as_deref();
        let operator = token_of("--operator-token-env", named, OPERATOR_TOKEN_VARIABLE, &variable)?;
        let named = self.peers_token_env.as_deref();
        let replicas_token = token_of("--peers-token-env", named, PEERS_TOKEN_VARIABLE, &variable)?;
        let to_replicas = replicas_token.clone().or_else(|| token.clone());
        if token.is_none() && !self.listen.ip().is_loopback() {
            tracing::warn!(
                "pd-control listens on {} and requires no token: anyone may read the endpoints, and no other host may send \
                 loads for the exchange",
                self.listen
            );
        }
        let eds = self.eds_file.map(|path| EdsFile::new(path, self.eds_cluster));
        let scrape = match self.scrape_interval {
            None => kubernetes.as_ref().map(|_| scrape::DEFAULT_INTERVAL),
            Some(0.0) => None,
            Some(seconds) if (0.1..=3_600.0).contains(&seconds) => Some(Duration::from_secs_f64(seconds)),
            Some(_) => bail!("--scrape-interval: must be 0, or between 0.1 and 3600"),
        };
        let engine_tls = EngineTls { ca_file: self.engine_ca_file, server_name: self.engine_server_name };
        let engines = EngineAccess { tls: self.engine_tls.then_some(engine_tls), token_file: self.engine_token_file };
        engines.check()?;
        let replicas_tls = self.tls_cert.is_some().then_some(ReplicasTls { ca_file: self.peers_ca_file });
        let tls = self.tls_cert.zip(self.tls_key).map(|(certificate, key)| TlsFiles { certificate, key });
        Ok(Config {
            endpoints: self.endpoints,
            kubernetes,
            named: self.endpoint,
            networks: AllowedNetworks::new(self.allowed_cidr),
            scrape,
            engines,
            replicas: self.peers.map(|name| Replicas { name, token: to_replicas, tls: replicas_tls }),
            tls,
            log: None,
            listen: self.listen,
            scaler: self.scaler_listen,
            eds,
            token,
            operator,
            replicas_token,
            poll: DEFAULT_POLL,
        })
    }

    fn kubernetes(&self) -> anyhow::Result<Option<Kubernetes>> {
        if !self.kubernetes && self.kubernetes_config.is_none() {
            if !self.namespace.is_empty() {
                bail!("--namespace needs --kubernetes");
            }
            return Ok(None);
        }
        let mut config = match &self.kubernetes_config {
            Some(path) => KubernetesConfig::parse(path, &yaml::read(path)?)?,
            None => KubernetesConfig::default(),
        };
        if !self.namespace.is_empty() {
            config.namespaces.clone_from(&self.namespace);
            config.namespaces.sort();
            config.namespaces.dedup();
        }
        config.allowed_cidrs.extend(&self.allowed_cidr);
        Ok(Some(Kubernetes { config, cluster: None, limits: Limits::default() }))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn config(line: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Config, String> {
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        cli.serve.config(variable).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_token_comes_from_the_variable_that_is_named() {
        let line = "pd-control --endpoints e.yaml";
        assert!(config(line, |_| None).unwrap().token.is_none());
        assert!(config(line, |_| Some(String::new())).unwrap().token.is_none());
        assert!(config(line, |name| (name == "PD_CONTROL_TOKEN").then(|| "t".into())).unwrap().token.is_some());
        let named = format!("{line} --token-env T");
        assert!(config(&named, |name| (name == "T").then(|| "t".into())).unwrap().token.is_some());
        assert_eq!(config(&named, |_| None).unwrap_err(), "--token-env T: the variable is not set");
        assert_eq!(config(&named, |_| Some("a b".into())).unwrap_err(), "T: a token is printable ASCII without spaces");
    }

    #[test]
    fn replicas_send_their_own_token_else_that_of_the_filters() {
        let line = "pd-control --endpoints e.yaml --peers pd-control-peers:9000";
        let token = |names: &[&str]| {
            let config = config(line, |name| names.contains(&name).then(|| name.to_owned())).unwrap();
            config.replicas.unwrap().token.map(|token| token.header())
        };
        assert_eq!(token(&[]), None);
        assert_eq!(token(&["PD_CONTROL_TOKEN"]).unwrap(), "Bearer PD_CONTROL_TOKEN");
        assert_eq!(token(&["PD_CONTROL_TOKEN", "PD_CONTROL_PEERS_TOKEN"]).unwrap(), "Bearer PD_CONTROL_PEERS_TOKEN");
    }

    #[test]
    fn without_a_source_there_is_nothing_to_serve() {
        let error = "--endpoints FILE, --endpoint or --kubernetes is needed (see --help)";
        assert_eq!(config("pd-control", |_| None).unwrap_err(), error);
    }

    #[test]
    fn replicas_speak_tls_where_pd_control_serves_it() {
        let line = "pd-control --endpoints e.yaml --peers pd-control-peers:9000";
        let replicas = |line: &str| config(line, |_| None).unwrap().replicas.unwrap();
        assert!(replicas(line).tls.is_none());
        let serving = format!("{line} --tls-cert c.pem --tls-key k.pem");
        assert_eq!(replicas(&serving).tls.unwrap().ca_file, None);
        let trusting = format!("{serving} --peers-ca-file ca.pem");
        assert_eq!(replicas(&trusting).tls.unwrap().ca_file, Some("ca.pem".into()));
        for line in [format!("{line} --peers-ca-file ca.pem"), trusting.replace("--peers pd-control-peers:9000 ", "")] {
            let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::MissingRequiredArgument, "{line}: {error}");
        }
    }

    #[test]
    fn namespaces_of_the_command_line_win() {
        let namespaces = |line: &str| config(line, |_| None).unwrap().kubernetes.unwrap().config.namespaces;
        assert!(namespaces("pd-control --kubernetes").is_empty());
        assert_eq!(namespaces("pd-control --kubernetes --namespace b --namespace a,b"), ["a", "b"]);
        let error = config("pd-control --endpoints e.yaml --namespace a", |_| None).unwrap_err();
        assert_eq!(error, "--namespace needs --kubernetes");
    }
}
