//! Values that a queue takes and returns.

use core::time::Duration;

use crate::config::{self, Cost};
use crate::endpoints::load::Left;
use crate::prefix::index::EndpointIndex;

/// Requests of one endpoint, priority and account that [`Queue::next`](super::Queue::next) looks at before it gives the
/// endpoint up. If more than these prefer another endpoint, the endpoint stays idle until an event of another one.
pub const LOOK: usize = 256;

/// An endpoint that may be bound to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrefillEndpoint {
    /// Index in the endpoint list.
    pub index: EndpointIndex,
    /// Key for ties. Every worker of every Envoy has the same one.
    pub key: u64,
    /// What the endpoint has left to do.
    pub left: Left,
    /// Prefill cost of the endpoint.
    pub cost: Cost,
}

impl PrefillEndpoint {
    /// Seconds until the endpoint has done everything that it has; 0 or more.
    #[must_use]
    pub fn work(&self) -> f64 {
        self.left.begun + self.left.behind
    }

    /// Makes the endpoint one without room.
    pub fn take_room(&mut self, room: &Room) {
        self.left.begun = self.left.begun.max(room.lead);
    }
}

/// When an endpoint has room for a prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Room {
    /// Seconds of work below which an endpoint has room for any prompt. A larger number binds requests earlier than needed.
    /// A smaller one leaves the endpoint idle while a request is on its way to it.
    pub lead: f64,
    /// Tokens that an engine computes together; 0: one prompt after another. An endpoint has room for prompts that it will
    /// begin together, as long as they take no longer than so many new tokens. A larger number binds requests earlier than
    /// needed where the engine computes fewer tokens together. A smaller one leaves the engine with short prompts alone.
    pub batch_tokens: f64,
}

impl Room {
    /// The rule of a pool's queue.
    #[must_use]
    pub fn of(queue: &config::Queue) -> Self {
        Self { lead: queue.lead.as_secs_f64(), batch_tokens: queue.batch_tokens as f64 }
    }

    /// Whether the endpoint has room for a prompt of so many seconds.
    #[must_use]
    pub fn is_at(&self, endpoint: &PrefillEndpoint, seconds: f64) -> bool {
        endpoint.work() < self.lead || self.may_be_at(endpoint) && self.fits(endpoint, seconds)
    }

    /// Whether the endpoint has room for some prompt.
    #[must_use]
    pub fn may_be_at(&self, endpoint: &PrefillEndpoint) -> bool {
        endpoint.left.begun < self.lead && (endpoint.left.behind <= 0.0 || self.fits(endpoint, endpoint.cost.a))
    }

    /// Whether the endpoint computes the prompt together with those that it has not begun. Their fixed seconds count once.
    fn fits(&self, endpoint: &PrefillEndpoint, seconds: f64) -> bool {
        let together = endpoint.left.behind + seconds - endpoint.cost.a;
        self.batch_tokens > 0.0 && together <= endpoint.cost.seconds(self.batch_tokens, 0.0)
    }

    /// Seconds until an endpoint without room has room for any prompt. An endpoint with room for some prompts has none for
    /// the others until it has done everything.
    #[must_use]
    pub fn seconds_until(&self, endpoint: &PrefillEndpoint) -> f64 {
        let until = if endpoint.left.begun < self.lead { endpoint.work() } else { endpoint.left.begun };
        (until - self.lead).max(0.0)
    }
}

/// A request and the endpoint that it should go to now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Binding {
    /// Id of the request.
    pub id: u64,
    /// The endpoint.
    pub endpoint: EndpointIndex,
    /// Tokens of the prompt that the endpoint holds: 0 to the prompt's tokens.
    pub held_tokens: f64,
    /// Seconds that the endpoint needs for the prompt.
    pub seconds: f64,
}

/// Holders of a request's prefix that count: those that hold most. A larger number makes every request larger.
pub const MOST_HELD: usize = 4;

/// Bytes that a waiting request takes at most beside its body: its entry, and its places in the ordered sets, which are
/// half empty at worst. It has one place for each endpoint that counts, and five more.
pub const REQUEST_BYTES: usize = 1_024;

/// What holds for all requests of a queue.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// When an endpoint has room.
    pub room: Room,
    /// Seconds of waiting after which a request counts as `1/e` of its seconds. A larger number favours short requests.
    pub patience: f64,
    /// Wait after which no request of the same priority overtakes a request.
    pub longest_wait: Duration,
    /// Seconds of work by which an account may be ahead of the account with the least, while both have requests waiting.
    pub fair_seconds: f64,
    /// Prefill cost by which requests are ordered.
    pub cost: Cost,
    /// Most requests that the queue takes.
    pub most_requests: usize,
    /// Most bytes that the requests take, with their bodies and [`REQUEST_BYTES`] of each.
    pub most_bytes: usize,
}

impl Rule {
    /// The default rule for endpoints of this prefill cost.
    #[must_use]
    pub fn new(cost: Cost) -> Self {
        Self {
            room: Room { lead: 0.02, batch_tokens: 8_192.0 },
            patience: 100.0,
            longest_wait: Duration::from_secs(600),
            fair_seconds: 10.0,
            cost,
            most_requests: 8_192,
            most_bytes: 512 << 20,
        }
    }
}

/// A request that waits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Request {
    /// Number that no other request of the queue has. Of two requests with the same rank the lower id goes first.
    pub id: u64,
    /// When the request came.
    pub arrival: Duration,
    /// Tokens of the prompt; 0 or more.
    pub tokens: f64,
    /// Key that prompts with a common prefix have; see [`Queue::sharing`](super::Queue::sharing).
    pub key: u64,
    /// Higher ones go first.
    pub priority: i32,
    /// Hash of the fairness id.
    pub fairness: u64,
    /// When the request gives up; `None`: never.
    pub deadline: Option<Duration>,
    /// Bytes of the body that the gateway keeps for the request.
    pub bytes: usize,
}

/// How much of a prompt one endpoint holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    /// The endpoint.
    pub endpoint: EndpointIndex,
    /// Tokens from the beginning of the prompt; an entry of 0 or fewer does not count.
    pub tokens: f64,
}

/// Why a request cannot wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// [`Rule::most_requests`] wait. The caller refuses the request.
    Requests,
    /// With this request the bytes exceed [`Rule::most_bytes`]. The caller refuses the request.
    Bytes,
    /// A request with this id waits already: a fault of the caller. The queue keeps the earlier request.
    Taken,
}
