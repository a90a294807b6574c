//! Servers of both roles that come and go, in steps of time: a request waits at a prefill server, is computed, moves to a
//! decode server with room in its KV cache, and generates.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use hashbrown::HashMap;
use pd_core::endpoints::elsewhere::Totals;
use pd_core::wire::{Endpoint, Role};
use pd_sim::Timing;

/// Length of a step.
pub const STEP: Duration = Duration::from_millis(50);
/// Output tokens that pd-core expects of a request which does not say.
const EXPECTED_OUTPUT_TOKENS: u64 = 256;

/// A request of the trace.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// When it comes.
    pub at: Duration,
    /// Prompt tokens.
    pub prompt: u64,
    /// Those that the decode server holds, so that the request has no prefill leg if they are all.
    pub cached: u64,
    /// Output tokens.
    pub output: u64,
}

impl Request {
    /// Whether the decode server computes what is left of the prompt.
    #[must_use]
    pub fn skips_prefill(&self) -> bool {
        // `split.uncached_tokens` of the chart.
        self.prompt - self.cached < 256
    }
}

/// A request that was served.
#[derive(Clone, Copy, Debug)]
pub struct Served {
    /// Time to first token.
    pub ttft: Duration,
    /// Time per output token.
    pub tpot: Duration,
}

#[derive(Debug)]
struct Flight {
    request: Request,
    /// Seconds of prefill work left, then output tokens left.
    left: f64,
    first: Duration,
}

#[derive(Debug)]
struct Server {
    number: u32,
    ready_at: Duration,
    /// Takes no more requests and ends when it has none.
    is_leaving: bool,
    flights: VecDeque<Flight>,
}

/// All servers of one role.
#[derive(Debug)]
pub struct Servers {
    role: Role,
    timing: Timing,
    cache_tokens: u64,
    start: Duration,
    made: u32,
    servers: Vec<Server>,
    /// Requests for which no server has room.
    waiting: VecDeque<Flight>,
    /// Seconds for which servers existed, starting and leaving included.
    pub seconds: f64,
}

impl Flight {
    /// Tokens in the KV cache of a decode server.
    fn held(&self) -> u64 {
        self.request.prompt + (self.request.output as f64 - self.left) as u64
    }
}

impl Servers {
    /// `count` servers that are ready. A new one takes `start`.
    #[must_use]
    pub fn new(role: Role, timing: Timing, cache_tokens: u64, start: Duration, count: usize) -> Self {
        let mut servers = Self {
            role,
            timing,
            cache_tokens,
            start,
            made: 0,
            servers: Vec::new(),
            waiting: VecDeque::new(),
            seconds: 0.0,
        };
        servers.scale(count, Duration::ZERO);
        servers.servers.iter_mut().for_each(|server| server.ready_at = Duration::ZERO);
        servers
    }

    /// Servers that are not leaving.
    #[must_use]
    pub fn count(&self) -> usize {
        self.servers.iter().filter(|server| !server.is_leaving).count()
    }

    /// Starts servers, or has servers leave: those that start yet, then the newest.
    pub fn scale(&mut self, count: usize, now: Duration) {
        while self.count() < count {
            self.made += 1;
            let server =
                Server { number: self.made, ready_at: now + self.start, is_leaving: false, flights: VecDeque::new() };
            self.servers.push(server);
        }
        while self.count() > count {
            let staying = self.servers.iter_mut().filter(|server| !server.is_leaving);
            if let Some(server) = staying.max_by_key(|server| (server.ready_at, server.number)) {
                server.is_leaving = true;
            }
        }
        self.servers.retain(|server| !(server.is_leaving && server.flights.is_empty()));
    }

    /// KV tokens that count: those of the prompt and of the answer so far, of the answer at least what is expected.
    fn kv_tokens(flight: &Flight) -> u64 {
        flight.held().max(flight.request.prompt + EXPECTED_OUTPUT_TOKENS)
    }

    /// A request comes to the role.
    pub fn take(&mut self, request: Request, now: Duration) {
        let left = match self.role {
            Role::Prefill => self.timing.prefill(request.prompt, request.cached).as_secs_f64(),
            _ => request.output as f64,
        };
        self.waiting.push_back(Flight { request, left, first: now });
        self.place(now);
    }

