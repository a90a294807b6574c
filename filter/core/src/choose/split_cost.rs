//! Split or whole by cost: what a request waits, and what it makes others wait.
//!
//! All terms are seconds.
//!
//! ```text
//! split = Q + W + (w + q)·S + handover + move·missing + D
//! whole = W' + w'·S' + v·n·(S' − a) + D'      v = 1/2 + w − 1 + q, at most 3
//! ```
//!
//! | term | meaning |
//! |---|---|
//! | W, S, w | Work ahead of the prompt at the best prefill endpoint, seconds of the prompt there, [weight](super::weight) |
//! | W', S', w' | The same at a decode endpoint that computes the prompt itself |
//! | Q, q | Seconds of work, and requests, that wait in the gateway for each prefill endpoint; 0 without a queue |
//! | handover | [`HANDOVER_SECONDS`]: the second leg, and the step in which the decode endpoint makes the first token |
//! | missing | Tokens of the prompt that the decode endpoint lacks; `move` are the seconds of each, see [`DecodeCost`] |
//! | n | Streams at the decode endpoint. A step that computes a part of a prompt is longer by the time that this part takes. So each stream stands still for the whole time that the prompt's tokens take. |
//! | a | Seconds of a prompt without tokens. They are no computation that streams wait for. |
//! | v | Weight of a second of a stream. In an idle pool it is [`STREAM_SECOND`]. It grows as w does, by one for each request that comes behind: streams that stood still are there for longer, so more of them stand still when the next prompt comes. |
//! | D, D' | Time that the assigned tokens of the decode endpoint add to the answer, see [`DecodeCost`] |
//!
//! The request is served whole where `whole < split`, at the decode endpoint with the lowest `whole`. Costs are those of the
//! configuration until the endpoints' answers have shown others, so a pool whose engines report nothing has a rule as well.

use crate::choose::decode_cost::{DecodeCost, DecodeLoad};
use crate::choose::decode_profile::decode_load;
use crate::choose::prompt::Prompt;
use crate::choose::scheduler::{CostedPick, Pick, Scheduler};
use crate::choose::shortlist::{HOLDERS, legs_each};
use crate::endpoints::candidates::Candidates;
use crate::endpoints::endpoint_state::EndpointState;

/// Seconds that a hand-over takes beside the tokens that move: the second request (4 ms), and the decode endpoint's step
/// that makes the first token (8 ms). A server that computes the prompt itself makes that token with the prompt.
const HANDOVER_SECONDS: f64 = 0.012;

/// What a second of a stream counts for, where no other request is in flight. A client that waits for its first token has
/// nothing; a client of a stream has text to read. Chosen by `make sim-split` with the loads `code` and `documents`: with 1, first
/// tokens came later at a low load than if nothing is split; with 1/2 at every load, tokens took longer at a high load.
const STREAM_SECOND: f64 = 0.5;

/// Most that a second of a stream counts for. Without this bound, an overloaded pool serves hardly any prompt whole, while
/// its prefill queue grows.
const MOST_STREAM_SECOND: f64 = 3.0;

/// What waits in the gateway for each of the prefill endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ahead {
    /// Seconds of work, 0 or more.
    pub seconds: f64,
    /// Requests, 0 or more.
    pub requests: f64,
}

impl Scheduler<'_> {
    /// The endpoint that serves a request whole at less cost than a split with this prefill endpoint has; `None` where the
    /// split is cheaper or as cheap, or where no healthy endpoint serves whole requests.
    pub(super) fn cheaper_whole(
        &self,
        candidates: &Candidates,
        prompt: &Prompt,
        prefill: &CostedPick,
        ahead: Ahead,
    ) -> Option<Pick> {
        let mut endpoints = self.view().usable(&candidates.whole, prompt, &[]);
        endpoints.retain(|(_, state)| self.view().is_usable(state));
        let session = self.view().session_holder(&candidates.whole, prompt);
        // Where the endpoints are a sample of many, the holders of the prompt are not all among them.
        for index in self.index.holders(&prompt.hash.blocks, HOLDERS).into_iter().chain(session) {
            let suits =
                |state: &&EndpointState| self.view().is_among(&candidates.whole, state) && self.view().is_usable(state);
            let is_new = endpoints.iter().all(|(other, _)| *other != index);
            endpoints.extend(self.table.get(index).filter(suits).filter(|_| is_new).map(|state| (index, state)));
        }
        let legs_each = legs_each(&endpoints);
        let cost = DecodeCost::default();
        let behind = (prefill.weight - 1.0 + ahead.requests).max(0.0);
        let stream_weight = (STREAM_SECOND + behind).min(MOST_STREAM_SECOND);
        let mut hand_over = f64::INFINITY;
        let mut best: Option<(f64, Pick)> = None;
        for (index, state) in endpoints {
            let costed = self.cost(index, state, prompt, (false, session == Some(index)), legs_each);
            let load = self.decode_load_of(&costed, state, session == Some(index), prompt);
            hand_over = hand_over.min(cost.seconds(prompt.tokens, load));
            let stalled = streams(state) * self.token_seconds(state, prompt, load.held);
            let whole = costed.cost + stream_weight * stalled + cost.answer_seconds(load);
            if best.is_none_or(|(least, _)| whole < least) {
                best = Some((whole, costed.pick));
            }
        }
        let split = prefill.cost + ahead.seconds + ahead.requests * prefill.pick.seconds + HANDOVER_SECONDS + hand_over;
        best.filter(|(whole, _)| *whole < split).map(|(_, pick)| pick)
    }

    fn decode_load_of(
        &self,
        costed: &CostedPick,
        state: &EndpointState,
        is_session: bool,
        prompt: &Prompt,
    ) -> DecodeLoad {
        let held = if is_session { prompt.tokens } else { costed.pick.matched_tokens };
        DecodeLoad { assigned: decode_load(state), held, work: state.work(self.now), is_session }
    }

    /// Seconds that an endpoint computes tokens of a prompt of which it holds `held`.
    fn token_seconds(&self, state: &EndpointState, prompt: &Prompt, held: f64) -> f64 {
        let cost = self.prefill_cost(state);
        (cost.seconds(prompt.tokens, held) - cost.a).max(0.0)
    }
}

