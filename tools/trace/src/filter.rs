//! Our policy: pd-core's request machine, as the filter drives it, whole, with what workers share.

use std::cell::{Cell, RefCell};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hashbrown::HashMap;
use pd_bench::trace::BLOCK_TOKENS;
use pd_core::envoys::client::{CallKind, ExchangeCall, ExchangeClient};
use pd_core::envoys::hub::Hub;
use pd_core::envoys::message::ExchangeRequest;
use pd_core::envoys::outside::EngineReport;
use pd_core::headers::Headers;
use pd_core::request::upstream::Answerer;
use pd_core::request::{DECODE, Effect, Outcome, PrefillAnswer, Request};
use pd_core::time::Monotonic;
use pd_core::wire::{Endpoint, EndpointId, Role, Snapshot};
use pd_core::workers::log::WorkersLog;
use pd_core::workers::push::TICK;
use pd_core::workers::shared::Shared;
use pd_core::workers::worker::Worker;
use pd_support::config::merge;

use crate::load::{Job, Pods};

/// Bytes of prompt text per token, and of the smallest hashed block: an eighth of the defaults, so that a block stands
/// for as many tokens as there and a long trace is quick to write and read.
pub(crate) const BYTES_PER_TOKEN: f64 = 0.5;
pub(crate) const HASH_BLOCK_BYTES: usize = 64;
const TEXT_BYTES: usize = (BLOCK_TOKENS as f64 * BYTES_PER_TOKEN) as usize;
/// How often ledger entries are dropped whose end was never seen.
const PRUNE_EVERY: Duration = Duration::from_millis(250);
/// Answer of a prefill leg, as vLLM gives it, up to the number of prompt tokens and behind it.
const ANSWER_HEAD: &str =
    r#"{"id":"c","choices":[{"index":0,"text":"a","finish_reason":"length"}],"usage":{"prompt_tokens":"#;
const ANSWER_TAIL: &str = r#"},"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1]],"remote_engine_id":"e","remote_request_id":"r","remote_host":"10.0.0.1","remote_port":5600}}"#;

/// How many brains there are, and how they talk.
#[derive(Clone, Debug, Default)]
pub struct Brains {
    /// Gateways, each deciding for the requests that come to it.
    pub count: usize,
    /// Workers of each gateway, which share what they know as they do in Envoy.
    pub workers: usize,
    /// How often gateways exchange what they know, as they do through pd-control; `None`: never.
    pub exchange: Option<Duration>,
    /// Members to merge into those of the plugin configuration; none where this is `null`.
    pub config: serde_json::Value,
}

/// Gateway with pd-core in it.
pub struct Filter {
    /// Every worker of every gateway.
    states: Vec<Worker>,
    /// How each talks to the others of its gateway, where there are any.
    logs: Vec<WorkersLog>,
    /// What those of one gateway share.
    stores: Vec<Store>,
    ticked: Monotonic,
    workers: usize,
    streams: HashMap<usize, Stream>,
    places: Places,
    gateways: Option<Gateways>,
    rng: fastrand::Rng,
    pruned: Monotonic,
}

/// Shared data of one gateway.
#[derive(Default)]
struct Store {
    data: RefCell<HashMap<String, (Vec<u8>, u32)>>,
    positions: RefCell<HashMap<usize, u64>>,
    announced: Cell<u64>,
}

impl Shared for Store {
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        self.data.borrow().get(key).cloned()
    }

    fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> bool {
        let mut data = self.data.borrow_mut();
        let (held, current) = data.entry(key.to_owned()).or_default();
        let is_current = version.is_none_or(|version| version == *current);
        if is_current {
            value.clone_into(held);
            *current += 1;
        }
        is_current
    }

    fn announced(&self) -> u64 {
        self.announced.get()
    }

    fn announce(&self) {
        self.announced.set(self.announced.get() + 1);
    }

    fn position(&self, slot: usize) -> u64 {
        self.positions.borrow().get(&slot).copied().unwrap_or(0)
    }

    fn set_position(&self, slot: usize, position: u64) {
        self.positions.borrow_mut().insert(slot, position);
    }
}

struct Stream {
    state: usize,
    request: Request,
    tokens: u64,
    decode: usize,
}

/// The exchange between the gateways: pd-core's own exchange, with calls that take no time.
struct Gateways {
    hub: Hub,
    /// Of each gateway's first worker, and its question that waits.
    gateways: Vec<(ExchangeClient, Option<ExchangeCall>)>,
    period: Duration,
    ticked: Monotonic,
}

