//! Follows all objects of a kind in one namespace: lists them, then watches from there on, for as long as it takes.
//!
//! kube-runtime has a watcher too. This one also tells when a watch stands again after it was lost, and gives every
//! request a time limit: a network that swallows packets is noticed, and the list that is kept meanwhile is called old.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use kube::Api;
use kube::api::{DynamicObject, ListParams, WatchEvent, WatchParams};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// Objects per page of a list.
const PAGE: u32 = 500;
/// Objects that one namespace may have; with more, nothing of it is taken.
const MAX_OBJECTS: usize = 100_000;
/// Pauses between attempts: doubled from the first to the last, and drawn at random from the upper half, so that many
/// of us do not come back in step.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// A watch that ended sooner was no success.
const SHORT_WATCH: Duration = Duration::from_secs(1);
/// Attempts in a row that may fail before it is said: servers restart and close watches all the time.
const QUIET_FAILURES: u32 = 1;
/// Attempts in a row that may fail before everything is listed again: what the server sends from that version on may be
/// what cannot be read.
const FAILURES_BEFORE_LIST: u32 = 4;

/// How long requests may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A page of a list, or the head of a watch.
    pub request: Duration,
    /// One watch, by the server's clock.
    pub watch_seconds: u32,
    /// What its end may take to arrive. A network that swallows packets is noticed when both are over.
    pub margin: Duration,
}

/// What happened to the objects.
#[derive(Debug)]
pub enum Event {
    /// These are all.
    Listed(Vec<DynamicObject>),
    /// This one is new or changed.
    Applied(Box<DynamicObject>),
    /// This one is gone.
    Deleted(Box<DynamicObject>),
    /// What is known is up to date again.
    Current,
    /// What is known may be old, for this reason.
    Stale(String),
}

/// All objects of a kind in one namespace.
#[derive(Debug)]
pub struct Follower {
    api: Api<DynamicObject>,
    field_selector: Option<String>,
    limits: Limits,
}

/// Why a watch has to be started anew.
enum End {
    /// Its time was over.
    Done,
    /// The server has forgotten the version: everything has to be listed again.
    Expired,
    /// Servers restart and close watches all the time: this is told when it happens again.
    Failed(String),
    /// Nothing came for too long, the end of the watch included.
    Silent(String),
    /// Nobody listens.
    Closed,
}

/// Counts what goes wrong in a row.
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
    /// Nothing is asked yet.
    #[must_use]
    pub fn new(api: Api<DynamicObject>, field_selector: Option<&str>, limits: Limits) -> Self {
        Self { api, field_selector: field_selector.map(str::to_owned), limits }
    }

    /// Tells `wrap` what happens until nobody listens.
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

/// 410 Gone is what compaction looks like.
fn is_expired(code: u16) -> bool {
    code == 410
}

/// One line without the error's debug text, which would repeat all of it.
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
