//! An API server that does what a test says: lists, watches, forgets, resets, hangs.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use futures::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the server does to requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    None,
    /// Answers nothing, ever.
    Hang,
    /// Every watch is answered with 410.
    Gone,
    /// Every watch begins with an event that says 410.
    GoneEvent,
    /// Every watch is cut as soon as it stands.
    Cut,
    /// Nobody may do anything.
    Forbidden,
    /// Every watch sends what is no event.
    Garbage,
    /// The second page of a list has expired.
    ExpiredPage,
}

#[derive(Clone)]
pub struct ApiServer {
    pub address: SocketAddr,
    world: Arc<Mutex<World>>,
    changed: watch::Sender<u64>,
}

/// The listener, which ends with it.
pub struct Listening(JoinHandle<()>);

#[derive(Default)]
struct World {
    version: u64,
    /// By path below the API's group and namespace.
    objects: BTreeMap<(String, String), Value>,
    /// Version, collection, event.
    log: Vec<(u64, String, Value)>,
    fault: Fault,
    lists: u64,
    watches: u64,
    /// Watches of an older one end.
    generation: u64,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ApiServer {
    pub async fn start() -> (Self, Listening) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Self { address, world: Arc::default(), changed: watch::channel(0).0 };
        let listening = server.listen(listener);
        (server, listening)
    }

    /// Listens again after a stop, with the objects of before.
    pub async fn restart(&self) -> Listening {
        self.listen(TcpListener::bind(self.address).await.unwrap())
    }

    fn listen(&self, listener: TcpListener) -> Listening {
        let router = Router::new()
            .route("/api/v1/namespaces/{namespace}/pods", get(collection))
            .route("/apis/{group}/{version}/namespaces/{namespace}/inferencepools", get(collection))
            .route("/apis/llm-d.ai/v1alpha2/namespaces/{namespace}/{plural}", get(collection))
            .with_state(self.clone());
        Listening(tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }))
    }

    pub fn cluster(&self) -> kube::Config {
        kube::Config::new(format!("http://{}", self.address).parse().unwrap())
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    pub fn apply(&self, namespace: &str, name: &str, object: Value) {
        self.apply_in(&format!("/api/v1/namespaces/{namespace}/pods"), name, object);
    }

    /// Makes or replaces an object, named and versioned as the server does it.
    pub fn apply_in(&self, collection: &str, name: &str, mut object: Value) {
        let mut world = self.world();
        world.version += 1;
        let namespace = collection.split('/').rev().nth(1).unwrap();
        object["metadata"]["name"] = name.into();
        object["metadata"]["namespace"] = namespace.into();
        object["metadata"]["resourceVersion"] = world.version.to_string().into();
        let key = (collection.to_owned(), name.to_owned());
        let kind = if world.objects.insert(key, object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        let event = (world.version, collection.to_owned(), json!({"type": kind, "object": object}));
        world.log.push(event);
        self.changed.send_replace(world.version);
    }

    pub fn delete(&self, namespace: &str, name: &str) {
        let collection = format!("/api/v1/namespaces/{namespace}/pods");
        let mut world = self.world();
        world.version += 1;
        let mut object = world.objects.remove(&(collection.clone(), name.to_owned())).unwrap();
        object["metadata"]["resourceVersion"] = world.version.to_string().into();
        let event = (world.version, collection, json!({"type": "DELETED", "object": object}));
        world.log.push(event);
        self.changed.send_replace(world.version);
    }

    pub fn set_fault(&self, fault: Fault) {
        self.world().fault = fault;
    }

    /// Ends every watch that stands.
    pub fn cut_watches(&self) {
        self.world().generation += 1;
        self.changed.send_modify(|_| {});
    }

    pub fn lists(&self) -> u64 {
        self.world().lists
    }

    pub fn watches(&self) -> u64 {
        self.world().watches
    }
}

fn status(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
           "message": format!("{reason} says the test")})
}

fn failure(code: u16, reason: &str) -> Response {
    (StatusCode::from_u16(code).unwrap(), Json(status(code, reason))).into_response()
}

async fn collection(
    State(server): State<ApiServer>,
    uri: axum::http::Uri,
    Path(_): Path<BTreeMap<String, String>>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    let path = uri.path().to_owned();
    let fault = server.world().fault;
    match fault {
        Fault::Hang => {
            std::future::pending::<()>().await;
        }
        Fault::Forbidden => return failure(403, "Forbidden"),
        _ => {}
    }
    if query.get("watch").is_some_and(|text| text == "true") {
        return watch_answer(&server, path, &query, fault);
    }
    let mut world = server.world();
    world.lists += 1;
    let limit: usize = query.get("limit").map_or(usize::MAX, |text| text.parse().unwrap());
    let after = query.get("continue").cloned().unwrap_or_default();
    if !after.is_empty() && world.fault == Fault::ExpiredPage {
        world.fault = Fault::None;
        return failure(410, "Expired");
    }
    let mut names = world.objects.keys().filter(|(of, name)| *of == path && *name > after).map(|(_, name)| name);
    let page: Vec<String> = names.by_ref().take(limit).cloned().collect();
    let next = names.next().is_some().then(|| page.last().cloned()).flatten();
    let items: Vec<Value> = page.iter().map(|name| world.objects[&(path.clone(), name.clone())].clone()).collect();
    let version = world.version.to_string();
    let list = json!({"kind": "List", "apiVersion": "v1", "items": items,
                      "metadata": {"resourceVersion": version, "continue": next.unwrap_or_default()}});
    Json(list).into_response()
}

fn watch_answer(server: &ApiServer, path: String, query: &BTreeMap<String, String>, fault: Fault) -> Response {
    let mut world = server.world();
    world.watches += 1;
    let since: u64 = query["resourceVersion"].parse().unwrap();
    let line = |value: &Value| Bytes::from(format!("{value}\n"));
    match fault {
        Fault::Gone => return failure(410, "Expired"),
        Fault::GoneEvent => {
            let event = json!({"type": "ERROR", "object": status(410, "Expired")});
            return Body::from(line(&event)).into_response();
        }
        Fault::Cut => return Body::empty().into_response(),
        Fault::Garbage => return Body::from("{\"type\": \"ADDED\", \"object\": 7}\n").into_response(),
        _ => {}
    }
    let generation = world.generation;
    drop(world);
    let (server, changed) = (server.clone(), server.changed.subscribe());
    let seconds: u64 = query["timeoutSeconds"].parse().unwrap();
    let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
    let events = stream::unfold((since, changed), move |(since, mut changed)| {
        let (server, path) = (server.clone(), path.clone());
        async move {
            loop {
                changed.borrow_and_update();
                {
                    let world = server.world();
                    if world.generation != generation {
                        return None;
                    }
                    // What hangs stops in the middle of it, too.
                    if world.fault != Fault::Hang
                        && let Some((version, _, event)) =
                            world.log.iter().find(|(version, of, _)| *version > since && *of == path)
                    {
                        return Some((Ok::<_, Infallible>(Bytes::from(format!("{event}\n"))), (*version, changed)));
                    }
                }
                tokio::select! {
                    result = changed.changed() => result.ok()?,
                    () = tokio::time::sleep_until(end) => {
                        if server.world().fault == Fault::Hang {
                            std::future::pending::<()>().await;
                        }
                        return None;
                    }
                }
            }
        }
    });
    Body::from_stream(events).into_response()
}
