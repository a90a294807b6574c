//! How requests of this worker begin to wait, and how their wait ends.

use core::time::Duration;
use std::borrow::Cow;
use std::sync::Arc;

use crate::choose::admission::pool_key;
use crate::choose::prompt::Prompt;
use crate::choose::queue::{Held, PrefillEndpoint, REQUEST_BYTES};
use crate::choose::scheduler::Scheduler;
use crate::choose::split_cost::Ahead;
use crate::config::Queue;
use crate::endpoints::candidates::Candidates;
use crate::metrics::Metric;
use crate::prefix::index::EndpointIndex;
use crate::time::Monotonic;
use crate::workers::bind::{duration, queue_name};
use crate::workers::event::Event;
use crate::workers::turns::{Own, ParkedRequest};
use crate::workers::waiting::{HeldByKey, WaitingRequest};
use crate::workers::worker::Worker;

/// A request that is to wait.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) candidates: &'a Arc<Candidates>,
    /// Key of the pairing of these candidates, where shares count.
    pub(crate) pairing: Option<u64>,
    pub(crate) model: &'a str,
    pub(crate) prompt: &'a Prompt,
    pub(crate) priority: i64,
    pub(crate) fairness: u64,
    pub(crate) body_bytes: usize,
    pub(crate) arrival: Monotonic,
    /// Time after the arrival within which the prompt must be computed; `None`: no limit.
    pub(crate) deadline: Option<Duration>,
}

/// Why a request may not wait. The numbers are the seconds after which the client may try again, 1 to 60.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// `queue.max_requests` of the pool wait.
    Requests(u64),
    /// With this request the bytes would exceed `queue.max_bytes` of the pool.
    Bytes(u64),
    /// The request would wait beyond the client's deadline.
    Deadline,
}

impl Worker {
    /// Has a request wait until an endpoint has room for it. Returns its id, and the endpoint where one has room now.
    ///
    /// # Errors
    /// [`Full`]: why the request may not wait.
    pub(crate) fn wait(&mut self, ask: &Ask<'_>, now: Monotonic) -> Result<(u64, Option<EndpointIndex>), Full> {
        let Ok(config) = self.config.clone() else { return Err(Full::Requests(1)) };
        let candidates = ask.candidates;
        let pool = config.pool(&candidates.pool);
        let pool_key = pool_key(&candidates.pool);
        let name = queue_name(self, candidates);
        let scheduler = Scheduler { table: &self.state.table, index: &self.state.index, pool, now };
        let held = scheduler.held(&candidates.prefill, ask.prompt);
        let priority = in_range(ask.priority);
        let ahead = self.state.waiting.queue(name).map_or(0.0, |queue| queue.seconds(priority));
        let endpoints = scheduler.prefill_endpoints(&candidates.prefill, Duration::ZERO);
        let ahead = ahead / endpoints.len().max(1) as f64;
        let (requests, bytes, _) = self.state.waiting.of_pool(pool_key);
        let retry_after = (ahead.ceil() as u64).clamp(1, 60);
        if requests >= pool.queue.max_requests {
            return Err(Full::Requests(retry_after));
        }
        let own_bytes = ask.body_bytes.saturating_add(REQUEST_BYTES);
        if requests > 0 && bytes.saturating_add(own_bytes) > pool.queue.max_bytes {
            return Err(Full::Bytes(retry_after));
        }
        let seconds = least_seconds(&endpoints, &held, ask.prompt.tokens);
        let mut end = ask.arrival.saturating_add(pool.queue.max_wait);
        let mut has_deadline = false;
        if let Some(deadline) = ask.deadline {
            let latest = ask.arrival.saturating_add(deadline.saturating_sub(duration(seconds.own)));
            if now.saturating_add(duration(ahead + seconds.until_room)) > latest {
                return Err(Full::Deadline);
            }
            has_deadline = latest < end;
            end = end.min(latest);
        }
        let request = WaitingRequest {
            id: self.next_leg(),
            pool: pool_key,
            arrival: ask.arrival,
            tokens: ask.prompt.tokens,
            key: ask.prompt.key,
            priority,
            fairness: ask.fairness,
            bytes: ask.body_bytes as u64,
            held: HeldByKey::new(&held, &self.state.table),
        };
        let id = request.id;
        self.turns.pools.entry(pool_key).or_insert_with(|| candidates.pool.to_string());
        self.happens_at(name, &Event::Waits { request: Cow::Borrowed(&request) });
        let (prompt, model) = (ask.prompt.clone(), ask.model.to_owned());
        self.turns.own.insert(id, Own { prompt, model, pairing: ask.pairing, request, queue: name, end, has_deadline });
        self.turns.ends.insert((end, id));
        self.turns.enter_queue(name, candidates);
        let binding = self.next_own(name, now);
        if binding.is_some_and(|binding| binding.id != id) {
            self.turns.wakes.insert(self.turns.worker_id);
        }
        Ok((id, binding.filter(|binding| binding.id == id).map(|binding| binding.endpoint)))
    }

