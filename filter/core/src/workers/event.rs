//! What happens at the endpoints, as events: a worker applies its own at once, and the others' when it reads them.
//!
//! An event names its endpoint by [`Slot::key`](crate::endpoints::endpoint_state::Slot::key), which every worker computes alike, so workers
//! whose lists differ for a moment understand each other.

use std::borrow::Cow;

use crate::codec::{Reader, Writer};
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::load::Load;
use crate::prefix::hash::BlockHash;
use crate::prefix::index::EndpointIndex;
use crate::time::Monotonic;
use crate::workers::state::State;

/// Blocks of a prompt that the other workers hear of; the rest counts as not cached there. 4 MiB and more of prompt.
const MAX_TOLD_BLOCKS: usize = 2_048;

/// Something that one worker did or saw.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event<'a> {
    /// A prefill leg was sent.
    PrefillStarted { leg: u64, seconds: f64, at: Monotonic, expires: Monotonic },
    /// It ended.
    PrefillEnded { leg: u64, at: Monotonic },
    /// Nobody waits for its end any more.
    PrefillAbandoned { leg: u64, at: Monotonic },
    /// KV tokens were assigned.
    DecodeStarted { tokens: u64 },
    /// They are free again.
    DecodeEnded { tokens: u64 },
    /// The endpoint holds these blocks now.
    Holds { blocks: Cow<'a, [BlockHash]> },
    /// It could not be reached.
    Failed { at: Monotonic },
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

impl<'a> Event<'a> {
    /// Does to a worker's state what the event says of the endpoint, or pool, of that key. An endpoint that is not in the
    /// list is passed over.
    pub(crate) fn apply(&self, key: u64, state: &mut State) {
        match *self {
            Self::Admitted { fairness, tokens } => state.admission.add(key, fairness, &Load { tokens, requests: 1 }),
            Self::Released { fairness, tokens } => {
                state.admission.subtract(key, fairness, &Load { tokens, requests: 1 });
            }
            Self::BusyElsewhere { by } => state.table.busy_elsewhere(key, by),
            Self::FleetIs { fleet } => state.table.fleet = fleet,
            _ => {
                if let Some(at) = state.table.index_of_key(key) {
                    self.apply_at(at, state);
                }
            }
        }
    }

    /// Does to a worker's table and index what the event says of the endpoint at a place.
    pub(crate) fn apply_at(&self, at: EndpointIndex, state: &mut State) {
        if let Self::Holds { blocks } | Self::HoldsByOthers { blocks } = self {
            state.index.insert(at, blocks);
            return;
        }
        let Some(slot) = state.table.get_mut(at) else { return };
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
    pub(crate) fn write(&self, endpoint: u64, into: &mut Vec<u8>) {
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
                fleet.write(&mut out);
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
            13 => Self::FleetIs { fleet: Fleet::read(&mut rest)? },
            _ => return None,
        };
        Some((endpoint, event))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn event() -> impl Strategy<Value = Event<'static>> {
        let time = || any::<u64>().prop_map(Monotonic::from_nanos);
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
            prop_assert_eq!(Event::read(&bytes).collect::<Vec<_>>(), events);
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Event::read(&bytes).count();
        }
    }
}