    /// Requests go to the ready server with the least work, at decode servers only where the KV cache has room.
    fn place(&mut self, now: Duration) {
        while let Some(flight) = self.waiting.front() {
            let is_prefill = self.role == Role::Prefill;
            let needed = flight.request.prompt;
            let most = self.cache_tokens;
            let used = |server: &Server| -> u64 { server.flights.iter().map(Flight::held).sum() };
            let load = |server: &Server| -> f64 {
                if is_prefill { server.flights.iter().map(|flight| flight.left).sum() } else { used(server) as f64 }
            };
            let ready = self.servers.iter_mut().filter(|server| {
                server.ready_at <= now && !server.is_leaving && (is_prefill || used(server) + needed <= most)
            });
            let Some(server) = ready.min_by(|a, b| load(a).total_cmp(&load(b))) else { return };
            server.flights.extend(self.waiting.pop_front());
        }
    }

    /// A step. Returns the requests that are through, with the time of their first token.
    pub fn step(&mut self, now: Duration) -> Vec<(Request, Duration)> {
        let step = STEP.as_secs_f64();
        self.seconds += self.servers.len() as f64 * step;
        self.place(now);
        let mut done = Vec::new();
        for server in &mut self.servers {
            if self.role == Role::Prefill {
                let mut budget = step;
                while let Some(flight) = server.flights.front_mut() {
                    let used = flight.left.min(budget);
                    flight.left -= used;
                    budget -= used;
                    if flight.left > 0.0 {
                        break;
                    }
                    done.extend(server.flights.pop_front().map(|flight| (flight.request, flight.first)));
                }
                continue;
            }
            // An engine whose cache is full sets requests aside and computes them anew: fewer are generated at a time.
            let held: u64 = server.flights.iter().map(Flight::held).sum();
            let share = (self.cache_tokens as f64 / held.max(1) as f64).min(1.0);
            let token = self.timing.token(server.flights.len()).as_secs_f64() / share;
            for flight in &mut server.flights {
                if flight.left == flight.request.output as f64 {
                    // The first token comes after the KV cache has moved.
                    flight.first = now + self.timing.transfer(flight.request.prompt - flight.request.cached);
                }
                flight.left -= step / token;
            }
            let (ended, rest) = server.flights.drain(..).partition(|flight| flight.left <= 0.0);
            server.flights = rest;
            let ended: VecDeque<Flight> = ended;
            done.extend(ended.into_iter().map(|flight| (flight.request, flight.first)));
        }
        self.servers.retain(|server| !(server.is_leaving && server.flights.is_empty()));
        done
    }

    /// The list and the loads that pd-control has of these servers.
    pub fn report(&self, now: Duration, list: &mut Vec<Endpoint>, loads: &mut HashMap<u64, Totals>) {
        let ready = || self.servers.iter().filter(|server| server.ready_at <= now && !server.is_leaving);
        // A gateway sends requests that find no room all the same, and they wait in the engines.
        let waiting: u64 = self.waiting.iter().map(Self::kv_tokens).sum::<u64>() / ready().count().max(1) as u64;
        for server in ready() {
            let network = if self.role == Role::Prefill { 0x0a00_0000 } else { 0x0a01_0000 };
            let address = SocketAddr::from((Ipv4Addr::from_bits(network + server.number), 8_000));
            let endpoint = Endpoint { cache_tokens: Some(self.cache_tokens), ..Endpoint::new(address, self.role) };
            let totals = match self.role {
                Role::Prefill => {
                    let work: f64 = server.flights.iter().map(|flight| flight.left).sum();
                    Totals { work: (work * 1e6) as u64, legs: server.flights.len() as u64, ..Totals::default() }
                }
                _ => {
                    let tokens = waiting + server.flights.iter().map(Self::kv_tokens).sum::<u64>();
                    Totals { tokens, requests: server.flights.len() as u64, ..Totals::default() }
                }
            };
            loads.insert(endpoint.id().key(), totals);
            list.push(endpoint);
        }
    }

    /// Requests that wait for a server.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}
