//! Several Envoys, one view: each tells `pd-control` what it has in flight and which blocks it sent where, and hears
//! the same of the others, about 50 ms later.
//!
//! The worker that holds the [lease](crate::workers::push) is its Envoy's voice. What it hears it passes on to the other workers
//! through its [log](crate::workers::share), as its own part: when it dies, the next voice starts from nothing and hears all of
//! it again. Without an answer for [`PATIENCE`] the view is that of this Envoy alone.
//!
//! Two calls: *tell*, when there is something new (or a second has passed), answered at once; and *hear*, which
//! `pd-control` answers when there is something new. An Envoy that is alone tells once a second.

pub mod hub;
pub mod message;
pub mod report;

use core::time::Duration;

use hashbrown::HashMap;

use crate::config::Control;
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::metrics::Metric;
use crate::prefix::block_log::{read_event, split_events};
use crate::time::Monotonic;
use crate::workers::worker::Worker;
use message::{EXCHANGE_PATH, Heard, MAX_BLOCKS_BYTES, Record, Told};

/// How often the shell must call [`Exchange::tick`] while [`Exchange::is_busy`].
pub const TICK: Duration = Duration::from_millis(50);
/// Time between two calls, a little less than a tick: ticks jitter.
const PAUSE: Duration = Duration::from_millis(40);
/// Time without anything new after which a gateway tells that it is there.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Time without an answer after which the others are not heard any more.
const PATIENCE: Duration = Duration::from_millis(2_500);
/// How long `pd-control` may hold a question.
const WAIT: Duration = Duration::from_secs(1);
/// Time limit of a call beyond that.
const GRACE: Duration = Duration::from_millis(1_000);
/// Pause after a call that failed.
const FAILURE_PAUSE: Duration = Duration::from_millis(500);
/// Gateways whose place in their logs is remembered.
const MAX_KNOWN: usize = 1_024;
/// Which of the two calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Answered at once.
    Tell,
    /// Answered when there is something new.
    Hear,
}

/// A call to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Which.
    pub kind: Kind,
    /// `:path`.
    pub path: String,
    /// Body, of a POST.
    pub body: Vec<u8>,
    /// Time limit.
    pub timeout: Duration,
}

/// One worker's part in the exchange.
#[derive(Debug, Default)]
pub struct Exchange {
    is_on: bool,
    /// [`Record::gateway`]; 0: this worker is not the voice.
    gateway: u64,
    replaces: u64,
    turn: u64,
    /// Block events that the hub has.
    acked: u64,
    known: HashMap<u64, u64>,
    at: (u64, u64),
    told: Option<Vec<(u64, Totals)>>,
    told_at: Monotonic,
    reported_at: Option<Monotonic>,
    asked_at: Monotonic,
    answered_at: Monotonic,
    is_telling: bool,
    is_asking: bool,
    /// Until when nothing is tried after a failure.
    rest_until: Monotonic,
    fleet: Fleet,
    /// What the workers were told that others have in flight.
    elsewhere: HashMap<u64, Totals>,
}

impl Exchange {
    /// Starts over with a configuration's `control`.
    pub fn configure(&mut self, worker: &mut Worker, control: Option<&Control>) {
        self.fall_silent(worker);
        self.is_on = control.is_some_and(|control| control.exchange);
    }

