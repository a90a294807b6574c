//! What happens at the endpoints, as events: a worker applies its own at once, and the others' when it reads them.
//!
//! An event names its endpoint by [`Slot::key`](crate::endpoints::table::Slot::key), which every worker computes alike, so workers
//! whose lists differ for a moment understand each other.

use core::time::Duration;
use std::borrow::Cow;

use hashbrown::HashMap;

use crate::endpoints::load::Load;
use crate::envoys::Fleet;
use crate::envoys::message::Totals;
use crate::prefix::hash::BlockHash;
use crate::prefix::index::EndpointIndex;
use crate::workers::worker::Worker;

/// Blocks of a prompt that the other workers hear of; the rest counts as not cached there. 4 MiB and more of prompt.
const MAX_TOLD_BLOCKS: usize = 2_048;

/// Something that one worker did or saw.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event<'a> {
    /// A prefill leg was sent.
    PrefillStarted { leg: u64, seconds: f64, at: Duration, expires: Duration },
    /// It ended.
    PrefillEnded { leg: u64, at: Duration },
    /// Nobody waits for its end any more.
    PrefillAbandoned { leg: u64, at: Duration },
    /// KV tokens were assigned.
    DecodeStarted { tokens: u64 },
    /// They are free again.
    DecodeEnded { tokens: u64 },
    /// The endpoint holds these blocks now.
    Holds { blocks: Cow<'a, [BlockHash]> },
    /// It could not be reached.
    Failed { at: Duration },
    /// It answered after a failure.
    Healed,
    /// A pool (in place of an endpoint) let a request in, from whom the hash says.
    Admitted { fairness: u64, tokens: u64 },
    /// That request is over.
    Released { fairness: u64, tokens: u64 },
    /// What other Envoys have in flight at the endpoint differs by so much from before.
    BusyElsewhere { by: Totals },
    /// Another Envoy sent these blocks to the endpoint.
    HoldsByOthers { blocks: Cow<'a, [BlockHash]> },
    /// Which Envoys there are; no endpoint is meant.
    FleetIs { fleet: Fleet },
}

/// A prefill leg in flight.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Leg {
    endpoint: u64,
    seconds: f64,
    at: Duration,
    expires: Duration,
}

/// The part of the ledger that one worker has put there.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Part {
    legs: HashMap<u64, Leg>,
    decode: HashMap<u64, Load>,
    /// What was let in, by pool and by whom.
    admitted: HashMap<(u64, u64), Load>,
    /// What the worker heard of other Envoys.
    elsewhere: HashMap<u64, Totals>,
    fleet: Fleet,
}

impl Part {
    /// Keeps the books; the table is somebody else's.
    pub(crate) fn note(&mut self, endpoint: u64, event: &Event<'_>) {
        match *event {
            Event::PrefillStarted { leg, seconds, at, expires } => {
                self.legs.insert(leg, Leg { endpoint, seconds, at, expires });
            }
            Event::PrefillEnded { leg, .. } | Event::PrefillAbandoned { leg, .. } => {
                self.legs.remove(&leg);
            }
            Event::DecodeStarted { tokens } => self.decode.entry(endpoint).or_default().add(tokens),
            Event::DecodeEnded { tokens } => {
                if let Some(load) = self.decode.get_mut(&endpoint) {
                    load.remove(tokens);
                    if load.requests == 0 {
                        self.decode.remove(&endpoint);
                    }
                }
            }
            Event::Admitted { fairness, tokens } => {
                self.admitted.entry((endpoint, fairness)).or_default().add(tokens);
            }
            Event::Released { fairness, tokens } => {
                if let Some(load) = self.admitted.get_mut(&(endpoint, fairness)) {
                    load.remove(tokens);
                    if load.requests == 0 {
                        self.admitted.remove(&(endpoint, fairness));
                    }
                }
            }
            Event::BusyElsewhere { by } => {
                let sum = self.elsewhere.entry(endpoint).or_default();
                *sum = sum.plus(by);
                if *sum == Totals::default() {
                    self.elsewhere.remove(&endpoint);
                }
            }
            Event::FleetIs { fleet } => self.fleet = fleet,
            Event::Holds { .. } | Event::HoldsByOthers { .. } | Event::Failed { .. } | Event::Healed => {}
        }
    }

    /// Drops legs whose end was never told.
    pub(crate) fn prune(&mut self, now: Duration) {
        self.legs.retain(|_, leg| leg.expires > now);
    }

