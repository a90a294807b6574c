//! Follows all objects of a kind in one namespace: lists them, then watches their changes.
//!
//! kube-runtime has a watcher, too. This one also reports when a watch works again, and every request has a time limit:
//! it notices a network that drops packets, and reports that the view may be old.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use kube::Api;
use kube::api::{DynamicObject, ListParams, WatchEvent, WatchParams};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// Objects in a page of a list.
const PAGE: u32 = 500;
/// Most objects of one namespace. With more, pd-control takes none of them.
const MAX_OBJECTS: usize = 100_000;
/// Pauses between attempts: doubled from the first to the last, and drawn at random from the upper half, so that many
/// replicas do not return at the same time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// A watch that ends sooner counts as a failure.
const SHORT_WATCH: Duration = Duration::from_secs(1);
/// Failures in a row that are not reported: API servers restart and close watches all the time.
const QUIET_FAILURES: u32 = 1;
/// Failures in a row after which all objects are listed again: an event after this version may be one that pd-control
/// cannot read.
const FAILURES_BEFORE_LIST: u32 = 4;

/// Time limits of requests to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A page of a list, or the head of a watch.
    pub request: Duration,
    /// One watch, by the server's clock.
    pub watch_seconds: u32,
    /// Extra time for the end of a watch to arrive. After both times, the network is taken to drop packets.
    pub margin: Duration,
}

/// What happened to the followed objects.
#[derive(Debug)]
pub enum Event {
    /// All objects, from a list.
    Listed(Vec<DynamicObject>),
    /// A new or changed object.
    Applied(Box<DynamicObject>),
    /// A deleted object.
    Deleted(Box<DynamicObject>),
    /// The view is up to date again.
    Current,
    /// The view may be old, for this reason.
    Stale(String),
}

/// Follows all objects of a kind in one namespace.
#[derive(Debug)]
pub struct Follower {
    api: Api<DynamicObject>,
    field_selector: Option<String>,
    limits: Limits,
}

/// Why a watch ended.
enum End {
    /// Its time limit was reached.
    Done,
    /// The server no longer has the version: all objects have to be listed again.
    Expired,
    /// The server closed it. Servers restart and close watches all the time, so the first failure is not reported.
    Failed(String),
    /// Neither an event nor the end of the watch arrived in time.
    Silent(String),
    /// The receiver of events is closed.
    Closed,
}

/// Counts failures in a row.
struct Failures {
    random: RandomState,
    in_a_row: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { request: Duration::from_secs(20), watch_seconds: 30, margin: Duration::from_secs(5) }
    }
}

impl Follower {
    /// A follower that has sent no request yet.
    #[must_use]
    pub fn new(api: Api<DynamicObject>, field_selector: Option<&str>, limits: Limits) -> Self {
        Self { api, field_selector: field_selector.map(str::to_owned), limits }
    }

    /// Sends each event, wrapped by `wrap`, until the receiver is closed.
    pub async fn run<T>(self, events: mpsc::Sender<T>, wrap: impl Fn(Event) -> T) {
        let mut failures = Failures { random: RandomState::new(), in_a_row: 0 };
        loop {
            let mut version = match self.list().await {
                Ok((objects, version)) => {
                    if events.send(wrap(Event::Listed(objects))).await.is_err() {
                        return;
                    }
                    version
                }
                Err(reason) => {
                    if events.send(wrap(Event::Stale(reason))).await.is_err() {
                        return;
                    }
                    failures.pause().await;
                    continue;
                }
            };
            loop {
                let start = tokio::time::Instant::now();
                let end = self.watch(&mut version, &events, &wrap).await;
                if start.elapsed() >= SHORT_WATCH {
                    failures.in_a_row = 0;
                }
                match end {
                    End::Closed => return,
                    End::Done if start.elapsed() >= SHORT_WATCH => continue,
                    End::Done => {}
                    End::Expired => {
                        failures.pause().await;
                        break;
                    }
                    End::Failed(reason) if failures.in_a_row < QUIET_FAILURES => {
                        tracing::debug!("a watch ended: {reason}")
                    }
                    End::Failed(reason) | End::Silent(reason) => {
                        if events.send(wrap(Event::Stale(reason))).await.is_err() {
                            return;
                        }
                    }
                }
                failures.pause().await;
                if failures.in_a_row >= FAILURES_BEFORE_LIST {
                    break;
                }
            }
        }
    }

