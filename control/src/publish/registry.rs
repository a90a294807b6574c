//! The list in force, its version, and the changes since earlier versions.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use pd_core::wire::{Endpoint, EndpointId, MAX_CARDS, ModelCard, Snapshot, WIRE_VERSION};
use tokio::sync::watch;

use crate::list::EndpointList;

/// Endpoint names that the history keeps at least. For a longer list, the history keeps as many names as the list has
/// endpoints: a delta with more names would be no shorter than the list.
const HISTORY_IDS: usize = 256;

/// How many endpoints one publication changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Endpoints of the new list.
    pub total: usize,
    /// Endpoints that were not in the list before.
    pub added: usize,
    /// Endpoints whose values changed.
    pub changed: usize,
    /// Endpoints that the new list no longer has.
    pub removed: usize,
}

/// One version of the list, with the last changes that led to it.
#[derive(Debug)]
pub struct Published {
    epoch: Arc<str>,
    version: u64,
    changed_at: SystemTime,
    endpoints: EndpointList,
    /// Cards of the models that endpoints serve or served, each with the version that changed it last.
    cards: Cards,
    /// Version that changed last what objects of the cluster state.
    stated_in: u64,
    /// Changes that led to versions `version - history.len() + 1 ..= version`, oldest first.
    history: VecDeque<Arc<Step>>,
    /// Encoded answers by base version; `None` is the whole list. Each is encoded once for all filters.
    encoded: Mutex<BTreeMap<Option<u64>, Bytes>>,
}

type Cards = BTreeMap<String, (ModelCard, u64)>;

/// Names that one version added, changed or removed.
#[derive(Debug, Default)]
struct Step(Vec<Touch>);

#[derive(Clone, Copy, Debug)]
struct Touch {
    id: EndpointId,
    existed: bool,
}

/// Publishes lists to any number of watchers.
#[derive(Debug)]
pub struct Registry {
    published: watch::Sender<Arc<Published>>,
    /// Held while a list is published. Readers do not take it.
    publishing: Mutex<()>,
}

impl fmt::Display for Change {
    /// `5 endpoints (+1 -0 ~2)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { total, added, changed, removed } = self;
        write!(f, "{total} endpoint{} (+{added} -{removed} ~{changed})", if *total == 1 { "" } else { "s" })
    }
}

impl Published {
    /// Version 0 of an epoch: there is no list yet, and polls wait.
    #[must_use]
    pub fn nothing(epoch: &str, now: SystemTime) -> Self {
        Self {
            epoch: epoch.into(),
            version: 0,
            changed_at: now,
            endpoints: EndpointList::default(),
            cards: Cards::new(),
            stated_in: 0,
            history: VecDeque::new(),
            encoded: Mutex::default(),
        }
    }

    /// Name of this run; versions of different epochs do not compare.
    #[must_use]
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Number of publications in this epoch; 0 before the first list.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// When this version was published.
    #[must_use]
    pub fn changed_at(&self) -> SystemTime {
        self.changed_at
    }

    /// The list, sorted by name.
    #[must_use]
    pub fn endpoints(&self) -> &[Endpoint] {
        self.endpoints.as_slice()
    }

    /// The version after this one; `None` if `list` equals the list in force.
    #[must_use]
    pub fn advance(&self, list: EndpointList, now: SystemTime) -> Option<(Self, Change)> {
        let (step, change) = diff(&self.endpoints, &list);
        let states_the_same = list.stated() == self.endpoints.stated();
        if step.0.is_empty() && self.version > 0 && list.cards() == self.endpoints.cards() && states_the_same {
            return None;
        }
        let cards = self.next_cards(&step, &list);
        let mut history = self.history.clone();
        history.push_back(Arc::new(step));
        let limit = HISTORY_IDS.max(list.as_slice().len());
        // A step without a name has changed cards, or what objects state.
        let mut ids: usize = history.iter().map(|step| step.0.len().max(1)).sum();
        while ids > limit
            && let Some(oldest) = history.pop_front()
        {
            ids -= oldest.0.len().max(1);
        }
        let next = Self {
            epoch: Arc::clone(&self.epoch),
            version: self.version + 1,
            changed_at: now,
            endpoints: list,
            cards,
            stated_in: if states_the_same { self.stated_in } else { self.version + 1 },
            history,
            encoded: Mutex::default(),
        };
        Some((next, change))
    }

    /// The cards of the next version: those of before, what changed, and the names of models whose endpoints leave. When
    /// they are too many, those without an endpoint that changed first are dropped.
    fn next_cards(&self, step: &Step, list: &EndpointList) -> Cards {
        let mut cards = self.cards.clone();
        let version = self.version + 1;
        let left = step.0.iter().filter_map(|touch| self.endpoints.get(touch.id)).flat_map(|it| &it.models);
        for model in left {
            cards.entry(model.clone()).or_insert_with(|| (ModelCard::new(model), version));
        }
        for (model, card) in list.cards() {
            let known = cards.entry(model.clone()).or_insert_with(|| (ModelCard::new(model), 0));
            if known.0 != *card || known.1 == 0 {
                *known = (card.clone(), version);
            }
        }
        if let Some(excess) = cards.len().checked_sub(MAX_CARDS).filter(|excess| *excess > 0) {
            let gone = cards.iter().filter(|(model, _)| !list.cards().contains_key(*model));
            let mut gone: Vec<_> = gone.map(|(model, (_, version))| (*version, model.clone())).collect();
            gone.sort_unstable();
            for (_, model) in gone.into_iter().take(excess) {
                cards.remove(&model);
            }
        }
        cards
    }