    /// Whether [`tick`](Self::tick) wants to be called every [`TICK`].
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.gateway != 0 && self.fleet.exchanging > 1
    }

    /// Whether this worker shall become its Envoy's voice: [`speak`](Self::speak) then.
    #[must_use]
    pub fn wants_to_speak(&self, holds_lease: bool) -> bool {
        self.is_on && holds_lease && self.gateway == 0
    }

    /// Becomes the voice under a random number, in place of the one before it (0: none).
    pub fn speak(&mut self, worker: &mut Worker, gateway: u64, replaces: u64, now: Monotonic) {
        // Those that the voice before it heard, until it turns out otherwise.
        let fleet = worker.state.table.fleet;
        *self = Self { is_on: self.is_on, gateway, replaces, answered_at: now, fleet, ..Self::default() };
        worker.outbox = Some(Box::default());
    }

    /// Is the voice no more.
    pub fn fall_silent(&mut self, worker: &mut Worker) {
        self.hear_loads(worker, &[]);
        worker.outbox = None;
        *self = Self { is_on: self.is_on, ..Self::default() };
    }

    /// Calls that are due; `report` makes a [`Report`](report::Report) in JSON.
    pub fn tick(
        &mut self,
        worker: &mut Worker,
        holds_lease: bool,
        now: Monotonic,
        report: impl FnOnce(&Worker) -> Vec<u8>,
    ) -> Vec<Call> {
        if self.gateway == 0 {
            return Vec::new();
        }
        if !holds_lease {
            self.fall_silent(worker);
            return Vec::new();
        }
        if self.fleet.exchanging > 1 && now.saturating_sub(self.answered_at) > PATIENCE {
            // Alone for all we know, among as many as there were.
            self.hear_loads(worker, &[]);
            self.hear_fleet(worker, Fleet { exchanging: 1, ..self.fleet });
            self.at = (0, 0);
        }
        if now < self.rest_until {
            return Vec::new();
        }
        let mut calls = Vec::new();
        if !self.is_telling {
            calls.extend(self.tell(worker, now, report));
        }
        if !self.is_asking && self.fleet.exchanging > 1 && now.saturating_sub(self.asked_at) >= PAUSE {
            self.is_asking = true;
            self.asked_at = now;
            let told = Told { from: self.gateway, at: self.at, wants: true, known: self.known(), records: Vec::new() };
            calls.push(Call {
                kind: Kind::Hear,
                path: format!("{EXCHANGE_PATH}?wait_ms={}", WAIT.as_millis()),
                body: told.to_bytes(),
                timeout: WAIT.saturating_add(GRACE),
            });
        }
        calls
    }

    fn tell(&mut self, worker: &Worker, now: Monotonic, report: impl FnOnce(&Worker) -> Vec<u8>) -> Option<Call> {
        let log = worker.outbox.as_deref()?;
        let since = now.saturating_sub(self.told_at);
        let is_first = self.told.is_none();
        let pause = if self.fleet.exchanging > 1 { PAUSE } else { HEARTBEAT };
        if !is_first && since < pause {
            return None;
        }
        let loads = loads(worker, now);
        if self.told.as_ref() == Some(&loads) && self.acked >= log.next() && since < HEARTBEAT {
            return None;
        }
        let is_report_due = self.reported_at.is_none_or(|at| now.saturating_sub(at) >= HEARTBEAT);
        let report = if is_report_due { report(worker) } else { Vec::new() };
        if is_report_due {
            self.reported_at = Some(now);
        }
        self.is_telling = true;
        self.turn = self.turn.saturating_add(1);
        self.told_at = now;
        self.told = Some(loads.clone());
        let first = self.acked.clamp(log.oldest(), log.next());
        let record = Record {
            gateway: self.gateway,
            replaces: self.replaces,
            turn: self.turn,
            epoch: epoch(worker),
            loads,
            oldest: log.oldest(),
            first,
            blocks: log.from(first, MAX_BLOCKS_BYTES),
            report,
        };
        // While a question waits, its answer brings what is new; the answer to this call brings who is there.
        let wants = self.fleet.exchanging <= 1;
        let told = Told { from: self.gateway, at: self.at, wants, known: self.known(), records: vec![record] };
        Some(Call { kind: Kind::Tell, path: EXCHANGE_PATH.to_owned(), body: told.to_bytes(), timeout: GRACE })
    }

    fn known(&self) -> Vec<(u64, u64)> {
        let mut known: Vec<_> = self.known.iter().map(|(gateway, next)| (*gateway, *next)).collect();
        known.sort_unstable();
        known
    }

    /// A call could not be started, or was not answered as it should be.
    pub fn failed(&mut self, worker: &mut Worker, kind: Kind, now: Monotonic) {
        self.ended(kind);
        worker.counts.count(Metric::ExchangesFailed);
        self.rest_until = now.saturating_add(FAILURE_PAUSE);
        // Whoever answers next may know nothing of what was told.
        self.told = None;
    }

    /// A call was answered; `status` is `None` when there is no answer.
    pub fn answered(&mut self, worker: &mut Worker, kind: Kind, status: Option<u16>, body: &[u8], now: Monotonic) {
        let heard = Heard::from_bytes(body).filter(|_| status == Some(200));
        let (Some(heard), true) = (heard, self.gateway != 0) else {
            self.failed(worker, kind, now);
            return;
        };
        self.ended(kind);
        worker.counts.count(Metric::ExchangesOk);
        self.answered_at = now;
        if let Some((_, next)) = heard.have.iter().find(|(gateway, _)| *gateway == self.gateway) {
            self.acked = *next;
        }
        self.hear_fleet(worker, Fleet { gateways: heard.gateways, exchanging: heard.exchanging });
        if let Some(loads) = heard.loads {
            self.at = (heard.hub, heard.state);
            self.hear_loads(worker, &loads);
        }
        let epoch = epoch(worker);
        for batch in heard.batches {
            if self.known.len() >= MAX_KNOWN && !self.known.contains_key(&batch.gateway) {
                self.known.clear();
            }
            let known = self.known.entry(batch.gateway).or_default();
            let mut number = batch.first;
            for event in split_events(&batch.blocks) {
                if number >= *known
                    && batch.epoch == epoch
                    && let Some((endpoint, blocks)) = read_event(event)
                {
                    worker.holds_by_others(endpoint, &blocks);
                }
                number = number.saturating_add(1);
            }
            *known = number.max(*known);
        }
    }

    fn ended(&mut self, kind: Kind) {
        match kind {
            Kind::Tell => self.is_telling = false,
            Kind::Hear => self.is_asking = false,
        }
    }

    fn hear_fleet(&mut self, worker: &mut Worker, fleet: Fleet) {
        if self.fleet != fleet {
            self.fleet = fleet;
            worker.fleet_is(fleet);
        }
    }

    /// Tells the workers how the loads elsewhere differ from what they know.
    fn hear_loads(&mut self, worker: &mut Worker, loads: &[(u64, Totals)]) {
        let new: HashMap<u64, Totals> = loads.iter().copied().collect();
        let old = core::mem::replace(&mut self.elsewhere, new);
        for (endpoint, totals) in &self.elsewhere {
            let difference = totals.minus(old.get(endpoint).copied().unwrap_or_default());
            if difference != Totals::default() {
                worker.busy_elsewhere(*endpoint, difference);
            }
        }
        for (endpoint, totals) in old.iter().filter(|(endpoint, _)| !self.elsewhere.contains_key(*endpoint)) {
            worker.busy_elsewhere(*endpoint, Totals::default().minus(*totals));
        }
    }
}

