//! Who is let in when a pool has as much as it may have: limits on what is in flight, less for those who can wait, and a
//! fair share for each.

use std::sync::Arc;

use hashbrown::HashMap;

use crate::metrics::Metric;

/// Share of a limit from which on there is pressure: sheddable requests wait, and everybody keeps to a fair share.
pub const PRESSURE: f64 = 0.8;

/// Limits of one pool at one worker. 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests in flight.
    pub requests: u64,
    /// KV tokens in flight: prompts and expected output.
    pub tokens: u64,
}

/// A request that wants in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// KV tokens.
    pub tokens: u64,
    /// Below 0: sheddable.
    pub priority: i64,
    /// Who asks: requests of one id share alike with those of another.
    pub fairness: u64,
}

/// Why a request is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shed {
    /// The pool has all it may have.
    Saturated,
    /// There is pressure, and the request is sheddable.
    Sheddable,
    /// There is pressure, and whoever asks has a fair share already.
    FairShare,
    /// The prompt cannot be computed by the time the client names.
    Deadline,
}

impl Shed {
    /// Reason code.
    #[must_use]
    pub fn code(self) -> &'static str {
        self.metric().name().rsplit('=').next().unwrap_or_default()
    }

    /// What counts it.
    #[must_use]
    pub fn metric(self) -> Metric {
        match self {
            Self::Saturated => Metric::ShedSaturated,
            Self::Sheddable => Metric::ShedSheddable,
            Self::FairShare => Metric::ShedFairShare,
            Self::Deadline => Metric::ShedDeadline,
        }
    }
}

/// A request that was let in, to be [released](Admission::release).
#[derive(Debug)]
pub struct Ticket {
    pool: Arc<str>,
    tokens: u64,
    fairness: u64,
}

/// What each pool with limits has in flight at this worker.
#[derive(Debug, Default)]
pub struct Admission {
    pools: HashMap<Arc<str>, InFlight>,
}

#[derive(Debug, Default)]
struct InFlight {
    requests: u64,
    tokens: u64,
    by_id: HashMap<u64, u64>,
}

impl Admission {
    /// Lets a request in, or says why not. A pool that has nothing takes any request, however large.
    ///
    /// # Errors
    /// [`Shed`]
    pub fn admit(&mut self, pool: &Arc<str>, limits: Limits, ask: Ask) -> Result<Ticket, Shed> {
        let has = self.pools.entry(Arc::clone(pool)).or_default();
        let share = |used: u64, limit: u64| if limit == 0 { 0.0 } else { used as f64 / limit as f64 };
        let requests = share(has.requests.saturating_add(1), limits.requests);
        let tokens = if has.requests == 0 { 0.0 } else { share(has.tokens.saturating_add(ask.tokens), limits.tokens) };
        let used = requests.max(tokens);
        let own = has.by_id.get(&ask.fairness).copied().unwrap_or(0);
        let asking = (has.by_id.len() as u64).saturating_add(u64::from(own == 0));
        let shed = if used > 1.0 {
            Some(Shed::Saturated)
        } else if used > PRESSURE && ask.priority < 0 {
            Some(Shed::Sheddable)
        } else if used > PRESSURE && asking > 1 && own.saturating_mul(asking) > has.requests {
            Some(Shed::FairShare)
        } else {
            None
        };
        if let Some(shed) = shed {
            return Err(shed);
        }
        has.requests = has.requests.saturating_add(1);
        has.tokens = has.tokens.saturating_add(ask.tokens);
        let own = has.by_id.entry(ask.fairness).or_default();
        *own = own.saturating_add(1);
        Ok(Ticket { pool: Arc::clone(pool), tokens: ask.tokens, fairness: ask.fairness })
    }

    /// A request that was let in is over.
    pub fn release(&mut self, ticket: Ticket) {
        let Some(has) = self.pools.get_mut(&ticket.pool) else { return };
        has.requests = has.requests.saturating_sub(1);
        has.tokens = has.tokens.saturating_sub(ticket.tokens);
        if let Some(own) = has.by_id.get_mut(&ticket.fairness) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                has.by_id.remove(&ticket.fairness);
            }
        }
        if has.requests == 0 {
            self.pools.remove(&ticket.pool);
        }
    }

    /// Whether nothing is in flight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pools.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits { requests: 10, tokens: 1_000 };

    fn ask(tokens: u64, priority: i64, fairness: u64) -> Ask {
        Ask { tokens, priority, fairness }
    }

    #[test]
    fn a_pool_takes_what_it_may_have_and_again_what_it_gives_back() {
        let (mut admission, pool) = (Admission::default(), Arc::from("p"));
        let mut admit = |tokens| admission.admit(&pool, LIMITS, ask(tokens, 0, 0));
        let tickets: Vec<_> = (0..10).map(|_| admit(1).unwrap()).collect();
        assert_eq!(admit(1).unwrap_err(), Shed::Saturated);
        for ticket in tickets {
            admission.release(ticket);
        }
        assert!(admission.is_empty());
        let huge = admission.admit(&pool, LIMITS, ask(5_000, 0, 0)).unwrap();
        assert_eq!(admission.admit(&pool, LIMITS, ask(1, 0, 0)).unwrap_err(), Shed::Saturated, "by tokens");
        admission.release(huge);
        assert!(admission.admit(&pool, LIMITS, ask(1, 0, 0)).is_ok());
    }

    #[test]
    fn sheddable_requests_and_large_shares_go_first() {
        let (mut admission, pool) = (Admission::default(), Arc::from("p"));
        let mut admit = |priority, id| admission.admit(&pool, LIMITS, ask(1, priority, id)).map(drop);
        for _ in 0..7 {
            assert_eq!(admit(0, 1), Ok(()));
        }
        assert_eq!(admit(-1, 2), Ok(()), "no pressure yet");
        assert_eq!(admit(-1, 2), Err(Shed::Sheddable));
        assert_eq!(admit(0, 1), Err(Shed::FairShare));
        assert_eq!((admit(0, 2), admit(0, 3)), (Ok(()), Ok(())), "those who have little");
        assert_eq!(admit(5, 4), Err(Shed::Saturated));
    }

    proptest! {
        #[test]
        fn whatever_happens_all_is_given_back(asks in prop::collection::vec((0_u64..400, -1_i64..2, 0_u64..4, any::<bool>()), 0..200)) {
            let (mut admission, pool): (_, Arc<str>) = (Admission::default(), Arc::from("p"));
            let mut tickets = Vec::new();
            for (tokens, priority, id, leaves) in asks {
                tickets.extend(admission.admit(&pool, LIMITS, ask(tokens, priority, id)).ok());
                prop_assert!(tickets.len() <= 10);
                if leaves && !tickets.is_empty() {
                    admission.release(tickets.swap_remove(0));
                }
            }
            tickets.into_iter().for_each(|ticket| admission.release(ticket));
            prop_assert!(admission.is_empty());
        }
    }
}
