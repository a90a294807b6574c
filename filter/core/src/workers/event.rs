//! Events: what a worker does or sees at the endpoints. A worker applies its own events at once, and those of the other
//! workers when it reads them.
//!
//! An event names its endpoint by [`EndpointState::key`](crate::endpoints::endpoint_state::EndpointState::key). Every worker
//! computes the same key, so workers whose lists differ for a moment understand each other's events.

use std::borrow::Cow;

use crate::codec::{Reader, Writer};
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::health::Cause;
use crate::endpoints::load::LedgerEntry;
use crate::endpoints::load::Load;
use crate::endpoints::outliers::{ErrorKind, Leg};
use crate::endpoints::table::Table;
use crate::prefix::hash::BlockHash;
use crate::prefix::index::EndpointIndex;
use crate::time::Monotonic;
use crate::workers::state::State;
use crate::workers::waiting::{HeldByKey, WaitingRequest};

/// Most blocks of an event, 4 MiB of prompt or more. The other workers take what lies behind as not held.
const MAX_EVENT_BLOCKS: usize = 2_048;

/// Something that one worker did or saw.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event<'a> {
    /// A prefill leg was sent to the endpoint, which needs `seconds` for it. Nobody counts it beyond `expires`.
    PrefillStarted { leg: u64, seconds: f64, at: Monotonic, expires: Monotonic },
    /// That leg ended. `answered`: the endpoint answered it, well or not.
    PrefillEnded { leg: u64, at: Monotonic, answered: bool },
    /// The client of that leg is gone, and the endpoint may still compute it.
    PrefillAbandoned { leg: u64, at: Monotonic },
    /// A request with so many KV tokens was assigned to the endpoint.
    DecodeStarted { tokens: u64 },
    /// That request ended.
    DecodeEnded { tokens: u64 },
    /// The endpoint holds these blocks now.
    Holds { blocks: Cow<'a, [BlockHash]> },
    /// The endpoint could not be reached, or answered what its peers do not: it is ejected.
    Failed { at: Monotonic, cause: Cause },
    /// The endpoint answered after a failure.
    Healed,
    /// A pool let a request in. The key is that of the pool, `fairness` a hash of the fairness id.
    Admitted { fairness: u64, tokens: u64 },
    /// A request that a pool let in is over.
    Released { fairness: u64, tokens: u64 },
    /// What other Envoys have in flight at the endpoint has changed by so much.
    BusyElsewhere { by: Totals },
    /// Another Envoy sent these blocks to the endpoint.
    HoldsByOthers { blocks: Cow<'a, [BlockHash]> },
    /// Number of the Envoys. The key has no meaning.
    FleetIs { fleet: Fleet },
    /// The endpoint does not hold what it was sent: its process is a new one.
    Forgot,
    /// The endpoint answered a leg with an error, or without one after errors.
    Answered { leg: Leg, error: Option<ErrorKind> },
    /// A request waits for a prefill endpoint with room. The key is the name of its queue. A request that waited in
    /// another queue waits there no longer.
    Waits { request: Cow<'a, WaitingRequest> },
    /// Endpoints hold so much of a waiting request's prompt now. The key has no meaning.
    HeldChanged { id: u64, held: Cow<'a, HeldByKey> },
    /// A waiting request was sent to an endpoint, which needs `seconds` for it. The key has no meaning.
    Bound { id: u64, seconds: f64 },
    /// A request waits no longer, and no endpoint has it. The key has no meaning.
    WaitEnded { id: u64 },
    /// The endpoint refused a request: it does not hold these blocks of the prompt.
    Lacks { blocks: Cow<'a, [BlockHash]> },
}

impl<'a> Event<'a> {
    /// Whether the event says what is in flight at an endpoint. It counts also while the endpoint is not in the list.
    const fn is_of_ledger(&self) -> bool {
        matches!(
            self,
            Self::PrefillStarted { .. }
                | Self::PrefillEnded { .. }
                | Self::PrefillAbandoned { .. }
                | Self::DecodeStarted { .. }
                | Self::DecodeEnded { .. }
        )
    }

    /// Applies an event of this worker at an endpoint that is not in the list, or not any more. Its entry in the ledger
    /// waits for its return; of the rest nothing is kept.
    pub(crate) fn apply_at_absent(&self, key: u64, table: &mut Table) {
        if self.is_of_ledger() {
            self.apply_to_ledger(table.ledger_entry(key));
        }
    }

    fn apply_to_ledger(&self, entry: LedgerEntry<'_>) {
        let LedgerEntry { prefill, decode, elsewhere_seconds } = entry;
        match *self {
            Self::PrefillStarted { leg, seconds, at, expires } => {
                prefill.add_behind(elsewhere_seconds, leg, seconds, at, expires);
            }
            Self::PrefillEnded { leg, at, .. } => {
                prefill.remove(leg, at);
            }
            Self::PrefillAbandoned { leg, at } => prefill.abandon(leg, at),
            Self::DecodeStarted { tokens } => decode.add(tokens),
            Self::DecodeEnded { tokens } => decode.remove(tokens),
            _ => {}
        }
    }

    /// Applies the event at the endpoint, or pool, of that key. Where the list has no such endpoint, only the ledger
    /// changes.
    pub(crate) fn apply(&self, key: u64, state: &mut State) {
        match *self {
            Self::Admitted { fairness, tokens } => state.admission.add(key, fairness, &Load { tokens, requests: 1 }),
            Self::Released { fairness, tokens } => {
                state.admission.subtract(key, fairness, &Load { tokens, requests: 1 });
            }
            Self::BusyElsewhere { by } => state.table.busy_elsewhere(key, by),
            Self::FleetIs { fleet } => state.table.fleet = fleet,
            Self::Waits { ref request } => state.waiting.push(key, request, &state.table),
            Self::HeldChanged { id, ref held } => state.waiting.set_held(id, held, &state.table),
            Self::Bound { id, seconds } => state.waiting.bind(id, seconds),
            Self::WaitEnded { id } => state.waiting.remove(id),
            _ => match state.table.index_of_key(key) {
                Some(index) => self.apply_at(index, state),
                None => self.apply_at_absent(key, &mut state.table),
            },
        }
    }

    /// Applies the event at the endpoint of that index. Without effect for events that are not those of an endpoint.
    pub(crate) fn apply_at(&self, index: EndpointIndex, state: &mut State) {
        if let Self::Holds { blocks } | Self::HoldsByOthers { blocks } = self {
            state.insert(index, blocks);
            return;
        }
        if let Self::Lacks { blocks } = self {
            state.index.remove(index, blocks);
            return;
        }
        if *self == Self::Forgot {
            state.index.forget(index);
        }
        let Some(endpoint_state) = state.table.get_mut(index) else { return };
        if self.is_of_ledger() {
            self.apply_to_ledger(endpoint_state.ledger_entry());
        }
        match *self {
            Self::PrefillEnded { at, answered: true, .. } => {
                endpoint_state.answered_at = endpoint_state.answered_at.max(at);
            }
            Self::Failed { at, cause } => endpoint_state.health.failed(cause, at),
            Self::Healed => endpoint_state.health.answered(),
            Self::Forgot => {
                endpoint_state.engine_id = None;
                endpoint_state.wrong_beliefs = 0;
            }
            Self::Answered { leg, error } => endpoint_state.answers.note(leg, error),
            _ => {}
        }
    }

    /// Appends the event, little endian: its length in bytes (4), its kind (1), the key (8), what the kind has.
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
            Self::PrefillEnded { leg, at, answered } => {
                head(2);
                out.word(*leg);
                out.time(*at);
                out.0.push(u8::from(*answered));
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
                blocks.iter().take(MAX_EVENT_BLOCKS).for_each(|block| out.word(block.0));
            }
            Self::Failed { at, cause } => {
                head(7);
                out.time(*at);
                out.0.push(cause.code());
            }
            Self::Healed => head(8),
            Self::Forgot => head(19),
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
                blocks.iter().take(MAX_EVENT_BLOCKS).for_each(|block| out.word(block.0));
            }
            Self::FleetIs { fleet } => {
                head(13);
                fleet.write(&mut out);
            }
            Self::Answered { leg, error } => {
                head(14);
                out.0.push(u8::from(*leg == Leg::Prefill));
                out.0.push(error.map_or(0, ErrorKind::code));
            }
            Self::Waits { request } => {
                head(15);
                request.write(&mut out);
            }
            Self::HeldChanged { id, held } => {
                head(16);
                out.word(*id);
                held.write(&mut out);
            }
            Self::Bound { id, seconds } => {
                head(17);
                out.word(*id);
                out.word(seconds.to_bits());
            }
            Self::WaitEnded { id } => {
                head(18);
                out.word(*id);
            }
            Self::Lacks { blocks } => {
                head(20);
                blocks.iter().take(MAX_EVENT_BLOCKS).for_each(|block| out.word(block.0));
            }
        }
        *into = out.0;
        let length = u32::try_from(into.len().saturating_sub(start)).unwrap_or(u32::MAX);
        if let Some(place) = into.get_mut(start..).and_then(|event| event.first_chunk_mut()) {
            *place = length.to_le_bytes();
        }
    }

    /// Splits encoded events behind the first one; `None` where there is none.
    pub(crate) fn split_first(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
        let length = u32::from_le_bytes(*bytes.first_chunk()?) as usize;
        bytes.split_at_checked(length).filter(|(event, _)| !event.is_empty())
    }

    /// The events in `bytes`, each with its key. Kinds that only a newer filter knows are left out.
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
            // An older filter does not write whether the endpoint answered.
            2 => Self::PrefillEnded { leg: rest.word()?, at: rest.time()?, answered: rest.byte() == Some(1) },
            3 => Self::PrefillAbandoned { leg: rest.word()?, at: rest.time()? },
            4 => Self::DecodeStarted { tokens: rest.word()? },
            5 => Self::DecodeEnded { tokens: rest.word()? },
            6 => Self::Holds { blocks: core::iter::from_fn(|| rest.word().map(BlockHash)).collect() },
            // An older filter writes no cause.
            7 => Self::Failed { at: rest.time()?, cause: Cause::of_code(rest.byte().unwrap_or_default()) },
            8 => Self::Healed,
            19 => Self::Forgot,
            9 => Self::Admitted { fairness: rest.word()?, tokens: rest.word()? },
            10 => Self::Released { fairness: rest.word()?, tokens: rest.word()? },
            11 => Self::BusyElsewhere { by: Totals::read(&mut rest)? },
            12 => Self::HoldsByOthers { blocks: core::iter::from_fn(|| rest.word().map(BlockHash)).collect() },
            13 => Self::FleetIs { fleet: Fleet::read(&mut rest)? },
            14 => {
                let leg = if rest.byte()? == 1 { Leg::Prefill } else { Leg::Decode };
                Self::Answered { leg, error: ErrorKind::of_code(rest.byte()?) }
            }
            15 => Self::Waits { request: Cow::Owned(WaitingRequest::read(&mut rest)?) },
            16 => Self::HeldChanged { id: rest.word()?, held: Cow::Owned(HeldByKey::read(&mut rest)?) },
            17 => Self::Bound { id: rest.word()?, seconds: f64::from_bits(rest.word()?) },
            18 => Self::WaitEnded { id: rest.word()? },
            20 => Self::Lacks { blocks: core::iter::from_fn(|| rest.word().map(BlockHash)).collect() },
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
            (any::<u64>(), time(), any::<bool>()).prop_map(|(leg, at, answered)| Event::PrefillEnded {
                leg,
                at,
                answered
            }),
            (any::<u64>(), time()).prop_map(|(leg, at)| Event::PrefillAbandoned { leg, at }),
            any::<u64>().prop_map(|tokens| Event::DecodeStarted { tokens }),
            any::<u64>().prop_map(|tokens| Event::DecodeEnded { tokens }),
            prop::collection::vec(any::<u64>().prop_map(BlockHash), 0..9)
                .prop_map(|blocks| Event::Holds { blocks: blocks.into() }),
            (time(), 0_u8..6).prop_map(|(at, code)| Event::Failed { at, cause: Cause::of_code(code) }),
            (any::<bool>(), 0_u8..4).prop_map(|(prefill, code)| Event::Answered {
                leg: if prefill { Leg::Prefill } else { Leg::Decode },
                error: ErrorKind::of_code(code)
            }),
            prop::collection::vec(any::<u64>().prop_map(BlockHash), 0..9)
                .prop_map(|blocks| Event::Lacks { blocks: blocks.into() }),
            Just(Event::Healed),
            Just(Event::Forgot),
            (0_u64..3, any::<u64>()).prop_map(|(fairness, tokens)| Event::Admitted { fairness, tokens }),
            (0_u64..3, any::<u64>()).prop_map(|(fairness, tokens)| Event::Released { fairness, tokens }),
            any::<(u64, u64, u64)>()
                .prop_map(|(work, tokens, requests)| Event::BusyElsewhere { by: Totals { work, tokens, requests } }),
            prop::collection::vec(any::<u64>().prop_map(BlockHash), 0..9)
                .prop_map(|blocks| Event::HoldsByOthers { blocks: blocks.into() }),
            any::<(u64, u64)>()
                .prop_map(|(gateways, exchanging)| Event::FleetIs { fleet: Fleet { gateways, exchanging } }),
            waiting().prop_map(|request| Event::Waits { request: Cow::Owned(request) }),
            (any::<u64>(), held()).prop_map(|(id, held)| Event::HeldChanged { id, held: Cow::Owned(held) }),
            (any::<u64>(), 0.0..1e3).prop_map(|(id, seconds)| Event::Bound { id, seconds }),
            any::<u64>().prop_map(|id| Event::WaitEnded { id }),
        ]
    }

    fn held() -> impl Strategy<Value = HeldByKey> {
        prop::collection::vec((any::<u64>(), 0.0..1e6), 0..5).prop_map(HeldByKey)
    }

    fn waiting() -> impl Strategy<Value = WaitingRequest> {
        let words = (0_u64..5, 0_u64..2, any::<u64>(), 0_u64..3, any::<u64>());
        (words, 0.0..1e6, any::<u64>(), -2_i32..3, held()).prop_map(
            |((id, pool, arrival, tenant, bytes), tokens, key, priority, held)| WaitingRequest {
                id,
                pool,
                arrival: Monotonic::from_nanos(arrival),
                tokens,
                key,
                priority,
                tenant,
                bytes,
                held,
            },
        )
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