/// Requests at an endpoint that get tokens. A request that the endpoint computes is counted as a prefill leg too.
fn streams(state: &EndpointState) -> f64 {
    (state.decode_requests() - state.prefill_legs()).max(0.0)
}

#[cfg(test)]
mod tests {
    use crate::choose::decider::{Schedule, WholeReason};
    use crate::choose::scheduler::tests::{Fixture, fixture, prompt};
    use crate::choose::split_cost::{Ahead, streams};
    use crate::endpoints::elsewhere::Totals;
    use crate::endpoints::health::Cause;

    const BY_COST: &str = r#"{"pools":{"default":{"split":{"mode":"cost"},"fit":false}}}"#;

    impl Fixture {
        /// Streams of so many tokens each at the n-th decode endpoint.
        fn streams(&mut self, n: usize, count: u64, tokens: u64) {
            let key = self.table.get(self.candidates.decode[n]).unwrap().key;
            self.table.busy_elsewhere(key, Totals { requests: count, tokens: count * tokens, ..Totals::default() });
        }

        fn is_whole_at(&self, blocks: u64) -> Option<usize> {
            self.is_whole_behind(blocks, Ahead::default())
        }

        /// The decode endpoint that serves a prompt whole; `None`: it is split.
        fn is_whole_behind(&self, blocks: u64, ahead: Ahead) -> Option<usize> {
            match self.scheduler().schedule_behind(&self.candidates, &prompt(1, blocks), ahead) {
                Schedule::Split(_) => None,
                Schedule::Whole(pick, WholeReason::Cheaper) => {
                    self.candidates.decode.iter().position(|index| *index == pick.endpoint)
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn an_idle_decode_endpoint_serves_whole_and_streams_beside_the_prompt_split_it() {
        let mut fixture = fixture(2, 1, BY_COST);
        assert_eq!(fixture.is_whole_at(40), Some(0), "a hand-over gains nothing");
        fixture.streams(0, 1, 0);
        // A stream stands still for as long as the tokens take: 128 tokens take 3 ms, 6,144 take 170 ms.
        assert_eq!(fixture.is_whole_at(1), Some(0), "less than the hand-over");
        assert_eq!(fixture.is_whole_at(40), None);
    }

    #[test]
    fn a_queue_at_the_prefill_endpoints_is_weighed_against_the_streams() {
        let mut fixture = fixture(2, 2, BY_COST);
        [0, 1].into_iter().for_each(|n| fixture.streams(n, 4, 0));
        assert_eq!(fixture.is_whole_at(40), None);
        // Four streams lose 173 ms each, and count half.
        for (seconds, is_whole) in [(0.25, false), (0.4, true)] {
            let ahead = Ahead { seconds, requests: 0.0 };
            assert_eq!(fixture.is_whole_behind(40, ahead).is_some(), is_whole, "{seconds} s wait in the gateway");
        }
        let ahead = Ahead { seconds: 0.4, requests: 1.0 };
        assert_eq!(fixture.is_whole_behind(40, ahead), None, "streams weigh more where requests come behind");
        fixture.candidates.prefill.clone().into_iter().for_each(|index| fixture.busy(index, 3.0));
        assert!(fixture.is_whole_at(40).is_some(), "the same at the endpoints");
    }

    #[test]
    fn the_endpoint_with_the_fewest_streams_or_most_of_the_prompt_serves_whole() {
        let mut fixture = fixture(1, 3, BY_COST);
        fixture.busy(fixture.candidates.prefill[0], 60.0);
        for (n, streams) in [3, 1, 2].into_iter().enumerate() {
            fixture.streams(n, streams, 0);
        }
        assert_eq!(fixture.is_whole_at(40), Some(1));
        let holder = fixture.candidates.decode[2];
        fixture.index.insert(holder, &prompt(1, 40).hash.blocks);
        assert_eq!(fixture.is_whole_at(40), Some(2));
        let now = fixture.scheduler().now;
        fixture.table.get_mut(holder).unwrap().health.failed(Cause::Unreachable, now);
        assert_eq!(fixture.is_whole_at(40), Some(1), "no prompt goes to an ejected endpoint for its prefix");
    }

    #[test]
    fn a_prompt_that_a_decode_endpoint_computes_is_no_stream() {
        let mut fixture = fixture(1, 1, BY_COST);
        fixture.streams(0, 3, 0);
        let decode = fixture.candidates.decode[0];
        for left in [3.0, 2.0, 1.0, 0.0, 0.0] {
            assert_eq!(streams(fixture.table.get(decode).unwrap()), left);
            fixture.busy(decode, 1.0);
        }
    }
}