/// What is in flight from this Envoy, per endpoint, in the order of their keys.
fn loads(worker: &Worker, now: Monotonic) -> Vec<(u64, Totals)> {
    let totals = |slot: &crate::endpoints::endpoint_state::Slot| Totals {
        work: (slot.prefill.work(now) * 1e6) as u64,
        tokens: slot.decode.tokens,
        requests: u64::from(slot.decode.requests),
    };
    let slots = worker.state.table.iter().map(|(_, slot)| (slot.key, totals(slot)));
    let mut loads: Vec<_> = slots.filter(|(_, totals)| *totals != Totals::default()).collect();
    loads.sort_unstable_by_key(|(endpoint, _)| *endpoint);
    loads
}

fn epoch(worker: &Worker) -> u64 {
    worker.config.as_ref().map_or(0, |config| config.prefix.block_bytes) as u64
}

#[cfg(test)]
mod tests {
    use super::hub::{GATEWAY_LIFE, Hub};
    use super::message::MAX_MESSAGE_BYTES;
    use super::report::MAX_REPORT_BYTES;
    use super::*;
    use crate::endpoints::table::EndpointRef;
    use crate::prefix::block_log::block_event;
    use crate::prefix::hash::BlockHash;
    use crate::time::{Clocks, UnixTime};
    use proptest::prelude::*;