    /// Adds the part to a worker's table.
    pub(crate) fn enter(&self, worker: &mut Worker) {
        let mut legs: Vec<_> = self.legs.iter().collect();
        legs.sort_unstable_by_key(|(leg, of)| (of.at, **leg));
        for (leg, Leg { endpoint, seconds, at, expires }) in legs {
            if let Some(slot) = worker.table.by_key(*endpoint) {
                slot.prefill.add_behind(slot.elsewhere_seconds(), *leg, *seconds, *at, *expires);
            }
        }
        for (endpoint, totals) in &self.elsewhere {
            worker.table.busy_elsewhere(*endpoint, *totals);
        }
        if self.fleet != Fleet::default() {
            worker.table.fleet = self.fleet;
        }
        for (endpoint, load) in &self.decode {
            if let Some(slot) = worker.table.by_key(*endpoint) {
                slot.decode.merge(load);
            }
        }
        for ((pool, fairness), load) in &self.admitted {
            worker.admission.add(*pool, *fairness, load);
        }
    }

    /// Takes the part out of a worker's table again.
    pub(crate) fn leave(&self, worker: &mut Worker, now: Duration) {
        for (leg, Leg { endpoint, .. }) in &self.legs {
            if let Some(slot) = worker.table.by_key(*endpoint) {
                slot.prefill.remove(*leg, now);
            }
        }
        for (endpoint, load) in &self.decode {
            if let Some(slot) = worker.table.by_key(*endpoint) {
                slot.decode.subtract(load);
            }
        }
        for ((pool, fairness), load) in &self.admitted {
            worker.admission.subtract(*pool, *fairness, load);
        }
        for (endpoint, totals) in &self.elsewhere {
            worker.table.busy_elsewhere(*endpoint, Totals::default().minus(*totals));
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.word(self.legs.len() as u64);
        for (leg, of) in &self.legs {
            out.word(*leg);
            out.word(of.endpoint);
            out.word(of.seconds.to_bits());
            out.time(of.at);
            out.time(of.expires);
        }
        out.word(self.decode.len() as u64);
        for (endpoint, load) in &self.decode {
            out.word(*endpoint);
            out.load(load);
        }
        out.word(self.fleet.gateways);
        out.word(self.fleet.exchanging);
        out.word(self.elsewhere.len() as u64);
        for (endpoint, totals) in &self.elsewhere {
            out.word(*endpoint);
            totals.write(&mut out);
        }
        for ((pool, fairness), load) in &self.admitted {
            out.word(*pool);
            out.word(*fairness);
            out.load(load);
        }
        out.0
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut rest = Reader(bytes);
        let mut part = Self::default();
        for _ in 0..rest.word()? {
            let leg = rest.word()?;
            let endpoint = rest.word()?;
            let seconds = f64::from_bits(rest.word()?);
            part.legs.insert(leg, Leg { endpoint, seconds, at: rest.time()?, expires: rest.time()? });
        }
        for _ in 0..rest.word()? {
            part.decode.insert(rest.word()?, rest.load()?);
        }
        part.fleet = Fleet { gateways: rest.word()?, exchanging: rest.word()? };
        for _ in 0..rest.word()? {
            part.elsewhere.insert(rest.word()?, Totals::read(&mut rest)?);
        }
        while !rest.0.is_empty() {
            part.admitted.insert((rest.word()?, rest.word()?), rest.load()?);
        }
        Some(part)
    }
}

/// What this worker did since it last told the others, and what it has in flight.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// Events to tell, encoded; `None` where nobody listens.
    pub(crate) untold: Option<Vec<u8>>,
    /// Whether one of them matters to the next decision; the end of something may wait for company.
    pub(crate) is_pressing: bool,
    /// This worker's own part.
    pub(crate) own: Part,
    /// Whether it has changed since it was last written down.
    pub(crate) is_own_new: bool,
}

impl Log {
    pub(crate) fn push(&mut self, endpoint: u64, event: &Event<'_>) {
        let Some(untold) = &mut self.untold else { return };
        event.write(endpoint, untold);
        let is_end = matches!(event, Event::PrefillEnded { .. } | Event::DecodeEnded { .. } | Event::Released { .. });
        self.is_pressing |= !is_end;
        self.own.note(endpoint, event);
        self.is_own_new = true;
    }

    /// Whether there is nothing to tell.
    pub(crate) fn is_told(&self) -> bool {
        self.untold.as_ref().is_none_or(Vec::is_empty)
    }

    /// Takes the events that are to be told.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.is_pressing = false;
        self.untold.as_mut().map(core::mem::take).unwrap_or_default()
    }

    /// Gives the memory of events that were [taken](Self::take) back.
    pub(crate) fn reuse(&mut self, mut told: Vec<u8>) {
        told.clear();
        self.untold = Some(told);
    }
}