impl Gateways {
    fn new(period: Duration, states: &mut [Worker], workers: usize) -> Self {
        let leader = |(number, worker): (usize, &mut Worker)| {
            let config = worker.config.clone().ok();
            let mut exchange = ExchangeClient::default();
            exchange.configure(worker, config.as_ref().and_then(|config| config.control.as_ref()));
            exchange.lead(worker, number as u64 + 1, 0, Monotonic::ZERO);
            (exchange, None)
        };
        let gateways = states.iter_mut().step_by(workers).enumerate().map(leader).collect();
        Self { hub: Hub::new(u64::MAX), gateways, period, ticked: Monotonic::ZERO }
    }

    /// One gateway's tick.
    fn tick(&mut self, gateway: usize, worker: &mut Worker, now: Monotonic) {
        let Self { hub, gateways, .. } = self;
        let Some((exchange, waiting)) = gateways.get_mut(gateway) else { return };
        let calls = exchange.tick(worker, true, now, |_| Vec::new());
        for call in calls.into_iter().chain(waiting.take()) {
            let Some(request) = ExchangeRequest::from_bytes(&call.body) else { continue };
            hub.take(&request, 0, now);
            if call.kind == CallKind::Receive && !hub.has_news(&request) {
                *waiting = Some(call);
                continue;
            }
            let response = hub.answer(&request, 0).to_bytes();
            exchange.answered(worker, call.kind, Some(200), &response, now);
        }
    }
}

/// Where a request goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// To this prefill server.
    Prefill(usize),
    /// To this decode server, which computes the prompt too.
    Whole(usize),
}

/// Addresses of the servers.
#[derive(Clone, Debug)]
pub struct Places {
    /// Of those that compute prompts.
    pub prefill: Vec<SocketAddr>,
    /// Of those that generate.
    pub decode: Vec<SocketAddr>,
}

impl Places {
    fn made_up(pods: &Pods) -> Self {
        let address = |number| SocketAddr::from((Ipv4Addr::from_bits(0x0a00_0001 + number as u32), 8_000));
        let prefill = (0..pods.prefill).map(address).collect();
        Self { prefill, decode: (pods.prefill..pods.prefill + pods.decode).map(address).collect() }
    }

    fn find(among: &[SocketAddr], text: &[u8]) -> Option<usize> {
        let first = core::str::from_utf8(text).ok()?.split(',').next()?.parse().ok()?;
        among.iter().position(|address| *address == first)
    }
}

/// pd-core's configuration for such servers: of its own accord, `brains` has more.
#[must_use]
pub fn configuration(pods: &Pods, brains: &Brains) -> serde_json::Value {
    let mut config = serde_json::json!({
        "prefix": {"block_bytes": HASH_BLOCK_BYTES},
        "pools": {"default": {
            "split": {"mode": "always"},
            "bytes_per_token": BYTES_PER_TOKEN,
            "cache_tokens": pods.cache_tokens,
        }},
    });
    if brains.exchange.is_some() {
        merge(&mut config, &serde_json::json!({"control": {"cluster": "pd-control"}}));
    }
    if !brains.config.is_null() {
        merge(&mut config, &brains.config);
    }
    config
}

impl Filter {
    /// A gateway in front of these servers.
    ///
    /// # Errors
    /// When pd-core refuses its configuration.
    pub fn new(pods: &Pods, brains: &Brains, seed: u64) -> Result<Self> {
        Self::with_places(Places::made_up(pods), &configuration(pods, brains), brains, seed)
    }

