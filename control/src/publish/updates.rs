//! Messages to the publisher: from sources of endpoint lists, and from the scraper of engines.
//!
//! A source is a task with a sender. It sends a list whenever it has a new one, and a problem when it has no list or
//! its list may be old. It does not decide which list is in force.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use pd_core::wire::ModelCard;
use tokio::sync::mpsc;

use crate::list::EndpointList;

/// What a source sends.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// A whole list; none: the source's last list stays.
    pub list: Option<EndpointList>,
    /// One line that says why there is no new list, or why the list may be old; none: the list is up to date.
    pub problem: Option<String>,
}

/// What the answers of one engine add to the list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fact {
    /// Models that the engine serves, for an endpoint whose list of models is not closed.
    pub models: Vec<ModelCard>,
    /// Whether the engine has answered the question for its models.
    pub has_answered_models: bool,
    /// Tokens of the KV cache, for an endpoint whose `cache_tokens` the sources leave open.
    pub cache_tokens: Option<u64>,
    /// Whether the engine stopped answering.
    pub is_down: bool,
    /// Cache epoch: a number that changes when the engine restarts or clears its prefix cache.
    pub cache_epoch: Option<u64>,
    /// KV leases that the engine let expire.
    pub expired_kv_leases: Option<u64>,
}

/// Facts by address.
pub type Facts = BTreeMap<SocketAddr, Fact>;

/// A message to the publisher.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// An update of the source with this index.
    Update(usize, Update),
    /// The facts of all engines.
    Facts(Facts),
}

/// The sender of one source. Sending waits while the publisher is busy.
#[derive(Clone, Debug)]
pub struct Updates {
    source: usize,
    sender: mpsc::Sender<Message>,
}

/// The publisher has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl From<Result<EndpointList, String>> for Update {
    fn from(outcome: Result<EndpointList, String>) -> Self {
        match outcome {
            Ok(list) => Self { list: Some(list), problem: None },
            Err(problem) => Self { list: None, problem: Some(problem) },
        }
    }
}

impl Updates {
    /// The sender of the source with this index.
    #[must_use]
    pub fn new(source: usize, sender: mpsc::Sender<Message>) -> Self {
        Self { source, sender }
    }

    /// Sends an update.
    ///
    /// # Errors
    /// [`Closed`] when the publisher has ended.
    pub async fn send(&self, update: Update) -> Result<(), Closed> {
        self.sender.send(Message::Update(self.source, update)).await.map_err(|_| Closed)
    }

    /// Sends the facts of all engines.
    ///
    /// # Errors
    /// [`Closed`] when the publisher has ended.
    pub async fn send_facts(&self, facts: Facts) -> Result<(), Closed> {
        self.sender.send(Message::Facts(facts)).await.map_err(|_| Closed)
    }

    /// Returns when the publisher has ended.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}