impl<'a> Event<'a> {
    /// Does to a worker's state what the event says of the endpoint, or pool, of that key.
    pub(crate) fn enter_by_key(&self, key: u64, worker: &mut Worker) {
        match *self {
            Self::Admitted { fairness, tokens } => worker.admission.add(key, fairness, &Load { tokens, requests: 1 }),
            Self::Released { fairness, tokens } => {
                worker.admission.subtract(key, fairness, &Load { tokens, requests: 1 });
            }
            Self::BusyElsewhere { by } => worker.table.busy_elsewhere(key, by),
            Self::FleetIs { fleet } => worker.table.fleet = fleet,
            _ => {
                if let Some(at) = worker.table.index_of_key(key) {
                    self.enter(at, worker);
                }
            }
        }
    }

    /// Does to a worker's table and index what the event says of the endpoint at a place.
    pub(crate) fn enter(&self, at: EndpointIndex, worker: &mut Worker) {
        if let Self::Holds { blocks } | Self::HoldsByOthers { blocks } = self {
            worker.index.insert(at, blocks);
            return;
        }
        let Some(slot) = worker.table.get_mut(at) else { return };
        match *self {
            Self::PrefillStarted { leg, seconds, at, expires } => {
                slot.prefill.add_behind(slot.elsewhere_seconds(), leg, seconds, at, expires);
            }
            Self::PrefillEnded { leg, at } => {
                slot.prefill.remove(leg, at);
            }
            Self::PrefillAbandoned { leg, at } => slot.prefill.abandon(leg, at),
            Self::DecodeStarted { tokens } => slot.decode.add(tokens),
            Self::DecodeEnded { tokens } => slot.decode.remove(tokens),
            Self::Failed { at } => slot.health.failed(at),
            Self::Healed => slot.health.answered(),
            Self::Holds { .. }
            | Self::HoldsByOthers { .. }
            | Self::Admitted { .. }
            | Self::Released { .. }
            | Self::BusyElsewhere { .. }
            | Self::FleetIs { .. } => {}
        }
    }

    /// One event: its length, its kind, the endpoint (or pool), what belongs to the kind; little endian.
    fn write(&self, endpoint: u64, into: &mut Vec<u8>) {
        let start = into.len();
        let mut out = Writer(core::mem::take(into));
        out.0.extend_from_slice(&[0; 4]);
        let mut head = |kind: u8| {
            out.0.push(kind);
            out.word(endpoint);
        };
        match self {
            Self::PrefillStarted { leg, seconds, at, expires } => {
                head(1);
                out.word(*leg);
                out.word(seconds.to_bits());
                out.time(*at);
                out.time(*expires);
            }
            Self::PrefillEnded { leg, at } => {
                head(2);
                out.word(*leg);
                out.time(*at);
            }
            Self::PrefillAbandoned { leg, at } => {
                head(3);
                out.word(*leg);
                out.time(*at);
            }
            Self::DecodeStarted { tokens } => {
                head(4);
                out.word(*tokens);
            }
            Self::DecodeEnded { tokens } => {
                head(5);
                out.word(*tokens);
            }
            Self::Holds { blocks } => {
                head(6);
                blocks.iter().take(MAX_TOLD_BLOCKS).for_each(|block| out.word(block.0));
            }
            Self::Failed { at } => {
                head(7);
                out.time(*at);
            }
            Self::Healed => head(8),
            Self::Admitted { fairness, tokens } => {
                head(9);
                out.word(*fairness);
                out.word(*tokens);
            }
            Self::Released { fairness, tokens } => {
                head(10);
                out.word(*fairness);
                out.word(*tokens);
            }
            Self::BusyElsewhere { by } => {
                head(11);
                by.write(&mut out);
            }
            Self::HoldsByOthers { blocks } => {
                head(12);
                blocks.iter().take(MAX_TOLD_BLOCKS).for_each(|block| out.word(block.0));
            }
            Self::FleetIs { fleet } => {
                head(13);
                out.word(fleet.gateways);
                out.word(fleet.exchanging);
            }
        }
        *into = out.0;
        let length = u32::try_from(into.len().saturating_sub(start)).unwrap_or(u32::MAX);
        if let Some(place) = into.get_mut(start..).and_then(|event| event.first_chunk_mut()) {
            *place = length.to_le_bytes();
        }
    }

    /// Takes the first event off encoded ones.
    pub(crate) fn split_first(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
        let length = u32::from_le_bytes(*bytes.first_chunk()?) as usize;
        bytes.split_at_checked(length).filter(|(event, _)| !event.is_empty())
    }

    /// The events that `bytes` hold, each with its endpoint; those that a newer filter writes and this one does not know
    /// are left out.
    pub(crate) fn read(bytes: &[u8]) -> impl Iterator<Item = (u64, Self)> {
        let mut rest = bytes;
        core::iter::from_fn(move || {
            loop {
                let (event, behind) = Self::split_first(rest)?;
                rest = behind;
                if let Some(event) = event.get(4..).and_then(Self::from_bytes) {
                    return Some(event);
                }
            }
        })
    }

