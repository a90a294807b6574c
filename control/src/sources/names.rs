//! Endpoints of the command line: `host:port,role=…`. The host is an address, or a name that pd-control
//! resolves by DNS at intervals.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use pd_core::wire::{self, Endpoint};
use serde_json::{Map, Value};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::list::EndpointList;
use crate::publish::updates::{Update, Updates};
use crate::sources::allow::AllowedNetworks;

/// How often pd-control resolves names, on top of the time to live for which resolvers keep answers.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(5);
/// Time limit of resolving one name.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(3);
/// Addresses of one name; further ones are ignored.
const MAX_ADDRESSES: usize = 1_000;

/// The value of one `--endpoint`.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedEndpoint {
    host: String,
    port: u16,
    /// The endpoint, with a placeholder for the resolved addresses.
    template: Endpoint,
}

/// Endpoints named on the command line.
#[derive(Clone, Debug)]
pub struct NamesSource {
    /// Values of `--endpoint`.
    pub endpoints: Vec<NamedEndpoint>,
    /// Allow-list for resolved addresses.
    pub networks: AllowedNetworks,
    /// Time between two look-ups.
    pub interval: Duration,
}

impl std::str::FromStr for NamedEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let address = parts.next().unwrap_or_default();
        let (host, port) = address.rsplit_once(':').ok_or_else(|| format!("{address:?} is not host:port"))?;
        let port = port.parse().map_err(|_| format!("{address:?} is not host:port"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() || host.len() > 253 {
            return Err(format!("{address:?} is not host:port"));
        }
        let mut value = Map::new();
        value.insert("address".into(), SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), port)).to_string().into());
        for part in parts {
            let (key, text) = part.split_once('=').ok_or_else(|| format!("{part:?} is not key=value"))?;
            let text_value = || match text.parse::<u64>() {
                Ok(number) => number.into(),
                Err(_) => text.parse::<f64>().map_or_else(|_| text.into(), Value::from),
            };
            let typed: Value = match key {
                "address" => return Err("address is no key: the address is the first part".to_owned()),
                "models" => text.split('+').collect(),
                "models_closed" => text.parse::<bool>().map_or_else(|_| text.into(), Value::from),
                "rank" | "weight" | "cache_tokens" | "bootstrap_port" | "min_prompt_tokens" | "max_prompt_tokens" => {
                    text_value()
                }
                _ => text.into(),
            };
            if value.insert(key.to_owned(), typed).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        if let Some(key) = wire::unknown_endpoint_key(&value) {
            return Err(format!("{key}: unknown key; known are {}", wire::ENDPOINT_KEYS.join(", ")));
        }
        let template: Endpoint = serde_json::from_value(Value::Object(value)).map_err(|error| error.to_string())?;
        template.validate().map_err(|error| error.to_string())?;
        Ok(Self { host, port, template })
    }
}

impl NamedEndpoint {
    /// The address, if the host is one.
    fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    fn with_address(&self, ip: IpAddr) -> Endpoint {
        Endpoint { address: SocketAddr::new(ip, self.port), ..self.template.clone() }
    }
}

impl NamesSource {
    /// Name of the source, for people.
    #[must_use]
    pub fn name(&self) -> String {
        "--endpoint".to_owned()
    }

    /// The endpoints, if each host is an address; `None` when there is a name to resolve.
    #[must_use]
    pub fn fixed(&self) -> Option<Vec<Endpoint>> {
        self.endpoints.iter().map(|named| Some(named.with_address(named.address()?))).collect()
    }

