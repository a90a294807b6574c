//! What a source of endpoint lists tells the publisher.
//!
//! A source is a task that owns the sending half: it sends a list whenever it has one, and why it has none, or why what
//! it has may be old, when that is so. It never decides what is in force.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use tokio::sync::mpsc;

use crate::list::EndpointList;

/// What a source has to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// A whole list; none: the source's last one stays.
    pub list: Option<EndpointList>,
    /// One line saying why there is no new list, or why it may be old; none: all is well.
    pub problem: Option<String>,
}

/// What of an engine's answers belongs in the list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fact {
    /// Models, where the list says none.
    pub models: Vec<String>,
    /// Cache size, where the list says none.
    pub cache_tokens: Option<u64>,
    /// Whether it does not answer any longer.
    pub is_down: bool,
}

/// Facts by address.
pub type Facts = BTreeMap<SocketAddr, Fact>;

/// What arrives at the publisher.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// A source, by its place among all, says something.
    Update(usize, Update),
    /// What the engines themselves say.
    Facts(Facts),
}

/// Where a source sends its lists. It waits while the publisher is busy.
#[derive(Clone, Debug)]
pub struct Updates {
    source: usize,
    sender: mpsc::Sender<Message>,
}

/// The publisher is gone.
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
    /// The sending half of a source, known to the publisher by its place among all sources.
    #[must_use]
    pub fn new(source: usize, sender: mpsc::Sender<Message>) -> Self {
        Self { source, sender }
    }

    /// Hands an update over.
    ///
    /// # Errors
    /// When the publisher is gone.
    pub async fn send(&self, update: Update) -> Result<(), Closed> {
        self.sender.send(Message::Update(self.source, update)).await.map_err(|_| Closed)
    }

    /// Hands facts over.
    ///
    /// # Errors
    /// When the publisher is gone.
    pub async fn send_facts(&self, facts: Facts) -> Result<(), Closed> {
        self.sender.send(Message::Facts(facts)).await.map_err(|_| Closed)
    }

    /// Ends when the publisher is gone.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}
