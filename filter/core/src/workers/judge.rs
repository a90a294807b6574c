//! What a worker concludes from answers: whether an endpoint is ejected or trusted again, and whether its cache is lost.

use std::sync::Arc;

use crate::endpoints::beliefs::{Belief, Doubts};
use crate::endpoints::health::Cause;
use crate::endpoints::outliers::{ErrorClass, Leg};
use crate::endpoints::table::EndpointRef;
use crate::metrics::Metric;
use crate::prefix::hash::BlockHash;
use crate::prefix::index::EndpointIndex;
use crate::time::Monotonic;
use crate::workers::event::Event;
use crate::workers::worker::Worker;

/// Failed hand-overs in a row that eject a prefill endpoint.
const HANDOVERS_IN_A_ROW: u8 = 3;

/// Streams of one endpoint that a worker reads at a time for what was cached: as many as are needed to forget what the
/// endpoint held. The filter need not look at the tokens of the others.
const MOST_STREAMS_READ: u8 = 3;

impl Worker {
    /// An endpoint could not be reached, or reset the connection.
    pub(crate) fn failed(&mut self, endpoint: EndpointRef, at: Monotonic) {
        self.served.note(endpoint.key, |sums| sums.errors = sums.errors.saturating_add(1));
        self.eject(endpoint, Cause::Unreachable, at);
    }

    /// Envoy went to the host `instead` in place of this endpoint, so Envoy's cluster lacks this endpoint. Returns a warning the
    /// first time.
    pub(crate) fn absent(&mut self, endpoint: EndpointRef, instead: &str, at: Monotonic) -> Option<String> {
        let state = self.state.table.resolve(endpoint)?;
        let is_known = matches!(state.health.ejection(), Some((Cause::Absent, _)));
        let (address, port) = (Arc::clone(&state.address), state.endpoint.address.port());
        self.eject(endpoint, Cause::Absent, at);
        let cluster = self.config.as_ref().map_or("", |config| config.cluster.as_str());
        (!is_known).then(|| {
            format!(
                "{address} is not in Envoy's cluster {cluster}: Envoy went to {instead}. If the ports differ: the Service behind \
                 that cluster must lead to port {port}"
            )
        })
    }

    /// Envoy could not connect to an endpoint: no process listens there. The next process has an empty cache.
    pub(crate) fn failed_to_connect(&mut self, endpoint: EndpointRef, at: Monotonic) {
        let is_new = self.state.table.resolve(endpoint).is_some_and(|state| !state.health.is_failing());
        self.failed(endpoint, at);
        // The index also has the prompts of the requests that were sent in the meantime.
        self.happens(endpoint, &Event::Forgot);
        if is_new {
            self.counts.count(Metric::CachesForgotten);
        }
    }

    /// A decode endpoint began its answer to a split request later than its KV lease, and the client got an error. Returns
    /// a warning the first time.
    pub(crate) fn answered_late(&mut self, decode: EndpointRef) -> Option<String> {
        self.counts.count(Metric::LateRefused);
        let state = self.state.table.resolve(decode)?;
        let begins = !core::mem::replace(&mut state.answers_late, true);
        begins.then(|| {
            format!(
                "{} began an answer later than its KV lease (`pools.NAME.kv_lease_ms`): the client got an error, because \
                 the text may be wrong. It stood still, or is overloaded",
                state.address
            )
        })
    }

    /// A decode endpoint began its answer to a split request within its KV lease.
    pub(crate) fn answered_in_time(&mut self, decode: EndpointRef) {
        if let Some(state) = self.state.table.resolve(decode) {
            state.answers_late = false;
        }
    }

    /// What an endpoint is believed to hold of a prompt, of which it is chosen as holding so many tokens by the index. Call it
    /// before the prompt goes there.
    pub(crate) fn belief(&self, endpoint: EndpointIndex, blocks: &[BlockHash], tokens: f64) -> Belief {
        let index = &self.state.index;
        let doubts = self.state.table.get(endpoint).map_or_else(Doubts::default, |state| state.doubts);
        let is_fresh = doubts.exist() && {
            let last = index.matched(endpoint, blocks).checked_sub(1).and_then(|last| blocks.get(last));
            let fresh = doubts.fresh_blocks(index.touches(endpoint));
            last.is_some_and(|last| index.is_among_newest(endpoint, *last, fresh))
        };
        Belief { tokens, is_fresh, touches: index.touches(endpoint) }
    }

    /// An endpoint says that it had `cached` tokens of a prompt of which it was believed to hold some. What it was believed to
    /// hold and did not is counted. Several answers of which most was not there show a new process: what the endpoint holds is
    /// forgotten. All workers have the same doubts.
    pub(crate) fn judge_belief(&mut self, endpoint: EndpointRef, belief: Belief, cached: u64) {
        if !belief.can_be_judged() {
            return;
        }
        self.counts.add(Metric::BelievedTokensMissing, belief.missing(cached) as i64);
        let Some(state) = self.state.table.resolve(endpoint) else { return };
        let had_doubts = state.doubts.exist();
        let Some(doubt) = belief.doubt(cached).filter(|doubt| *doubt > 0 || had_doubts) else { return };
        let touches = self.state.index.touches(endpoint.index).saturating_sub(belief.touches);
        self.happens(endpoint, &Event::Doubted { doubt, touches });
        if self.state.table.resolve(endpoint).is_some_and(|state| state.doubts.are_enough()) {
            self.counts.count(Metric::CachesForgotten);
            self.happens(endpoint, &Event::Forgot);
        }
    }

