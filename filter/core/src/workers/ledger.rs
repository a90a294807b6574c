//! The ledger of one worker: what it has in flight, by its own events alone. The others can take it out as a whole when
//! the worker is gone.

use hashbrown::HashMap;

use crate::codec::{Reader, Writer};
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::load::Load;
use crate::time::Monotonic;
use crate::workers::event::Event;
use crate::workers::state::State;

/// A prefill leg in flight.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Leg {
    endpoint: u64,
    seconds: f64,
    at: Monotonic,
    expires: Monotonic,
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
    pub(crate) fn prune(&mut self, now: Monotonic) {
        self.legs.retain(|_, leg| leg.expires > now);
    }

    /// Adds the part to a worker's table.
    pub(crate) fn apply(&self, state: &mut State) {
        let mut legs: Vec<_> = self.legs.iter().collect();
        legs.sort_unstable_by_key(|(leg, of)| (of.at, **leg));
        for (leg, Leg { endpoint, seconds, at, expires }) in legs {
            if let Some(slot) = state.table.by_key(*endpoint) {
                slot.prefill.add_behind(slot.elsewhere_seconds(), *leg, *seconds, *at, *expires);
            }
        }
        for (endpoint, totals) in &self.elsewhere {
            state.table.busy_elsewhere(*endpoint, *totals);
        }
        if self.fleet != Fleet::default() {
            state.table.fleet = self.fleet;
        }
        for (endpoint, load) in &self.decode {
            if let Some(slot) = state.table.by_key(*endpoint) {
                slot.decode.merge(load);
            }
        }
        for ((pool, fairness), load) in &self.admitted {
            state.admission.add(*pool, *fairness, load);
        }
    }

    /// Takes the part out of a worker's table again.
    pub(crate) fn retract(&self, state: &mut State, now: Monotonic) {
        for (leg, Leg { endpoint, .. }) in &self.legs {
            if let Some(slot) = state.table.by_key(*endpoint) {
                slot.prefill.remove(*leg, now);
            }
        }
        for (endpoint, load) in &self.decode {
            if let Some(slot) = state.table.by_key(*endpoint) {
                slot.decode.subtract(load);
            }
        }
        for ((pool, fairness), load) in &self.admitted {
            state.admission.subtract(*pool, *fairness, load);
        }
        for (endpoint, totals) in &self.elsewhere {
            state.table.busy_elsewhere(*endpoint, Totals::default().minus(*totals));
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
            load.write(&mut out);
        }
        self.fleet.write(&mut out);
        out.word(self.elsewhere.len() as u64);
        for (endpoint, totals) in &self.elsewhere {
            out.word(*endpoint);
            totals.write(&mut out);
        }
        for ((pool, fairness), load) in &self.admitted {
            out.word(*pool);
            out.word(*fairness);
            load.write(&mut out);
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
            part.decode.insert(rest.word()?, Load::read(&mut rest)?);
        }
        part.fleet = Fleet::read(&mut rest)?;
        for _ in 0..rest.word()? {
            part.elsewhere.insert(rest.word()?, Totals::read(&mut rest)?);
        }
        while !rest.0.is_empty() {
            part.admitted.insert((rest.word()?, rest.word()?), Load::read(&mut rest)?);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::event::tests::event;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(events in prop::collection::vec((any::<u64>(), event()), 0..9)) {
            let mut part = Part::default();
            events.iter().for_each(|(endpoint, event)| part.note(*endpoint, event));
            prop_assert_eq!(Part::from_bytes(&part.to_bytes()), Some(part));
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Part::from_bytes(&bytes);
        }
    }
}