    /// What waits for each of these prefill endpoints ahead of a request with this priority.
    pub(crate) fn ahead(&self, candidates: &Candidates, priority: i64) -> Ahead {
        if self.state.waiting.is_empty() {
            return Ahead::default();
        }
        let each = candidates.prefill.len().max(1) as f64;
        let queue = self.state.waiting.queue(queue_name(self, candidates));
        queue.map_or_else(Ahead::default, |queue| Ahead {
            seconds: queue.seconds(in_range(priority)) / each,
            requests: queue.len() as f64 / each,
        })
    }

    /// Has a request that came at `arrival` wait until an endpoint is ready. Returns its id; `None` where the time is over,
    /// or where too many requests or bytes wait.
    pub(crate) fn park(&mut self, queue: &Queue, body_bytes: usize, arrival: Monotonic, now: Monotonic) -> Option<u64> {
        let end = arrival.saturating_add(queue.no_endpoint);
        let bytes = self.turns.parked_bytes.saturating_add(body_bytes).saturating_add(REQUEST_BYTES);
        if end <= now || self.turns.parked.len() >= queue.max_requests || bytes > queue.max_bytes {
            return None;
        }
        let (id, changes) = (self.next_leg(), self.state.table.changes());
        self.turns.parked.insert(id, ParkedRequest { changes, arrival, end, bytes: body_bytes });
        self.turns.parked_bytes = bytes;
        self.turns.ends.insert((end, id));
        self.counts.add(Metric::WaitingForEndpoint, 1);
        Some(id)
    }

    /// Ends the wait of a request for a ready endpoint. An unknown id changes nothing.
    pub(crate) fn unpark(&mut self, id: u64) {
        if let Some(parked) = self.turns.parked.remove(&id) {
            self.turns.ends.remove(&(parked.end, id));
            let bytes = self.turns.parked_bytes.saturating_sub(parked.bytes);
            self.turns.parked_bytes = bytes.saturating_sub(REQUEST_BYTES);
            self.counts.add(Metric::WaitingForEndpoint, -1);
        }
    }

    /// Binds a waiting request to an endpoint that needs `seconds` for it. Returns how long the request waited; `None` where
    /// it does not wait.
    pub(crate) fn bind(&mut self, id: u64, seconds: f64, now: Monotonic) -> Option<Duration> {
        let own = self.turns.take(id)?;
        self.happens_at(own.queue, &Event::Bound { id, seconds });
        Some(now.saturating_sub(own.request.arrival))
    }

    /// Ends the wait of a request that no endpoint gets. An unknown id changes nothing.
    pub(crate) fn stop_waiting(&mut self, id: u64) {
        if let Some(own) = self.turns.take(id) {
            self.happens_at(own.queue, &Event::WaitEnded { id });
        }
    }

    /// Notes that an endpoint may have got room.
    pub(crate) fn room_changed(&mut self) {
        if !self.state.waiting.is_empty() || !self.turns.parked.is_empty() {
            self.turns.may_bind = true;
            self.pending.is_urgent = true;
        }
    }
}

fn in_range(priority: i64) -> i32 {
    i32::try_from(priority).unwrap_or(if priority < 0 { i32::MIN } else { i32::MAX })
}

struct LeastSeconds {
    /// Fewest seconds of the prompt at any endpoint.
    own: f64,
    /// Seconds until some endpoint has room.
    until_room: f64,
}

fn least_seconds(endpoints: &[PrefillEndpoint], held: &[Held], tokens: f64) -> LeastSeconds {
    let held_tokens = |index| held.iter().find(|held| held.endpoint == index).map_or(0.0, |held| held.tokens);
    let own = endpoints.iter().map(|endpoint| endpoint.cost.seconds(tokens, held_tokens(endpoint.index)));
    let until_room = endpoints.iter().map(|endpoint| endpoint.work()).fold(f64::INFINITY, f64::min);
    LeastSeconds { own: own.fold(f64::INFINITY, f64::min), until_room }
}
