//! What a queue is given and what it gives.

use core::time::Duration;

use crate::config::Cost;
use crate::prefix::index::EndpointIndex;

/// Requests of one endpoint, priority and fairness id that are looked at when none of them prefers the endpoint: with more of
/// them an endpoint may stay idle until an event of another endpoint, with fewer it does so more often.
pub const LOOK: usize = 256;

/// An endpoint that may be bound to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrefillEndpoint {
    /// Which.
    pub index: EndpointIndex,
    /// Key for ties, which every worker and replica has alike.
    pub key: u64,
    /// Seconds until it is through with what it has.
    pub work: f64,
    /// Its seconds for a prompt.
    pub cost: Cost,
}

/// A request and the endpoint that it should go to now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Binding {
    /// The request.
    pub id: u64,
    /// The endpoint.
    pub endpoint: EndpointIndex,
    /// Tokens of the prompt that the endpoint holds.
    pub held_tokens: f64,
    /// Seconds of the endpoint for the prompt.
    pub seconds: f64,
}

/// Endpoints of a request whose prefix counts: the longest. More of them make every request larger.
pub const MOST_HELD: usize = 4;

/// Bytes that a waiting request takes at most beside its body: its entry, and its places in the ordered sets, which are
/// half empty at worst. It has one place for each endpoint that counts, and five more.
pub const REQUEST_BYTES: usize = 1_024;

/// What holds for all requests of a queue.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Seconds of work that an endpoint may have left and still have room. Longer ones bind requests earlier than needed;
    /// shorter ones leave the endpoint idle for as long as a request takes to reach it.
    pub lead: f64,
    /// Seconds of waiting that make a request count as `1/e` of its seconds. Longer ones favour short requests.
    pub patience: f64,
    /// How long a request can be overtaken.
    pub longest_wait: Duration,
    /// Seconds of work that a fairness id may get more than the one with the least, while both wait.
    pub fair_seconds: f64,
    /// Seconds of a prompt, for the order.
    pub cost: Cost,
    /// Most requests that wait.
    pub most_requests: usize,
    /// Most bytes that they take, [`REQUEST_BYTES`] of each among them.
    pub most_bytes: usize,
}

impl Rule {
    /// The rule as it ships, for endpoints with such seconds.
    #[must_use]
    pub fn new(cost: Cost) -> Self {
        Self {
            lead: 0.02,
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
    /// Its name, which no other request has. Of two requests that are alike the lower one goes first.
    pub id: u64,
    /// When it came.
    pub arrival: Duration,
    /// Tokens of the prompt.
    pub tokens: f64,
    /// Key that prompts with the same begin share; see [`Queue::sharing`](super::Queue::sharing).
    pub key: u64,
    /// Higher ones go first.
    pub priority: i32,
    /// Hash of the fairness id.
    pub fairness: u64,
    /// When it gives up.
    pub deadline: Option<Duration>,
    /// Bytes of its body that are kept for it.
    pub bytes: usize,
}

/// Tokens of a prompt's begin that an endpoint holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    /// The endpoint.
    pub endpoint: EndpointIndex,
    /// Tokens.
    pub tokens: f64,
}

/// Why a request cannot wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// As many requests wait as may. The caller refuses the request.
    Requests,
    /// With its bytes there would be more than there may be. The caller refuses the request.
    Bytes,
    /// A request with this id waits already. The caller has a fault; the one that waits stays.
    Taken,
}