    async fn list(&self) -> Result<(Vec<DynamicObject>, String), String> {
        let mut objects = Vec::new();
        let mut continue_token = None;
        loop {
            let parameters = ListParams {
                field_selector: self.field_selector.clone(),
                limit: Some(PAGE),
                continue_token,
                ..ListParams::default()
            };
            let page = timeout(self.limits.request, self.api.list(&parameters))
                .await
                .map_err(|_| format!("no list in {:?}", self.limits.request))?
                .map_err(|error| reason(&error))?;
            objects.extend(page.items);
            if objects.len() > MAX_OBJECTS {
                return Err(format!("more than {MAX_OBJECTS} objects"));
            }
            continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if continue_token.is_none() {
                let version = page.metadata.resource_version.filter(|version| !version.is_empty());
                return version.map(|version| (objects, version)).ok_or_else(|| "a list without version".to_owned());
            }
        }
    }

    async fn watch<T>(&self, version: &mut String, events: &mpsc::Sender<T>, wrap: &impl Fn(Event) -> T) -> End {
        let parameters = WatchParams {
            field_selector: self.field_selector.clone(),
            timeout: Some(self.limits.watch_seconds),
            bookmarks: true,
            ..WatchParams::default()
        };
        let stream = tokio::select! {
            () = events.closed() => return End::Closed,
            stream = timeout(self.limits.request, self.api.watch(&parameters, version)) => stream,
        };
        let mut stream = match stream {
            Ok(Ok(stream)) => stream.boxed(),
            Ok(Err(kube::Error::Api(status))) if is_expired(status.code) => return End::Expired,
            Ok(Err(error)) => return End::Failed(reason(&error)),
            Err(_) => return End::Silent(format!("no watch in {:?}", self.limits.request)),
        };
        if events.send(wrap(Event::Current)).await.is_err() {
            return End::Closed;
        }
        let limit = Duration::from_secs(self.limits.watch_seconds.into()) + self.limits.margin;
        loop {
            let next = tokio::select! {
                () = events.closed() => return End::Closed,
                next = timeout(limit, stream.try_next()) => next,
            };
            let event = match next {
                Err(_) => return End::Silent(format!("the API server was silent for {limit:?}")),
                Ok(Ok(None)) => return End::Done,
                Ok(Err(error)) => return End::Failed(reason(&error)),
                Ok(Ok(Some(event))) => event,
            };
            let event = match event {
                WatchEvent::Bookmark(bookmark) => {
                    *version = bookmark.metadata.resource_version;
                    continue;
                }
                WatchEvent::Error(status) if is_expired(status.code) => return End::Expired,
                WatchEvent::Error(status) => return End::Failed(format!("{} ({})", status.message, status.code)),
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    advance(version, &object);
                    Event::Applied(Box::new(object))
                }
                WatchEvent::Deleted(object) => {
                    advance(version, &object);
                    Event::Deleted(Box::new(object))
                }
            };
            if events.send(wrap(event)).await.is_err() {
                return End::Closed;
            }
        }
    }
}

impl Failures {
    async fn pause(&mut self) {
        let longest = FIRST_PAUSE.saturating_mul(1 << self.in_a_row.min(16)).min(LAST_PAUSE);
        self.in_a_row = self.in_a_row.saturating_add(1);
        let mut hasher = self.random.build_hasher();
        hasher.write_u32(self.in_a_row);
        let share = 0.5 + (hasher.finish() % 1_024) as f64 / 2_048.0;
        sleep(longest.mul_f64(share)).await;
    }
}

fn advance(version: &mut String, object: &DynamicObject) {
    if let Some(newer) = object.metadata.resource_version.as_ref().filter(|newer| !newer.is_empty()) {
        version.clone_from(newer);
    }
}

/// The API server answers 410 Gone for a version that it has compacted.
fn is_expired(code: u16) -> bool {
    code == 410
}

/// One line with the causes of an error, each once.
fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} ({})", status.message, status.code),
        other => {
            let mut text = other.to_string();
            let mut source = std::error::Error::source(other);
            while let Some(cause) = source {
                let cause_text = cause.to_string();
                if !text.contains(&cause_text) {
                    text = format!("{text}: {cause_text}");
                }
                source = cause.source();
            }
            text.replace('\n', " ")
        }
    }
}