    /// A gateway in front of servers at these addresses, with this configuration of pd-core.
    ///
    /// # Errors
    /// When pd-core refuses it.
    pub fn with_places(places: Places, config: &serde_json::Value, brains: &Brains, seed: u64) -> Result<Self> {
        let of = |role| move |address: &SocketAddr| Endpoint::new(*address, role);
        let prefill = places.prefill.iter().map(of(Role::Prefill));
        let decode = places.decode.iter().map(of(Role::Decode));
        let snapshot = Snapshot::whole("sim", 1, prefill.chain(decode).collect());
        let (mut states, mut logs) = (Vec::new(), Vec::new());
        let (gateways, workers) = (brains.count.max(1), brains.workers.max(1));
        let stores: Vec<_> = (0..gateways).map(|_| Store::default()).collect();
        for index in 0..gateways * workers {
            let mut worker = Worker::default();
            worker.configure(config.to_string().as_bytes()).context("pd-core's configuration")?;
            worker.apply(&snapshot.to_json()).context("the list of endpoints")?;
            if workers > 1 {
                let mut log = WorkersLog::default();
                log.configure(&mut worker, &stores[index / workers], index as u64 + 1, Monotonic::ZERO);
                logs.push(log);
            }
            states.push(worker);
        }
        let gateways = brains.exchange.map(|period| Gateways::new(period, &mut states, workers));
        Ok(Self {
            states,
            logs,
            stores,
            ticked: Monotonic::ZERO,
            workers,
            streams: HashMap::new(),
            places,
            gateways,
            rng: fastrand::Rng::with_seed(seed),
            pruned: Monotonic::ZERO,
        })
    }

    /// A request comes: the prefill server that it goes to.
    ///
    /// # Errors
    /// When pd-core does anything but start a prefill leg.
    pub fn arrive(&mut self, number: usize, job: &Job, now: Duration) -> Result<usize> {
        self.ask(number, "/v1/completions", &body(job), job.tokens, now)
    }

    /// A request comes: where it goes first, split or whole.
    ///
    /// # Errors
    /// When pd-core sends it nowhere.
    pub fn arrive_anywhere(&mut self, number: usize, job: &Job, now: Duration) -> Result<Sent> {
        self.send(number, "/v1/completions", &body(job), job.tokens, now)
    }

    /// A request with this body comes: the prefill server that it goes to.
    ///
    /// # Errors
    /// When pd-core does anything but start a prefill leg.
    pub fn ask(&mut self, number: usize, path: &str, body: &[u8], tokens: u64, now: Duration) -> Result<usize> {
        match self.send(number, path, body, tokens, now)? {
            Sent::Prefill(prefill) => Ok(prefill),
            Sent::Whole(_) => bail!("no prefill leg"),
        }
    }

    fn send(&mut self, number: usize, path: &str, body: &[u8], tokens: u64, now: Duration) -> Result<Sent> {
        let now = Monotonic::new(now);
        self.catch_up(now);
        let index = if self.states.len() > 1 { self.rng.usize(..self.states.len()) } else { 0 };
        self.listen(index, now);
        let Some(state) = self.states.get_mut(index) else { bail!("no state") };
        let mut request = Request::default();
        let headers = Headers::from_pairs([(":method", "POST"), (":path", path), (":authority", "gateway")]);
        request.headers(state, headers, false, now);
        let outcome = request.body(state, body, now);
        let sent = outcome.effects.iter().find_map(|effect| match effect {
            Effect::Call(call) => {
                let prefill = call.headers.get("x-pd-destination");
                prefill.and_then(|text| Places::find(&self.places.prefill, text)).map(Sent::Prefill)
            }
            Effect::SetState(DECODE, address) => Places::find(&self.places.decode, address).map(Sent::Whole),
            _ => None,
        });
        let sent = sent.with_context(|| format!("sent nowhere: {outcome:?}"))?;
        let decode = if let Sent::Whole(decode) = sent { decode } else { 0 };
        self.streams.insert(number, Stream { state: index, request, tokens, decode });
        self.publish(index, now);
        Ok(sent)
    }

    /// The prompt is computed: the decode server that the request goes to.
    ///
    /// # Errors
    /// When pd-core chooses none.
    pub fn prefilled(&mut self, number: usize, now: Duration) -> Result<usize> {
        let now = Monotonic::new(now);
        self.catch_up(now);
        let index = self.streams.get(&number).context("no such request")?.state;
        self.listen(index, now);
        let stream = self.streams.get_mut(&number).context("no such request")?;
        let state = self.states.get_mut(stream.state).context("no state")?;
        let body = format!("{ANSWER_HEAD}{}{ANSWER_TAIL}", stream.tokens);
        let content_type = Some(&b"application/json"[..]);
        let answer = PrefillAnswer::Answered { status: 200, content_type, body: body.as_bytes() };
        let Outcome { effects, .. } = stream.request.prefill_answer(state, answer, || None::<Vec<u8>>, now);
        let decode = effects.iter().find_map(|effect| match effect {
            Effect::SetState(DECODE, address) => Places::find(&self.places.decode, address),
            _ => None,
        });
        let decode = decode.context("no decode server")?;
        stream.decode = decode;
        self.publish(index, now);
        Ok(decode)
    }

