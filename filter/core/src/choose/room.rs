//! What the queue needs to know of endpoints: the work that each has left, what each holds of a prompt, and whether a decode
//! endpoint has room for its KV cache.

use core::time::Duration;

use crate::choose::prompt::Prompt;
use crate::choose::queue::{Held, PrefillEndpoint, Room};
use crate::choose::scheduler::Scheduler;
use crate::choose::shortlist::HOLDERS;
use crate::config::Cost;
use crate::endpoints::endpoint_state::EndpointState;
use crate::endpoints::load::Left;
use crate::prefix::index::EndpointIndex;

/// Room for KV caches at the decode endpoints together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct DecodeRoom {
    /// Tokens that fit at the decode endpoint that has most room; infinite where any number fits.
    most: f64,
    /// Tokens that fit at all of them.
    all: f64,
    /// Prefill legs in flight. Their KV caches will need room, too.
    legs: f64,
    /// Mean tokens of the assigned requests; `None`: no request is assigned.
    tokens_each: Option<f64>,
}

impl Default for DecodeRoom {
    /// Room for everything.
    fn default() -> Self {
        Self { most: f64::INFINITY, all: f64::INFINITY, legs: 0.0, tokens_each: None }
    }
}

impl DecodeRoom {
    /// Whether a request of so many tokens fits, with those that are in prefill legs now.
    #[must_use]
    pub(crate) fn fits(&self, tokens: f64) -> bool {
        self.most == f64::INFINITY
            || tokens <= self.most && tokens + self.legs * self.tokens_each.unwrap_or(tokens) <= self.all
    }
}

