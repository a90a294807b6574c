//! Addresses of services: connections to one go to its endpoints in turn, as kube-proxy's do.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::network::add_address;

/// How long an endpoint may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Label that names the service of a slice.
const SERVICE: &str = "kubernetes.io/service-name";

/// A service's namespace and name.
type Name = (String, String);

/// What is known of services and their endpoints.
#[derive(Debug, Default)]
pub struct Services {
    known: Mutex<Known>,
    turn: AtomicUsize,
}

#[derive(Debug, Default)]
struct Known {
    services: BTreeMap<Name, Service>,
    slices: BTreeMap<Name, EndpointSlice>,
}

impl Services {
    /// Addresses that a name stands for: the service's own, or its ready endpoints' where it has none. `None` where there
    /// is no such service.
    #[must_use]
    pub fn resolve(&self, namespace: &str, name: &str) -> Option<Vec<Ipv4Addr>> {
        let name = (namespace.to_owned(), name.to_owned());
        let known = self.known();
        let service = known.services.get(&name)?;
        Some(match address(service) {
            Some(address) => vec![address],
            None => known.ready(&name).flat_map(|(_, addresses)| addresses).collect(),
        })
    }

    /// An endpoint behind a service's port, another one each time.
    fn next(&self, name: &Name, port: Option<&str>) -> Option<SocketAddrV4> {
        let known = self.known();
        let endpoints: Vec<_> = known
            .ready(name)
            .filter_map(|(slice, addresses)| {
                let ports = slice.ports.as_deref().unwrap_or_default();
                let named = ports.iter().find(|of| of.name.as_deref().unwrap_or("") == port.unwrap_or(""))?;
                let number = u16::try_from(named.port?).ok()?;
                Some(addresses.into_iter().map(move |address| SocketAddrV4::new(address, number)))
            })
            .flatten()
            .collect();
        let turn = self.turn.fetch_add(1, Relaxed);
        endpoints.get(turn.checked_rem(endpoints.len())?).copied()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn ready<'a>(&'a self, service: &'a Name) -> impl Iterator<Item = (&'a EndpointSlice, Vec<Ipv4Addr>)> {
        self.slices
            .iter()
            .filter(move |((namespace, _), slice)| {
                *namespace == service.0 && slice.labels().get(SERVICE) == Some(&service.1)
            })
            .map(|(_, slice)| {
                let ready = slice.endpoints.iter().filter(|endpoint| {
                    endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
                });
                let addresses = ready.flat_map(|endpoint| &endpoint.addresses).filter_map(|text| text.parse().ok());
                (slice, addresses.collect())
            })
    }
}

/// Follows services and endpoints and serves their addresses until it is dropped.
pub async fn run(client: Client, services: Arc<Services>) {
    tokio::join!(follow_services(client.clone(), &services), follow_slices(client, &services));
}

async fn follow_services(client: Client, services: &Arc<Services>) {
    let mut serving: HashMap<Name, Vec<JoinHandle<()>>> = HashMap::new();
    let mut events = pin!(watcher::watcher(Api::<Service>::all(client.clone()), watcher::Config::default()));
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(service) | Event::InitApply(service)) => {
                let name = name(&service);
                let before = services.known().services.insert(name.clone(), service.clone());
                if before.is_none_or(|before| before.spec != service.spec) {
                    let tasks = serve(&client, services, &service).await;
                    for task in serving.insert(name, tasks).into_iter().flatten() {
                        task.abort();
                    }
                }
            }
            Ok(Event::Delete(service)) => {
                let name = name(&service);
                services.known().services.remove(&name);
                for task in serving.remove(&name).into_iter().flatten() {
                    task.abort();
                }
            }
            Ok(Event::Init | Event::InitDone) => {}
            Err(error) => tracing::warn!("services: {error}"),
        }
    }
}

async fn follow_slices(client: Client, services: &Services) {
    let mut events = pin!(watcher::watcher(Api::<EndpointSlice>::all(client), watcher::Config::default()));
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(slice) | Event::InitApply(slice)) => {
                services.known().slices.insert(name(&slice), slice);
            }
            Ok(Event::Delete(slice)) => drop(services.known().slices.remove(&name(&slice))),
            Ok(Event::Init | Event::InitDone) => {}
            Err(error) => tracing::warn!("endpoints: {error}"),
        }
    }
}

/// Listens on a service's address, and writes the address into the service's status if the service asks for a load
/// balancer.
async fn serve(client: &Client, services: &Arc<Services>, service: &Service) -> Vec<JoinHandle<()>> {
    let Some((address, spec)) = address(service).zip(service.spec.as_ref()) else { return Vec::new() };
    let name = name(service);
    // It stays on the node when the ports change.
    if let Err(error) = add_address(address).await {
        tracing::debug!("{error}");
    }
    let mut tasks = Vec::new();
    for port in spec.ports.iter().flatten().filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP") {
        let Ok(number) = u16::try_from(port.port) else { continue };
        match TcpListener::bind((address, number)).await {
            Ok(listener) => {
                let (services, name, port) = (Arc::clone(services), name.clone(), port.name.clone());
                tasks.push(tokio::spawn(async move { forward(listener, &services, &name, port.as_deref()).await }));
            }
            Err(error) => tracing::warn!("{address}:{number}: {error}"),
        }
    }
    if spec.type_.as_deref() == Some("LoadBalancer") {
        let api: Api<Service> = Api::namespaced(client.clone(), &name.0);
        let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": address.to_string()}]}}});
        if let Err(error) = api.patch_status(&name.1, &PatchParams::default(), &Patch::Merge(status)).await {
            tracing::warn!("status of service {}: {error}", name.1);
        }
    }
    tasks
}

async fn forward(listener: TcpListener, services: &Arc<Services>, name: &Name, port: Option<&str>) {
    while let Ok((mut near, _)) = listener.accept().await {
        let (services, name, port) = (Arc::clone(services), name.clone(), port.map(str::to_owned));
        // Connections outlive a change of the service, as kube-proxy's do.
        tokio::spawn(async move {
            let Some(endpoint) = services.next(&name, port.as_deref()) else { return };
            if let Ok(Ok(mut far)) = timeout(CONNECT_TIMEOUT, TcpStream::connect(endpoint)).await {
                let _ = (near.set_nodelay(true), far.set_nodelay(true));
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            }
        });
    }
}

fn name<K: Resource>(object: &K) -> Name {
    (object.namespace().unwrap_or_default(), object.name_any())
}

fn address(service: &Service) -> Option<Ipv4Addr> {
    service.spec.as_ref()?.cluster_ip.as_ref()?.parse().ok()
}
