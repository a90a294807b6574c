//! What a worker concludes from answers: an endpoint is ejected or trusted again, what it holds is forgotten.

use std::sync::Arc;

use crate::endpoints::health::Cause;
use crate::endpoints::outliers::{ErrorClass, Leg};
use crate::endpoints::table::EndpointRef;
use crate::metrics::Metric;
use crate::time::Monotonic;
use crate::workers::event::Event;
use crate::workers::worker::Worker;

/// Failed hand-overs in a row that eject a prefill endpoint.
const HANDOVERS_IN_A_ROW: u8 = 3;

/// Fewest tokens that an endpoint must be believed to hold for a comparison with what it says. Engines cache whole blocks,
/// and the tokens are an estimate.
pub(crate) const LEAST_BELIEF: f64 = 512.0;

/// Doubts at which what an endpoint holds is forgotten: three answers, or two where nothing was cached.
const MOST_DOUBTS: u8 = 3;

impl Worker {
    /// An endpoint could not be reached, or reset the connection.
    pub(crate) fn failed(&mut self, endpoint: EndpointRef, at: Monotonic) {
        self.eject(endpoint, Cause::Unreachable, at);
    }

    /// Another endpoint of the list answered in place of this one: Envoy's cluster does not have it. A warning where that
    /// begins.
    pub(crate) fn absent(&mut self, endpoint: EndpointRef, instead: &str, at: Monotonic) -> Option<String> {
        let state = self.state.table.resolve(endpoint)?;
        let is_known = matches!(state.health.ejection(), Some((Cause::Absent, _)));
        let address = Arc::clone(&state.address);
        self.eject(endpoint, Cause::Absent, at);
        (!is_known).then(|| {
            format!(
                "{address} is not in Envoy's cluster: {instead} answered. Compare the list's ports with the cluster's"
            )
        })
    }

    /// Envoy could not connect to an endpoint: no process listens there. The next one has an empty cache.
    pub(crate) fn failed_to_connect(&mut self, endpoint: EndpointRef, at: Monotonic) {
        let is_new = self.state.table.resolve(endpoint).is_some_and(|state| !state.health.is_failing());
        self.failed(endpoint, at);
        // Each request that was sent meanwhile left its prompt in the index.
        self.happens(endpoint, &Event::Forgot);
        if is_new {
            self.counts.count(Metric::CachesForgotten);
        }
    }

    /// A decode endpoint began its answer to a split request later than its KV lease: the client got an error. A warning
    /// where that begins.
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

    /// An endpoint says that it had `cached` tokens of a prompt of which it was believed to hold `believed`. What it was
    /// believed to hold and did not is counted. Several answers of which most was not there show a new process: what the
    /// endpoint holds is forgotten.
    pub(crate) fn judge_belief(&mut self, endpoint: EndpointRef, believed: f64, cached: u64) {
        if believed < LEAST_BELIEF {
            return;
        }
        let missing = (believed - cached as f64).max(0.0);
        self.counts.add(Metric::BelievedTokensMissing, missing as i64);
        let Some(state) = self.state.table.resolve(endpoint) else { return };
        let doubt = match missing * 2.0 > believed {
            // Not even the blocks that most prompts begin with.
            true if cached == 0 => 2,
            true => 1,
            false => {
                state.wrong_beliefs = 0;
                return;
            }
        };
        state.wrong_beliefs = state.wrong_beliefs.saturating_add(doubt);
        if state.wrong_beliefs >= MOST_DOUBTS {
            self.counts.count(Metric::CachesForgotten);
            self.happens(endpoint, &Event::Forgot);
        }
    }

    /// Ejects an endpoint for a pause.
    fn eject(&mut self, endpoint: EndpointRef, cause: Cause, at: Monotonic) {
        self.happens(endpoint, &Event::Failed { at, cause });
        self.room_changed();
    }

    /// Notes an answer for the comparison with the endpoint's peers. An error, and what follows errors, is an event: all
    /// workers judge by the same errors. An endpoint without errors costs the others nothing.
    fn note_answer(&mut self, endpoint: EndpointRef, leg: Leg, error: Option<ErrorClass>) {
        let Some(state) = self.state.table.resolve(endpoint) else { return };
        if error.is_some() || state.answers.has_errors(leg) {
            self.happens(endpoint, &Event::Answered { leg, error });
        } else {
            state.answers.note(leg, None);
        }
    }

    /// An endpoint answered. That is an event only where the endpoint had failed. An answer says nothing of a hand-over.
    pub(crate) fn answered(&mut self, endpoint: EndpointRef) {
        let ejection = self.state.table.resolve(endpoint).and_then(|state| state.health.ejection());
        if ejection.is_some_and(|(cause, _)| cause != Cause::Handover) {
            self.happens(endpoint, &Event::Healed);
            self.room_changed();
        }
    }

    /// A decode endpoint answered a request whose prompt the prefill endpoint computed; `failed`: with 5xx. Where that is so
    /// several times in a row, and the decode endpoint serves whole requests, the prefill endpoint's KV caches cannot be
    /// fetched: it is ejected, and requests are served whole if there is no other. A warning where that begins.
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

    /// An endpoint answered a leg, with an error of its own or without. The error ejects the endpoint where its peers do
    /// not answer the same, and keeps it ejected where the leg was the probe. The text is a warning for the operator, once
    /// per ejection.
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
        let state = self.state.table.resolve(endpoint)?;
        let (answers, health) = (state.answers, state.health);
        let cause = Cause::Outlier(class);
        if health.is_failing() {
            // Of legs that were sent before the ejection, nothing more is learnt.
            if health.is_probing() {
                let is_worse = answers.is_worse_than(leg, class, &self.state.table.peers(endpoint.index, leg, class));
                if is_worse { self.eject(endpoint, cause, now) } else { self.answered(endpoint) }
            }
            return None;
        }
        if !answers.is_suspect(leg, class) {
            return None;
        }
        let peers = self.state.table.peers(endpoint.index, leg, class);
        if !answers.is_worse_than(leg, class, &peers) || !peers.allow_ejection() {
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