    /// Resolves the names until the publisher has ended.
    pub async fn run(self, updates: Updates) {
        if self.fixed().is_some() {
            // The list cannot change.
            return updates.closed().await;
        }
        let mut known: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        let mut ticks = interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = updates.closed() => return,
                _ = ticks.tick() => {}
            }
            let mut problems = Vec::new();
            for named in self.endpoints.iter().filter(|named| named.address().is_none()) {
                match resolve(&named.host, named.port).await {
                    Ok(addresses) => {
                        known.insert(named.host.clone(), addresses);
                    }
                    Err(reason) => {
                        let kept =
                            if known.contains_key(&named.host) { "; pd-control keeps its last addresses" } else { "" };
                        problems.push(format!("{}: {reason}{kept}", named.host));
                    }
                }
            }
            if updates.send(self.update(&known, problems)).await.is_err() {
                return;
            }
        }
    }

    fn update(&self, known: &BTreeMap<String, Vec<IpAddr>>, mut problems: Vec<String>) -> Update {
        let mut endpoints = BTreeMap::new();
        let mut is_complete = true;
        for named in &self.endpoints {
            if let Some(ip) = named.address() {
                // An operator wrote the address, so it is not checked against the networks.
                endpoints.entry(named.with_address(ip).id()).or_insert_with(|| named.with_address(ip));
                continue;
            }
            let Some(addresses) = known.get(&named.host) else {
                is_complete = false;
                continue;
            };
            for ip in addresses {
                match self.networks.check(*ip) {
                    Ok(()) => {
                        endpoints.entry(named.with_address(*ip).id()).or_insert_with(|| named.with_address(*ip));
                    }
                    Err(reason) => problems.push(format!("{}: {reason}", named.host)),
                }
            }
        }
        let problem = (!problems.is_empty()).then(|| problems.join("; "));
        match EndpointList::new(endpoints.into_values().collect()) {
            Ok(list) => Update { list: is_complete.then_some(list), problem },
            Err(error) => Update { list: None, problem: Some(error.to_string()) },
        }
    }
}

async fn resolve(host: &str, port: u16) -> Result<Vec<IpAddr>, String> {
    let lookup = timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((host, port))).await;
    let found = lookup.map_err(|_| format!("no answer in {LOOKUP_TIMEOUT:?}"))?.map_err(|error| error.to_string())?;
    let mut addresses: Vec<_> = found.map(|address| address.ip().to_canonical()).take(MAX_ADDRESSES).collect();
    addresses.sort_unstable();
    addresses.dedup();
    if addresses.is_empty() { Err("the name has no address".to_owned()) } else { Ok(addresses) }
}

#[cfg(test)]
mod tests {
    use pd_core::wire::{Engine, Role};

    use super::*;

    #[test]
    fn an_endpoint_is_an_address_and_its_keys() {
        let named: NamedEndpoint =
            "[fd01::1]:8000,role=prefill,engine=sglang,models=a+b,weight=2,pool=7".parse().unwrap();
        let expected = Endpoint {
            pool: "7".into(),
            engine: Some(Engine::Sglang),
            models: vec!["a".into(), "b".into()],
            weight: 2.0,
            ..Endpoint::new("[fd01::1]:8000".parse().unwrap(), Role::Prefill)
        };
        assert_eq!(named.with_address(named.address().unwrap()), expected);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, why) in [
            ("", "\"\" is not host:port"),
            ("host", "\"host\" is not host:port"),
            (":80,role=both", "\":80\" is not host:port"),
            ("a:80", "missing field `role`"),
            ("a:80,role", "\"role\" is not key=value"),
            ("a:80,role=both,role=both", "role is given twice"),
            ("a:80,role=both,x=1", "x: unknown key"),
            ("a:80,role=both,weight=0", "endpoint 192.0.2.1:80: weight"),
            ("a:0,role=both", "endpoint 192.0.2.1:0: address"),
        ] {
            let error = text.parse::<NamedEndpoint>().unwrap_err();
            assert!(error.starts_with(why), "{text}: {error}");
        }
    }

    #[test]
    fn resolved_addresses_are_checked_and_unresolved_names_hold_the_list_back() {
        let endpoints = ["name:80,role=both", "127.0.0.1:81,role=both"].map(|text| text.parse().unwrap());
        let source = NamesSource {
            endpoints: endpoints.into(),
            networks: AllowedNetworks::default(),
            interval: DEFAULT_INTERVAL,
        };
        let update = source.update(&BTreeMap::new(), vec!["name: gone".into()]);
        assert_eq!((update.list, update.problem.as_deref()), (None, Some("name: gone")));
        let known =
            BTreeMap::from([("name".to_owned(), ["10.0.0.1", "169.254.169.254"].map(|it| it.parse().unwrap()).into())]);
        let update = source.update(&known, Vec::new());
        let addresses: Vec<_> = update.list.unwrap().as_slice().iter().map(|it| it.address.to_string()).collect();
        assert_eq!(addresses, ["10.0.0.1:80", "127.0.0.1:81"]);
        assert!(update.problem.unwrap().starts_with("name: 169.254.169.254 is in 169.254.0.0/16"));
    }
}
