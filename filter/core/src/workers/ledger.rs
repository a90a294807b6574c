//! The worker ledger: what one worker has in flight, by its own events alone. When that worker is gone, the others retract
//! its worker ledger as a whole.

use hashbrown::HashMap;

use crate::codec::{Reader, Writer};
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::load::Load;
use crate::time::Monotonic;
use crate::workers::event::Event;
use crate::workers::state::State;
use crate::workers::waiting::{HeldByKey, WaitingRequest};

/// A prefill leg in flight.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Leg {
    endpoint: u64,
    seconds: f64,
    at: Monotonic,
    expires: Monotonic,
}

/// What one worker has in flight, and what it knows of other Envoys.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct WorkerLedger {
    legs: HashMap<u64, Leg>,
    decode: HashMap<u64, Load>,
    /// Requests that pools with limits let in, by pool and fairness id.
    admitted: HashMap<(u64, u64), Load>,
    /// What other Envoys have in flight, where this worker is or was the leader.
    elsewhere: HashMap<u64, Totals>,
    fleet: Fleet,
    /// Requests that wait, by number, each with the name of its queue.
    waiting: HashMap<u64, (u64, WaitingRequest)>,
}

impl WorkerLedger {
    /// Notes an event at the endpoint, or pool, with that key.
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
            Event::Waits { ref request } => {
                self.waiting.insert(request.id, (endpoint, WaitingRequest::clone(request)));
            }
            Event::HeldChanged { id, ref held } => {
                if let Some((_, request)) = self.waiting.get_mut(&id) {
                    request.held = HeldByKey::clone(held);
                }
            }
            Event::Bound { id, .. } | Event::WaitEnded { id } => {
                self.waiting.remove(&id);
            }
            Event::Holds { .. }
            | Event::HoldsByOthers { .. }
            | Event::Lacks { .. }
            | Event::Failed { .. }
            | Event::Healed
            | Event::Forgot
            | Event::Answered { .. }
            | Event::Doubted { .. } => {}
        }
    }

    /// Drops legs that expired without an end.
    pub(crate) fn prune(&mut self, now: Monotonic) {
        self.legs.retain(|_, leg| leg.expires > now);
    }

    /// Adds the ledger to a worker's state.
    pub(crate) fn apply(&self, state: &mut State) {
        let mut legs: Vec<_> = self.legs.iter().collect();
        legs.sort_unstable_by_key(|(leg, of)| (of.at, **leg));
        for (leg, Leg { endpoint, seconds, at, expires }) in legs {
            let entry = state.table.ledger_entry(*endpoint);
            entry.prefill.add_behind(entry.elsewhere_seconds, *leg, *seconds, *at, *expires);
        }
        for (endpoint, totals) in &self.elsewhere {
            state.table.busy_elsewhere(*endpoint, *totals);
        }
        if self.fleet != Fleet::default() {
            state.table.fleet = self.fleet;
        }
        for (endpoint, load) in &self.decode {
            state.table.ledger_entry(*endpoint).decode.merge(load);
        }
        for ((pool, fairness), load) in &self.admitted {
            state.admission.add(*pool, *fairness, load);
        }
        for (queue, request) in self.waiting.values() {
            state.waiting.push(*queue, request, &state.table);
        }
    }

    /// Takes out of a worker's state what [`apply`](Self::apply) added.
    pub(crate) fn retract(&self, state: &mut State, now: Monotonic) {
        for (leg, Leg { endpoint, .. }) in &self.legs {
            state.table.ledger_entry(*endpoint).prefill.remove(*leg, now);
        }
        for (endpoint, load) in &self.decode {
            state.table.ledger_entry(*endpoint).decode.subtract(load);
        }
        for ((pool, fairness), load) in &self.admitted {
            state.admission.subtract(*pool, *fairness, load);
        }
        for (endpoint, totals) in &self.elsewhere {
            state.table.busy_elsewhere(*endpoint, Totals::default().minus(*totals));
        }
        self.waiting.keys().for_each(|id| state.waiting.remove(*id));
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
        out.word(self.waiting.len() as u64);
        for (queue, request) in self.waiting.values() {
            out.word(*queue);
            request.write(&mut out);
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
        let mut ledger = Self::default();
        for _ in 0..rest.word()? {
            let leg = rest.word()?;
            let endpoint = rest.word()?;
            let seconds = f64::from_bits(rest.word()?);
            ledger.legs.insert(leg, Leg { endpoint, seconds, at: rest.time()?, expires: rest.time()? });
        }
        for _ in 0..rest.word()? {
            ledger.decode.insert(rest.word()?, Load::read(&mut rest)?);
        }
        ledger.fleet = Fleet::read(&mut rest)?;
        for _ in 0..rest.word()? {
            ledger.elsewhere.insert(rest.word()?, Totals::read(&mut rest)?);
        }
        for _ in 0..rest.word()? {
            let (queue, request) = (rest.word()?, WaitingRequest::read(&mut rest)?);
            ledger.waiting.insert(request.id, (queue, request));
        }
        while !rest.0.is_empty() {
            ledger.admitted.insert((rest.word()?, rest.word()?), Load::read(&mut rest)?);
        }
        Some(ledger)
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
            let mut ledger = WorkerLedger::default();
            events.iter().for_each(|(endpoint, event)| ledger.note(*endpoint, event));
            prop_assert_eq!(WorkerLedger::from_bytes(&ledger.to_bytes()), Some(ledger));
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = WorkerLedger::from_bytes(&bytes);
        }
    }
}