    const CONFIG: &[u8] = br#"{"control":{"cluster":"pd-control"},"endpoints":[{"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.1:2","role":"prefill"},{"address":"10.0.0.2:1","role":"decode"}]}"#;
    const FAR: Monotonic = Monotonic::from_secs(3_600);

    struct Gateway {
        worker: Worker,
        exchange: Exchange,
        /// A question that waits.
        question: Option<Call>,
    }

    impl Gateway {
        fn new(id: u64, now: Monotonic) -> Self {
            let mut worker = Worker::default();
            let config = worker.configure(CONFIG).unwrap();
            worker.tell_others(id);
            let mut exchange = Exchange::default();
            exchange.configure(&mut worker, config.control.as_ref());
            assert!(exchange.wants_to_speak(true));
            exchange.speak(&mut worker, id, 0, now);
            Self { worker, exchange, question: None }
        }

        fn at(&self, place: usize) -> EndpointRef {
            let mut all: Vec<_> = self.worker.state.table.iter().map(|(at, slot)| (slot.address.clone(), at)).collect();
            all.sort();
            self.worker.state.table.refer(all[place % all.len()].1).unwrap()
        }

        /// What is in flight at a place, from everywhere.
        fn view(&self, place: usize, now: Monotonic) -> (u64, u64) {
            let slot = self.worker.state.table.get(self.at(place).index).unwrap();
            ((slot.work(now) * 1e6).round() as u64, slot.decode_tokens())
        }

        /// A tick with this hub; without one every call fails.
        fn tick(&mut self, hub: Option<&mut Hub>, now: Monotonic) {
            let report = |worker: &Worker| {
                let clocks = Clocks { monotonic: now, unix: UnixTime::default() };
                report::Report::of(worker, Vec::new(), Vec::new(), clocks).to_json()
            };
            let calls = self.exchange.tick(&mut self.worker, true, now, report);
            let Some(hub) = hub else {
                for call in calls.into_iter().chain(self.question.take()) {
                    self.exchange.failed(&mut self.worker, call.kind, now);
                }
                return;
            };
            for call in calls.into_iter().chain(self.question.take()) {
                let told = Told::from_bytes(&call.body).unwrap();
                hub.take(&told, now);
                if call.kind == Kind::Hear && !hub.has_news(&told) {
                    self.question = Some(call);
                    continue;
                }
                let heard = hub.answer(&told, 0).to_bytes();
                self.exchange.answered(&mut self.worker, call.kind, Some(200), &heard, now);
            }
            self.worker.log.take();
        }
    }

    fn settle(gateways: &mut [Gateway], hub: &mut Hub, now: &mut Monotonic, ticks: u32) {
        for _ in 0..ticks {
            *now += TICK;
            hub.prune(*now);
            gateways.iter_mut().for_each(|gateway| gateway.tick(Some(hub), *now));
        }
    }

    fn fleet(count: u64, hub: &mut Hub, now: &mut Monotonic) -> Vec<Gateway> {
        let mut gateways: Vec<_> = (1..=count).map(|id| Gateway::new(id, *now)).collect();
        // Whoever is alone looks around once a second.
        settle(&mut gateways, hub, now, 45);
        gateways
    }