    /// The snapshot for a filter that holds version `since` of `epoch`.
    ///
    /// `None` when the filter is up to date. The changes since `since` when they are shorter than the list, otherwise
    /// the whole list: also for another epoch, for `since` 0 and for a version that the history no longer has.
    #[must_use]
    pub fn snapshot(&self, epoch: &str, since: u64) -> Option<Snapshot> {
        self.base(epoch, since).map(|base| self.snapshot_from(base))
    }

    /// [`Published::snapshot`] as JSON.
    #[must_use]
    pub fn answer(&self, epoch: &str, since: u64) -> Option<Bytes> {
        let base = self.base(epoch, since)?;
        let mut encoded = self.encoded.lock().unwrap_or_else(PoisonError::into_inner);
        Some(encoded.entry(base).or_insert_with(|| self.snapshot_from(base).to_json().into()).clone())
    }

    /// The base version of the snapshot for such a filter: `Some(None)` for the whole list, `None` for no snapshot.
    fn base(&self, epoch: &str, since: u64) -> Option<Option<u64>> {
        if self.version == 0 {
            return None;
        }
        if epoch != &*self.epoch {
            return Some(None);
        }
        match since.cmp(&self.version) {
            Ordering::Equal => None,
            Ordering::Greater => Some(None),
            Ordering::Less => {
                let is_shorter =
                    self.touched_since(since).is_some_and(|touched| touched.len() < self.endpoints.as_slice().len());
                Some(is_shorter.then_some(since))
            }
        }
    }

    fn snapshot_from(&self, base: Option<u64>) -> Snapshot {
        let whole = || (None, self.endpoints.as_slice().to_vec(), Vec::new());
        let delta = |base| {
            let mut endpoints = Vec::new();
            let mut removed = Vec::new();
            for (id, existed) in self.touched_since(base)? {
                match self.endpoints.get(id) {
                    Some(endpoint) => endpoints.push(endpoint.clone()),
                    None if existed => removed.push(id.to_string()),
                    // Added and removed since: the filter never had it.
                    None => {}
                }
            }
            Some((Some(base), endpoints, removed))
        };
        let (base, endpoints, removed) = base.and_then(delta).unwrap_or_else(whole);
        let is_new = |version: &u64| base.is_none_or(|base| *version > base);
        Snapshot {
            wire: WIRE_VERSION,
            epoch: self.epoch.to_string(),
            version: self.version,
            base,
            endpoints,
            removed,
            models: self.cards.values().filter(|(_, version)| is_new(version)).map(|(card, _)| card.clone()).collect(),
            stated: (self.stated_in > 0 && is_new(&self.stated_in)).then(|| self.endpoints.stated().clone()),
        }
    }

    /// Names that changed since a version, each with whether that version had it; `None` when the history is too short.
    fn touched_since(&self, since: u64) -> Option<BTreeMap<EndpointId, bool>> {
        let steps = usize::try_from(self.version.checked_sub(since)?).ok()?;
        // Version 0 is no list, so there are no changes of it.
        let first = self.history.len().checked_sub(steps).filter(|_| since > 0)?;
        let mut touched = BTreeMap::new();
        for touch in self.history.range(first..).flat_map(|step| &step.0) {
            touched.entry(touch.id).or_insert(touch.existed);
        }
        Some(touched)
    }
}

impl Registry {
    /// A registry without a list.
    #[must_use]
    pub fn new(epoch: &str, now: SystemTime) -> Self {
        let (published, _) = watch::channel(Arc::new(Published::nothing(epoch, now)));
        Self { published, publishing: Mutex::new(()) }
    }

    /// Publishes a list and wakes every watcher; `None` when the list in force is the same.
    pub fn publish(&self, list: EndpointList, now: SystemTime) -> Option<Change> {
        let _guard = self.publishing.lock().unwrap_or_else(PoisonError::into_inner);
        let (next, change) = self.current().advance(list, now)?;
        self.published.send_replace(Arc::new(next));
        Some(change)
    }

    /// The version in force.
    #[must_use]
    pub fn current(&self) -> Arc<Published> {
        Arc::clone(&self.published.borrow())
    }

    /// A receiver that sees the newest version. It may miss versions in between.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<Published>> {
        self.published.subscribe()
    }
}

/// Walks two sorted lists side by side.
fn diff(old: &EndpointList, new: &EndpointList) -> (Step, Change) {
    let mut step = Step::default();
    let mut change = Change { total: new.as_slice().len(), ..Change::default() };
    let (mut olds, mut news) = (old.as_slice().iter().peekable(), new.as_slice().iter().peekable());
    loop {
        let order = match (olds.peek(), news.peek()) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(old), Some(new)) => old.id().cmp(&new.id()),
        };
        let before = if order == Ordering::Greater { None } else { olds.next() };
        let after = if order == Ordering::Less { None } else { news.next() };
        match (before, after) {
            (Some(before), Some(after)) if before == after => continue,
            (Some(_), Some(_)) => change.changed += 1,
            (Some(_), None) => change.removed += 1,
            (None, _) => change.added += 1,
        }
        if let Some(id) = before.or(after).map(Endpoint::id) {
            step.0.push(Touch { id, existed: before.is_some() });
        }
    }
    (step, change)
}

#[cfg(test)]
mod tests;