    fn from_bytes(bytes: &[u8]) -> Option<(u64, Self)> {
        let (kind, rest) = bytes.split_first()?;
        let mut rest = Reader(rest);
        let endpoint = rest.word()?;
        let event = match kind {
            1 => {
                let (leg, seconds) = (rest.word()?, f64::from_bits(rest.word()?));
                Self::PrefillStarted { leg, seconds, at: rest.time()?, expires: rest.time()? }
            }
            2 => Self::PrefillEnded { leg: rest.word()?, at: rest.time()? },
            3 => Self::PrefillAbandoned { leg: rest.word()?, at: rest.time()? },
            4 => Self::DecodeStarted { tokens: rest.word()? },
            5 => Self::DecodeEnded { tokens: rest.word()? },
            6 => Self::Holds { blocks: core::iter::from_fn(|| rest.word().map(BlockHash)).collect() },
            7 => Self::Failed { at: rest.time()? },
            8 => Self::Healed,
            9 => Self::Admitted { fairness: rest.word()?, tokens: rest.word()? },
            10 => Self::Released { fairness: rest.word()?, tokens: rest.word()? },
            11 => Self::BusyElsewhere { by: Totals::read(&mut rest)? },
            12 => Self::HoldsByOthers { blocks: core::iter::from_fn(|| rest.word().map(BlockHash)).collect() },
            13 => Self::FleetIs { fleet: Fleet { gateways: rest.word()?, exchanging: rest.word()? } },
            _ => return None,
        };
        Some((endpoint, event))
    }
}

/// Little-endian words.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn word(&mut self, word: u64) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }

    fn load(&mut self, load: &Load) {
        self.word(load.tokens);
        self.word(u64::from(load.requests));
    }

    fn time(&mut self, time: Duration) {
        self.word(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// What a [`Writer`] wrote.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl Reader<'_> {
    pub(crate) fn word(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }

    fn load(&mut self) -> Option<Load> {
        Some(Load { tokens: self.word()?, requests: u32::try_from(self.word()?).ok()? })
    }

    fn time(&mut self) -> Option<Duration> {
        self.word().map(Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event() -> impl Strategy<Value = Event<'static>> {
        let time = || any::<u64>().prop_map(Duration::from_nanos);
        prop_oneof![
            (any::<u64>(), 0.0..1e3, time(), time()).prop_map(|(leg, seconds, at, expires)| Event::PrefillStarted {
                leg,
                seconds,
                at,
                expires
            }),
            (any::<u64>(), time()).prop_map(|(leg, at)| Event::PrefillEnded { leg, at }),
            (any::<u64>(), time()).prop_map(|(leg, at)| Event::PrefillAbandoned { leg, at }),
            any::<u64>().prop_map(|tokens| Event::DecodeStarted { tokens }),
            any::<u64>().prop_map(|tokens| Event::DecodeEnded { tokens }),
            prop::collection::vec(any::<u64>().prop_map(BlockHash), 0..9)
                .prop_map(|blocks| Event::Holds { blocks: blocks.into() }),
            time().prop_map(|at| Event::Failed { at }),
            Just(Event::Healed),
            (0_u64..3, any::<u64>()).prop_map(|(fairness, tokens)| Event::Admitted { fairness, tokens }),
            (0_u64..3, any::<u64>()).prop_map(|(fairness, tokens)| Event::Released { fairness, tokens }),
            any::<(u64, u64, u64)>()
                .prop_map(|(work, tokens, requests)| Event::BusyElsewhere { by: Totals { work, tokens, requests } }),
            prop::collection::vec(any::<u64>().prop_map(BlockHash), 0..9)
                .prop_map(|blocks| Event::HoldsByOthers { blocks: blocks.into() }),
            any::<(u64, u64)>()
                .prop_map(|(gateways, exchanging)| Event::FleetIs { fleet: Fleet { gateways, exchanging } }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(events in prop::collection::vec((any::<u64>(), event()), 0..9)) {
            let bytes = events.iter().fold(Vec::new(), |mut bytes, (endpoint, event)| {
                event.write(*endpoint, &mut bytes);
                bytes
            });
            prop_assert_eq!(Event::read(&bytes).collect::<Vec<_>>(), events.clone());
            let mut part = Part::default();
            events.iter().for_each(|(endpoint, event)| part.note(*endpoint, event));
            prop_assert_eq!(Part::from_bytes(&part.to_bytes()), Some(part));
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (Event::read(&bytes).count(), Part::from_bytes(&bytes));
        }
    }
}