    fn blocks(id: u64, len: u64) -> Vec<BlockHash> {
        (0..len).map(|i| BlockHash((id * 1_000_003 + i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
    }

    #[test]
    fn a_decision_is_known_elsewhere_after_two_ticks() {
        let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
        let mut gateways = fleet(3, &mut hub, &mut now);
        assert!(gateways.iter().all(|of| of.worker.state.table.fleet == Fleet { gateways: 3, exchanging: 3 }));
        let (prefill, decode) = (gateways[0].at(0), gateways[0].at(2));
        gateways[0].worker.prefill_started(prefill, 7, 5.0, now, FAR);
        gateways[0].worker.decode_started(decode, 1_000);
        gateways[0].worker.holds(prefill, &blocks(1, 12));
        settle(&mut gateways, &mut hub, &mut now, 2);
        for other in &gateways[1..] {
            let (work, tokens) = other.view(0, now);
            assert!((4_800_000..=5_000_000).contains(&work) && tokens == 0, "{work} {tokens}");
            assert_eq!(other.view(2, now).1, 1_000);
            assert_eq!(other.worker.state.index.matched(other.at(0).index, &blocks(1, 12)), 12);
        }
        gateways[0].worker.prefill_ended(prefill, 7, now);
        gateways[0].worker.decode_ended(decode, 1_000);
        settle(&mut gateways, &mut hub, &mut now, 2);
        assert!(gateways.iter().all(|of| of.view(0, now) == (0, 0) && of.view(2, now) == (0, 0)));
        let report = hub.reports(now).find(|(id, ..)| *id == 1).and_then(|(.., text)| report::Report::from_json(text));
        assert_eq!(report.unwrap().endpoints, 3);
    }

    #[test]
    fn the_same_is_told_in_the_same_order() {
        let mut hub = Hub::new(9);
        for gateway in (1..=20).rev() {
            let blocks = block_event(1, &blocks(gateway, 1)).into_vec();
            let record = Record { gateway, turn: 1, blocks, ..Record::default() };
            hub.take(&Told { from: gateway, records: vec![record], ..Told::default() }, Monotonic::ZERO);
        }
        let heard = hub.answer(&Told { from: 99, wants: true, ..Told::default() }, 0);
        assert!(heard.batches.iter().map(|batch| batch.gateway).eq(1..=20), "{:?}", heard.batches);
    }

    #[test]
    fn a_leg_behind_work_from_elsewhere_makes_no_progress_until_that_is_over() {
        let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
        let mut gateways = fleet(2, &mut hub, &mut now);
        let prefill = gateways[0].at(0);
        gateways[0].worker.prefill_started(prefill, 1, 2.0, now, FAR);
        settle(&mut gateways, &mut hub, &mut now, 2);
        gateways[1].worker.prefill_started(prefill, 2, 1.0, now, FAR);
        settle(&mut gateways, &mut hub, &mut now, 20);
        // One second later one of three is done, not two.
        let (work, _) = gateways[1].view(0, now);
        assert!((1_850_000..=2_000_000).contains(&work), "{work}");
        let slot = gateways[1].worker.state.table.get(prefill.index).unwrap();
        assert_eq!(slot.prefill.service_seconds(2, now + Duration::from_secs(2)), None, "that was waiting as well");
    }

    #[test]
    fn without_pd_control_an_envoy_has_its_own_view_and_hears_all_again_later() {
        let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
        let mut gateways = fleet(2, &mut hub, &mut now);
        let decode = gateways[0].at(2);
        gateways[0].worker.decode_started(decode, 500);
        settle(&mut gateways, &mut hub, &mut now, 3);
        assert_eq!(gateways[1].view(2, now).1, 500);
        for _ in 0..60 {
            now += TICK;
            gateways[1].tick(None, now);
        }
        assert_eq!(gateways[1].view(2, now).1, 0);
        assert_eq!(gateways[1].worker.state.table.fleet, Fleet { gateways: 2, exchanging: 1 });
        assert!((gateways[1].worker.state.table.fleet.unheard() - 1.0).abs() < 1e-9);
        // Another one in its place, which knows nothing; what happened meanwhile is told to it in full.
        let prefill = gateways[0].at(1);
        gateways[0].worker.holds(prefill, &blocks(5, 9));
        let mut hub = Hub::new(10);
        settle(&mut gateways, &mut hub, &mut now, 45);
        assert_eq!(gateways[1].view(2, now).1, 500);
        assert_eq!(gateways[1].worker.state.index.matched(prefill.index, &blocks(5, 9)), 9);
        assert_eq!(gateways[1].worker.state.table.fleet.unheard(), 0.0);
    }

    #[test]
    fn an_envoy_that_is_gone_is_out_of_the_others_views() {
        let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
        let mut gateways = fleet(3, &mut hub, &mut now);
        let decode = gateways[2].at(2);
        gateways[2].worker.decode_started(decode, 500);
        settle(&mut gateways, &mut hub, &mut now, 3);
        gateways.truncate(2);
        let ticks = (GATEWAY_LIFE.as_millis() / TICK.as_millis()) as u32 + 30;
        settle(&mut gateways, &mut hub, &mut now, ticks);
        assert!(gateways.iter().all(|of| of.view(2, now).1 == 0 && of.worker.state.table.fleet.exchanging == 2));
    }

    #[test]
    fn a_new_voice_of_an_envoy_takes_the_old_ones_place_at_once() {
        let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
        let mut gateways = fleet(2, &mut hub, &mut now);
        let decode = gateways[0].at(2);
        gateways[0].worker.decode_started(decode, 500);
        settle(&mut gateways, &mut hub, &mut now, 3);
        let first = &mut gateways[0];
        first.exchange.fall_silent(&mut first.worker);
        first.exchange.speak(&mut first.worker, 77, 1, now);
        first.question = None;
        settle(&mut gateways, &mut hub, &mut now, 3);
        assert_eq!(gateways[1].view(2, now).1, 500);
        assert_eq!(gateways[1].worker.state.table.fleet, Fleet { gateways: 2, exchanging: 2 });
    }

    #[test]
    fn a_new_voice_that_hears_nobody_counts_on_those_the_old_one_heard() {
        let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
        let mut gateways = fleet(2, &mut hub, &mut now);
        let first = &mut gateways[0];
        first.exchange.fall_silent(&mut first.worker);
        first.exchange.speak(&mut first.worker, 77, 1, now);
        first.question = None;
        for _ in 0..60 {
            now += TICK;
            first.tick(None, now);
        }
        assert_eq!(first.worker.state.table.fleet, Fleet { gateways: 2, exchanging: 1 });
    }

    #[test]
    fn hubs_pass_on_what_they_heard_and_one_that_restarts_catches_up() {
        let mut now = Monotonic::from_secs(1);
        let mut hubs = [Hub::new(8), Hub::new(9)];
        let mut gateways = [Gateway::new(1, now), Gateway::new(2, now)];
        let mut have = [HashMap::new(), HashMap::new()];
        let mut run = |hubs: &mut [Hub; 2], gateways: &mut [Gateway; 2], ticks: u32| {
            for _ in 0..ticks {
                now += TICK;
                for (at, gateway) in gateways.iter_mut().enumerate() {
                    gateway.tick(Some(&mut hubs[at]), now);
                }
                for from in 0..2 {
                    for told in hubs[from].relay(&have[from], now) {
                        hubs[1 - from].take(&told, now);
                        have[from].extend(hubs[1 - from].answer(&told, 0).have);
                    }
                }
                hubs.iter_mut().for_each(|hub| _ = hub.prune(now));
            }
            now
        };
        run(&mut hubs, &mut gateways, 45);
        let (prefill, decode) = (gateways[0].at(0), gateways[0].at(2));
        gateways[0].worker.holds(prefill, &blocks(3, 20));
        gateways[0].worker.decode_started(decode, 40);
        let now = run(&mut hubs, &mut gateways, 4);
        assert_eq!(gateways[1].view(2, now).1, 40);
        assert_eq!(gateways[1].worker.state.index.matched(prefill.index, &blocks(3, 20)), 20);
        // The second hub dies with all it has, and its gateway with it; who comes after them hears it all.
        hubs[1] = Hub::new(10);
        gateways[1] = Gateway::new(3, now);
        let now = run(&mut hubs, &mut gateways, 90);
        assert_eq!(gateways[1].view(2, now).1, 40);
        assert_eq!(gateways[1].worker.state.index.matched(prefill.index, &blocks(3, 20)), 20);
        assert!(gateways.iter().all(|of| of.worker.state.table.fleet == Fleet { gateways: 2, exchanging: 2 }));
    }

    #[test]
    fn however_much_gateways_told_a_hub_passes_it_on_in_messages_that_are_taken() {
        let now = Monotonic::from_secs(1);
        let (mut full, mut empty) = (Hub::new(8), Hub::new(9));
        for id in 1..=40 {
            let blocks: Vec<_> = (0..20).flat_map(|at| block_event(at, &blocks(id, 1_000)).into_vec()).collect();
            let report = vec![b'x'; MAX_REPORT_BYTES];
            let record = Record { gateway: id, turn: 1, blocks, report, ..Record::default() };
            full.take(&Told { from: id, records: vec![record], ..Told::default() }, now);
        }
        let mut have = HashMap::new();
        let messages = full.relay(&have, now);
        assert!(messages.len() > 5);
        for told in messages {
            let bytes = told.to_bytes();
            assert!(bytes.len() <= MAX_MESSAGE_BYTES / 2, "{}", bytes.len());
            empty.take(&Told::from_bytes(&bytes).unwrap(), now);
            have.extend(empty.answer(&told, 0).have);
        }
        assert_eq!(have.len(), 40);
        assert!(have.values().all(|next| *next == 20));
        assert!(full.relay(&have, now).iter().flat_map(|told| &told.records).all(|record| record.blocks.is_empty()));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Start { gateway: usize, place: usize, tokens: u64 },
        End { number: usize },
        Holds { gateway: usize, place: usize, prompt: u64 },
        Tick { gateway: usize, is_lost: bool },
        Restart,
        Rubbish { gateway: usize, bytes: Vec<u8> },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..3_usize, 0..3_usize, 1..1_000_u64).prop_map(|(gateway, place, tokens)| Step::Start { gateway, place, tokens }),
            3 => any::<usize>().prop_map(|number| Step::End { number }),
            3 => (0..3_usize, 0..3_usize, 0..20_u64).prop_map(|(gateway, place, prompt)| Step::Holds { gateway, place, prompt }),
            8 => (0..3_usize, any::<bool>()).prop_map(|(gateway, is_lost)| Step::Tick { gateway, is_lost }),
            1 => Just(Step::Restart),
            1 => (0..3_usize, prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(gateway, bytes)| Step::Rubbish { gateway, bytes }),
        ]
    }

    proptest! {
        /// Whatever is lost on the way, and however often pd-control starts over: once calls get through again, everyone
        /// sees what everybody has in flight, and nothing else.
        #[test]
        fn views_agree_in_the_end(steps in prop::collection::vec(step(), 0..120)) {
            let (mut hub, mut now, mut hubs) = (Hub::new(100), Monotonic::from_secs(1), 100);
            let mut gateways = fleet(3, &mut hub, &mut now);
            let mut running: Vec<(usize, usize, u64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Start { gateway, place, tokens } => {
                        let at = gateways[gateway].at(place);
                        gateways[gateway].worker.decode_started(at, tokens);
                        running.push((gateway, place, tokens));
                    }
                    Step::End { number } if !running.is_empty() => {
                        let (gateway, place, tokens) = running.swap_remove(number % running.len());
                        let at = gateways[gateway].at(place);
                        gateways[gateway].worker.decode_ended(at, tokens);
                    }
                    Step::End { .. } => {}
                    Step::Holds { gateway, place, prompt } => {
                        let at = gateways[gateway].at(place);
                        gateways[gateway].worker.holds(at, &blocks(prompt, 9));
                    }
                    Step::Tick { gateway, is_lost } => {
                        now += TICK;
                        gateways[gateway].tick((!is_lost).then_some(&mut hub), now);
                    }
                    Step::Restart => {
                        hubs += 1;
                        hub = Hub::new(hubs);
                    }
                    Step::Rubbish { gateway, bytes } => {
                        let of = &mut gateways[gateway];
                        of.exchange.answered(&mut of.worker, Kind::Tell, Some(200), &bytes, now);
                    }
                }
            }
            settle(&mut gateways, &mut hub, &mut now, 100);
            for gateway in &gateways {
                for place in 0..3 {
                    let tokens: u64 = running.iter().filter(|of| of.1 == place).map(|of| of.2).sum();
                    prop_assert_eq!(gateway.view(place, now).1, tokens);
                }
            }
            for prompt in 0..20 {
                for place in 0..3 {
                    let held: Vec<_> = gateways.iter().map(|of| of.worker.state.index.matched(of.at(place).index, &blocks(prompt, 9))).collect();
                    prop_assert!(held.iter().all(|of| *of == held[0]), "{prompt} at {place}: {held:?}");
                }
            }
        }
    }
}