impl Scheduler<'_> {
    /// Room for KV caches at these decode endpoints, behind the prefill legs that `prefill` has in flight.
    ///
    /// - An endpoint without a known cache size has room for everything.
    /// - So has an endpoint without requests, while there are more of those than prefill legs in flight. The engine
    ///   refuses a request that is larger than its cache; it does not have to wait for that.
    /// - Without a healthy decode endpoint there is room, because nothing is to be waited for.
    #[must_use]
    pub(crate) fn decode_room(&self, decode: &[EndpointIndex], prefill: &[EndpointIndex]) -> DecodeRoom {
        let everything = DecodeRoom::default();
        let percent = self.pool.queue.decode_kv_percent;
        let state = |index: &EndpointIndex| self.table.get(*index);
        let mut healthy = decode.iter().filter_map(state).filter(|state| self.view().is_usable(state)).peekable();
        if percent == 0 || healthy.peek().is_none() {
            return everything;
        }
        let (mut room, mut idle) = (DecodeRoom { most: 0.0, all: 0.0, ..everything }, 0.0);
        let (mut assigned, mut requests) = (0.0, 0.0);
        for state in healthy {
            let Some(cache_tokens) = state.endpoint.cache_tokens else { return everything };
            let tokens = state.decode_tokens() as f64;
            let free = (cache_tokens as f64 * f64::from(percent) / 100.0 - tokens).max(0.0);
            room.most = room.most.max(free);
            room.all += free;
            assigned += tokens;
            requests += state.decode_requests();
            idle += if tokens == 0.0 { 1.0 } else { 0.0 };
        }
        room.legs = prefill.iter().filter_map(state).map(EndpointState::prefill_legs).sum();
        if room.legs < idle {
            return everything;
        }
        room.tokens_each = (requests > 0.0).then(|| assigned / requests);
        room
    }

    /// What an endpoint has left to do. `waited` is the wait of the oldest waiting request.
    ///
    /// Work of other Envoys counts as begun. `waited` is subtracted from it. An Envoy learns of the end of its own legs
    /// first, so without the subtraction one Envoy could always bind its own requests first. With it, a request that has
    /// waited as long as that work takes gets an endpoint at which this Envoy has nothing in flight.
    #[must_use]
    fn left(&self, state: &EndpointState, cost: &Cost, waited: Duration) -> Left {
        let fixed = if self.pool.queue.batch_tokens == 0 { 0.0 } else { cost.a };
        let own = state.prefill.left(fixed, self.now);
        let elsewhere = (state.elsewhere_seconds() - waited.as_secs_f64()).max(0.0);
        Left { begun: own.begun + elsewhere, ..own }
    }

    /// An endpoint as the queue sees it.
    fn prefill_endpoint(&self, index: EndpointIndex, state: &EndpointState, waited: Duration) -> PrefillEndpoint {
        let cost = self.prefill_cost(state);
        PrefillEndpoint { index, key: state.key, left: self.left(state, &cost, waited), cost }
    }

    /// Whether an endpoint has room for a prompt of so many seconds that has come now.
    #[must_use]
    pub(crate) fn has_room(&self, endpoint: EndpointIndex, seconds: f64) -> bool {
        let state = self.table.get(endpoint);
        let endpoint = state.map(|state| self.prefill_endpoint(endpoint, state, Duration::ZERO));
        endpoint.is_some_and(|endpoint| Room::of(&self.pool.queue).is_at(&endpoint, seconds))
    }

    /// The healthy ones of `among`, ordered by index; all of them where none is healthy.
    #[must_use]
    pub(crate) fn prefill_endpoints(&self, among: &[EndpointIndex], waited: Duration) -> Vec<PrefillEndpoint> {
        let endpoint = |index, state| self.prefill_endpoint(index, state, waited);
        let states = || among.iter().filter_map(|index| Some((*index, self.table.get(*index)?)));
        let healthy = states().filter(|(_, state)| self.view().is_usable(state));
        let mut endpoints: Vec<PrefillEndpoint> = healthy.map(|(index, state)| endpoint(index, state)).collect();
        if endpoints.is_empty() {
            endpoints = states().map(|(index, state)| endpoint(index, state)).collect();
        }
        endpoints.sort_unstable_by_key(|endpoint| endpoint.index);
        endpoints.dedup_by_key(|endpoint| endpoint.index);
        endpoints
    }

    /// What these endpoints hold of a prompt. The endpoint of its session counts as holding all.
    #[must_use]
    pub(crate) fn held(&self, among: &[EndpointIndex], prompt: &Prompt) -> Vec<Held> {
        let is_among =
            |index: &EndpointIndex| self.table.get(*index).is_some_and(|state| self.view().is_among(among, state));
        let session = self.view().session_holder(among, prompt);
        let holders = self.index.holders(&prompt.hash.blocks, HOLDERS).into_iter().filter(is_among);
        let held = holders.filter(|index| session != Some(*index));
        let held = held.map(|endpoint| Held { endpoint, tokens: self.matched_tokens(endpoint, prompt) });
        session.map(|endpoint| Held { endpoint, tokens: prompt.tokens }).into_iter().chain(held).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::choose::room::DecodeRoom;
    use crate::choose::scheduler::tests::{Fixture, fixture};

    /// Two prefill and two decode endpoints with room for 1,000 and 2,000 tokens.
    fn two_and_two(config: &str) -> Fixture {
        let mut fixture = fixture(2, 2, config);
        for (index, tokens) in fixture.candidates.decode.clone().into_iter().zip([1_000, 2_000]) {
            fixture.table.get_mut(index).unwrap().endpoint.cache_tokens = Some(tokens);
        }
        fixture
    }

    impl Fixture {
        fn room(&self) -> DecodeRoom {
            self.scheduler().decode_room(&self.candidates.decode, &self.candidates.prefill)
        }

        fn assign(&mut self, n: usize, tokens: u64) {
            self.table.get_mut(self.candidates.decode[n]).unwrap().decode.add(tokens);
        }
    }

    #[test]
    fn a_request_fits_where_one_endpoint_has_room_for_it() {
        let mut fixture = two_and_two("");
        assert!(fixture.room().fits(1e9), "it is the engine that refuses what its whole cache cannot hold");
        fixture.assign(0, 500);
        fixture.assign(1, 900);
        assert!(fixture.room().fits(1_100.0) && !fixture.room().fits(1_101.0));
        fixture.assign(1, 9_999);
        assert!(fixture.room().fits(500.0) && !fixture.room().fits(501.0));
        fixture.assign(0, 500);
        assert!(!fixture.room().fits(1.0));
    }

    #[test]
    fn legs_in_flight_will_need_room_too() {
        let mut fixture = two_and_two("");
        fixture.busy(fixture.candidates.prefill[0], 1.0);
        assert!(fixture.room().fits(1e9), "one leg for two idle endpoints");
        fixture.busy(fixture.candidates.prefill[1], 1.0);
        assert!(fixture.room().fits(1_000.0) && !fixture.room().fits(1_001.0), "three requests of 1,000 tokens");
        // Requests have 600 tokens each: 400 and 1,400 are free, and two legs will take 1,200 of them.
        fixture.assign(0, 600);
        fixture.assign(1, 600);
        assert!(fixture.room().fits(600.0) && !fixture.room().fits(601.0));
    }

    #[test]
    fn an_endpoint_of_unknown_size_and_a_pool_without_the_rule_have_room() {
        let mut fixture = two_and_two(r#"{"pools":{"default":{"queue":{"decode_kv_percent":0}}}}"#);
        [0, 1].into_iter().for_each(|n| fixture.assign(n, 5_000));
        assert!(fixture.room().fits(1.0));
        let mut fixture = two_and_two(r#"{"pools":{"default":{"queue":{"decode_kv_percent":150}}}}"#);
        [0, 1].into_iter().for_each(|n| fixture.assign(n, 1_400));
        assert!(fixture.room().fits(1_600.0) && !fixture.room().fits(1_601.0));
        fixture.table.get_mut(fixture.candidates.decode[0]).unwrap().endpoint.cache_tokens = None;
        assert!(fixture.room().fits(1e9));
    }
}
