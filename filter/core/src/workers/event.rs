//! Events: what a worker does or sees at the endpoints. A worker applies its own events at once, and the events of the
//! other workers when it reads them.
//!
//! An event names its endpoint by [`EndpointState::key`](crate::endpoints::endpoint_state::EndpointState::key). Every worker
//! computes the same key, so workers whose lists differ for a moment understand each other's events.

use std::borrow::Cow;

use crate::endpoints::beliefs::Doubts;
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::health::Cause;
use crate::endpoints::load::LedgerEntry;
use crate::endpoints::load::Load;
use crate::endpoints::outliers::{ErrorClass, Leg};
use crate::endpoints::table::Table;
use crate::prefix::hash::BlockHash;
use crate::prefix::index::EndpointIndex;
use crate::time::Monotonic;
use crate::workers::state::State;
use crate::workers::waiting::{HeldByKey, WaitingRequest};

mod wire;

/// Most blocks of an event, 4 MiB of prompt or more. The other workers treat the blocks behind these as not held.
const MAX_EVENT_BLOCKS: usize = 2_048;

/// Something that one worker did or saw.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event<'a> {
    /// A prefill leg was sent to the endpoint, which needs `seconds` for it. The leg counts until `expires` at most.
    PrefillStarted { leg: u64, seconds: f64, at: Monotonic, expires: Monotonic },
    /// A prefill leg ended. `answered`: the endpoint answered it, with success or with an error.
    PrefillEnded { leg: u64, at: Monotonic, answered: bool },
    /// The client of a prefill leg is gone, and the endpoint may still compute the leg.
    PrefillAbandoned { leg: u64, at: Monotonic },
    /// A request with so many KV tokens was assigned to the endpoint.
    DecodeStarted { tokens: u64 },
    /// A request with so many KV tokens ended at the endpoint.
    DecodeEnded { tokens: u64 },
    /// The endpoint holds these blocks now.
    Holds { blocks: Cow<'a, [BlockHash]> },
    /// The endpoint is ejected, because it could not be reached or answered errors that its peers do not.
    Failed { at: Monotonic, cause: Cause },
    /// The endpoint answered after a failure.
    Healed,
    /// A pool let a request in. The key is that of the pool, `fairness` a hash of the fairness id.
    Admitted { fairness: u64, tokens: u64 },
    /// A request that a pool let in is over.
    Released { fairness: u64, tokens: u64 },
    /// The load of other Envoys at the endpoint has changed by so much.
    BusyElsewhere { by: Totals },
    /// Another Envoy sent these blocks to the endpoint.
    HoldsByOthers { blocks: Cow<'a, [BlockHash]> },
    /// The fleet has so many Envoys. The key has no meaning.
    FleetIs { fleet: Fleet },
    /// The endpoint holds nothing: its process is a new one.
    Forgot,
    /// The endpoint answered a leg with an error, or without one after errors.
    Answered { leg: Leg, error: Option<ErrorClass> },
    /// A request waits for a prefill endpoint with room. The key is the name of its queue. A request that waited in
    /// another queue waits there no longer.
    Waits { request: Cow<'a, WaitingRequest> },
    /// What endpoints hold of a waiting request's prompt has changed to `held`. The key has no meaning.
    HeldChanged { id: u64, held: Cow<'a, HeldByKey> },
    /// A waiting request was sent to an endpoint, which needs `seconds` for it. The key has no meaning.
    Bound { id: u64, seconds: f64 },
    /// A request stopped waiting, and no endpoint got it. The key has no meaning.
    WaitEnded { id: u64 },
    /// The endpoint refused a request, so it does not hold these blocks of the prompt.
    Lacks { blocks: Cow<'a, [BlockHash]> },
    /// An answer of the endpoint raised doubts in what it holds, or, with 0, confirmed it.
    /// `touches`: how often blocks of the endpoint were touched since the prompt of that answer went there.
    Doubted { doubt: u8, touches: u64 },
}

impl<'a> Event<'a> {
    /// Whether the event changes what is in flight at an endpoint. Such an event counts also while the list lacks the
    /// endpoint.
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

    /// Applies an event of this worker at an endpoint that the list lacks. What is in flight there is kept for the
    /// endpoint's return. Any other event changes nothing.
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

    /// Applies the event at the endpoint, or pool, with that key. Where the list lacks the endpoint, only what is in flight
    /// there changes.
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

    /// Applies the event at the endpoint with that index. An event that is not of an endpoint changes nothing.
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
        let touches = state.index.touches(index);
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
                endpoint_state.doubts = Doubts::default();
            }
            Self::Answered { leg, error } => endpoint_state.answers.note(leg, error),
            Self::Doubted { doubt, touches: since } => endpoint_state.doubts.add(doubt, touches.saturating_sub(since)),
            _ => {}
        }
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
                error: ErrorClass::of_code(code)
            }),
            prop::collection::vec(any::<u64>().prop_map(BlockHash), 0..9)
                .prop_map(|blocks| Event::Lacks { blocks: blocks.into() }),
            any::<(u8, u64)>().prop_map(|(doubt, touches)| Event::Doubted { doubt, touches }),
            Just(Event::Healed),
            Just(Event::Forgot),
            (0_u64..3, any::<u64>()).prop_map(|(fairness, tokens)| Event::Admitted { fairness, tokens }),
            (0_u64..3, any::<u64>()).prop_map(|(fairness, tokens)| Event::Released { fairness, tokens }),
            any::<[u64; 4]>().prop_map(|[work, tokens, requests, legs]| Event::BusyElsewhere {
                by: Totals { work, tokens, requests, legs }
            }),
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
            |((id, pool, arrival, fairness, bytes), tokens, key, priority, held)| WaitingRequest {
                id,
                pool,
                arrival: Monotonic::from_nanos(arrival),
                tokens,
                key,
                priority,
                fairness,
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