    /// The first token is on its way to the client.
    pub fn first_token(&mut self, number: usize, now: Duration) {
        let now = Monotonic::new(now);
        if let Some(stream) = self.streams.get_mut(&number)
            && let Some(state) = self.states.get_mut(stream.state)
        {
            let upstream = self.places.decode[stream.decode].to_string();
            stream.request.response_headers(state, Answerer::Host(upstream.as_bytes()), Some(200), now);
            stream.request.first_byte(state, now);
            let index = stream.state;
            self.publish(index, now);
        }
    }

    /// The request is over.
    pub fn done(&mut self, number: usize, now: Duration) {
        let now = Monotonic::new(now);
        let Some(mut stream) = self.streams.remove(&number) else { return };
        if let Some(state) = self.states.get_mut(stream.state) {
            stream.request.done(state, now);
        }
        self.publish(stream.state, now);
    }

    /// What the servers report of now reaches the hub.
    pub fn engines_report(&mut self, prefill: &[EngineReport], decode: &[EngineReport], now: Duration) {
        let now = Monotonic::new(now);
        self.catch_up(now);
        let Some(gateways) = &mut self.gateways else { return };
        let prefill = self.places.prefill.iter().zip(prefill).map(|of| (Role::Prefill, of));
        let decode = self.places.decode.iter().zip(decode).map(|of| (Role::Decode, of));
        for (role, (address, report)) in prefill.chain(decode) {
            let key = EndpointId { address: *address, rank: None }.key();
            gateways.hub.engine_reports(&[(key, role)], *report, now);
        }
    }

    /// Applies to a worker what the other workers of its gateway did.
    fn listen(&mut self, index: usize, now: Monotonic) {
        if let (Some(log), Some(state)) = (self.logs.get_mut(index), self.states.get_mut(index)) {
            let store = &self.stores[index / self.workers];
            log.catch_up(state, store, store.announced(), now);
        }
    }

    /// Publishes to the other workers of its gateway what a worker did.
    fn publish(&mut self, index: usize, now: Monotonic) {
        if let (Some(log), Some(state)) = (self.logs.get_mut(index), self.states.get_mut(index)) {
            log.publish(state, &self.stores[index / self.workers], now);
        }
    }

    /// Ticks the workers, and passes each gateway's events to the others, when either is due.
    fn catch_up(&mut self, now: Monotonic) {
        if now >= self.pruned + PRUNE_EVERY {
            self.pruned = now;
            self.states.iter_mut().for_each(|state| state.prune(now));
        }
        while !self.logs.is_empty() && now >= self.ticked + TICK {
            self.ticked += TICK;
            for (index, (log, state)) in self.logs.iter_mut().zip(&mut self.states).enumerate() {
                let store = &self.stores[index / self.workers];
                log.catch_up(state, store, store.announced(), self.ticked);
                log.tick(state, store, self.ticked);
            }
        }
        while let Some(due) =
            self.gateways.as_ref().map(|gateways| gateways.ticked + gateways.period).filter(|due| *due <= now)
        {
            for gateway in 0..self.stores.len() {
                self.listen(gateway * self.workers, due);
                if let (Some(gateways), Some(worker)) =
                    (&mut self.gateways, self.states.get_mut(gateway * self.workers))
                {
                    gateways.ticked = due;
                    gateways.tick(gateway, worker, due);
                }
                self.publish(gateway * self.workers, due);
            }
        }
    }
}

fn body(job: &Job) -> Vec<u8> {
    [br#"{"model":"m","prompt":"#, prompt(job).as_slice(), b"}"].concat()
}

/// The prompt as a JSON string: equal blocks are equal text, a cut block is the begin of the whole one.
pub(crate) fn prompt(job: &Job) -> Vec<u8> {
    let bytes = (job.tokens as f64 * BYTES_PER_TOKEN) as usize;
    let mut text = Vec::with_capacity(bytes + TEXT_BYTES);
    text.push(b'"');
    for block in &job.blocks {
        let word = format!("{:016x}", block.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        text.extend(core::iter::repeat_n(word.as_bytes(), TEXT_BYTES / word.len()).flatten());
    }
    text.truncate(bytes + 1);
    text.push(b'"');
    text
}

#[cfg(test)]
mod tests;