    /// Takes one of the places for streams of an endpoint that are read for what was cached; `None` where none is free.
    pub(crate) fn start_to_read(&mut self, endpoint: EndpointIndex) -> Option<EndpointRef> {
        let state = self.state.table.get_mut(endpoint).filter(|state| state.streams_read < MOST_STREAMS_READ)?;
        state.streams_read = state.streams_read.saturating_add(1);
        self.state.table.refer(endpoint)
    }

    /// Gives that place back.
    pub(crate) fn end_to_read(&mut self, endpoint: EndpointRef) {
        if let Some(state) = self.state.table.resolve(endpoint) {
            state.streams_read = state.streams_read.saturating_sub(1);
        }
    }

    /// Ejects an endpoint for a pause.
    fn eject(&mut self, endpoint: EndpointRef, cause: Cause, at: Monotonic) {
        self.happens(endpoint, &Event::Failed { at, cause });
        self.room_changed();
    }

    /// Notes an answer for the comparison with the endpoint's peers. An error, and an answer after errors, is an event, so
    /// all workers judge by the same errors. An endpoint without errors makes no events.
    fn note_answer(&mut self, endpoint: EndpointRef, leg: Leg, error: Option<ErrorClass>) {
        let Some(state) = self.state.table.resolve(endpoint) else { return };
        if error.is_some() || state.answers.has_errors(leg) {
            self.happens(endpoint, &Event::Answered { leg, error });
        } else {
            state.answers.note(leg, None);
        }
    }

    /// An endpoint answered. That is an event only if the endpoint had failed. It does not heal a prefill endpoint that is
    /// ejected for failed hand-overs.
    pub(crate) fn answered(&mut self, endpoint: EndpointRef) {
        let ejection = self.state.table.resolve(endpoint).and_then(|state| state.health.ejection());
        if ejection.is_some_and(|(cause, _)| cause != Cause::Handover) {
            self.happens(endpoint, &Event::Healed);
            self.room_changed();
        }
    }

    /// A decode endpoint answered a split request; `failed`: with 5xx.
    ///
    /// After several failures in a row, while the decode endpoint serves whole requests, the KV caches of the prefill
    /// endpoint cannot be fetched. The prefill endpoint is then ejected. If no other prefill endpoint is left, requests are
    /// served whole. Returns a warning the first time.
    pub(crate) fn judge_handover(
        &mut self,
        prefill: EndpointRef,
        decode: EndpointRef,
        failed: bool,
        now: Monotonic,
    ) -> Option<String> {
        let decodes_alone = self
            .state
            .table
            .resolve(decode)
            .is_some_and(|state| state.engine.protocol().decodes_alone && !state.fails_whole);
        let state = self.state.table.resolve(prefill)?;
        let is_ejected = matches!(state.health.ejection(), Some((Cause::Handover, _)));
        if !failed || !decodes_alone {
            state.failed_handovers = 0;
            if is_ejected {
                self.happens(prefill, &Event::Healed);
            }
            return None;
        }
        state.failed_handovers = state.failed_handovers.saturating_add(1);
        let is_probe = is_ejected && state.health.is_probing();
        if state.failed_handovers < HANDOVERS_IN_A_ROW || (is_ejected && !is_probe) {
            return None;
        }
        let address = Arc::clone(&state.address);
        self.eject(prefill, Cause::Handover, now);
        if is_ejected {
            return None;
        }
        self.counts.count(Metric::OutliersHandover);
        Some(format!(
            "{address} {}. Prompts are computed elsewhere until a probe succeeds. A restarted server with a fixed engine_id \
             does this; restart the decode servers, or take the engine_id out",
            Cause::Handover.text()
        ))
    }

    /// An endpoint answered a leg, with an error of its own or without.
    ///
    /// - The error ejects the endpoint if its peers do not answer the same error.
    /// - The error keeps the endpoint ejected if the leg was the probe.
    ///
    /// Returns a warning for the operator, once per ejection.
    pub(crate) fn judge_answer(
        &mut self,
        endpoint: EndpointRef,
        leg: Leg,
        error: Option<ErrorClass>,
        now: Monotonic,
    ) -> Option<String> {
        self.note_answer(endpoint, leg, error);
        let Some(class) = error else {
            self.answered(endpoint);
            return None;
        };
        self.served.note(endpoint.key, |sums| sums.errors = sums.errors.saturating_add(1));
        let state = self.state.table.resolve(endpoint)?;
        let (answers, health) = (state.answers, state.health);
        let cause = Cause::Outlier(class);
        if health.is_failing() {
            // Of legs that were sent before the ejection, nothing more is learnt.
            if health.is_probing() {
                let peers = self.state.table.peers(endpoint.index, leg, class);
                if answers.is_worse_than(leg, class, &peers) || answers.is_hopeless(leg, class, &peers) {
                    self.eject(endpoint, cause, now)
                } else {
                    self.answered(endpoint)
                }
            }
            return None;
        }
        if !answers.is_suspect(leg, class) {
            return None;
        }
        let peers = self.state.table.peers(endpoint.index, leg, class);
        let is_outlier = answers.is_worse_than(leg, class, &peers) && peers.allow_ejection();
        if !is_outlier && !answers.is_hopeless(leg, class, &peers) {
            return None;
        }
        self.eject(endpoint, cause, now);
        self.counts.count(match class {
            ErrorClass::Server => Metric::OutliersServer,
            ErrorClass::Overload => Metric::OutliersOverload,
            ErrorClass::Refusal => Metric::OutliersRefusal,
        });
        let address = &self.state.table.get(endpoint.index)?.address;
        Some(format!("{address} {}: it is ejected until a probe succeeds", cause.text()))
    }
}
