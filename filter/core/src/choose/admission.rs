//! Admission: whether a pool with limits lets a request in. A pool under pressure sheds sheddable requests, and requests
//! whose fairness id has its fair share in flight already.

use hashbrown::HashMap;

use crate::config::Limits;
use crate::endpoints::load::Load;
use crate::metrics::Metric;

/// Part of a limit in flight beyond which a pool is under pressure.
pub const PRESSURE: f64 = 0.8;

/// A request that a pool may let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// KV tokens: the prompt and the expected output.
    pub tokens: u64,
    /// Priority; below 0: sheddable.
    pub priority: i64,
    /// Hash of the fairness id.
    pub fairness: u64,
}

/// Why a request is shed. The filter answers 429.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shed {
    /// The request would exceed the pool's limit.
    Saturated,
    /// The pool is under pressure, and the request is sheddable.
    Sheddable,
    /// The pool is under pressure, and the request's fairness id has its fair share in flight.
    FairShare,
    /// No endpoint can compute the prompt by the client's deadline.
    Deadline,
}

impl Shed {
    /// Reason code.
    #[must_use]
    pub fn code(self) -> &'static str {
        self.metric().name().rsplit('=').next().unwrap_or_default()
    }

    /// Counter of requests that were shed for this reason.
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

/// Key of a pool in events. All workers compute the same one.
#[must_use]
pub fn pool_key(name: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64(name.as_bytes())
}

/// What each pool with limits has in flight, from all workers of this Envoy.
#[derive(Debug, Default)]
pub struct Admission {
    pools: HashMap<u64, InFlight>,
}

#[derive(Debug, Default)]
struct InFlight {
    all: Load,
    /// By fairness id.
    by_id: HashMap<u64, Load>,
}

impl Admission {
    /// Whether a pool lets a request in. If it does, the caller [adds](Self::add) the request.
    ///
    /// - A limit of 0 is no limit.
    /// - A pool with nothing in flight lets any request in, however large.
    ///
    /// # Errors
    /// [`Shed`]: why the pool sheds the request.
    pub fn check(&self, pool: u64, limits: Limits, ask: Ask) -> Result<(), Shed> {
        let Some(has) = self.pools.get(&pool) else { return Ok(()) };
        let share = |used: u64, limit: u64| if limit == 0 { 0.0 } else { used as f64 / limit as f64 };
        let requests = u64::from(has.all.requests);
        let by_requests = share(requests.saturating_add(1), limits.requests);
        let by_tokens = share(has.all.tokens.saturating_add(ask.tokens), limits.tokens);
        let used = by_requests.max(by_tokens);
        let own = has.by_id.get(&ask.fairness).map_or(0, |own| u64::from(own.requests));
        let asking = (has.by_id.len() as u64).saturating_add(u64::from(own == 0));
        if used > 1.0 {
            Err(Shed::Saturated)
        } else if used > PRESSURE && ask.priority < 0 {
            Err(Shed::Sheddable)
        } else if used > PRESSURE && asking > 1 && own.saturating_mul(asking) > requests {
            Err(Shed::FairShare)
        } else {
            Ok(())
        }
    }

    /// Adds `load` to what a pool has in flight for the fairness id with the hash `id`.
    pub fn add(&mut self, pool: u64, id: u64, load: &Load) {
        let has = self.pools.entry(pool).or_default();
        has.all.merge(load);
        has.by_id.entry(id).or_default().merge(load);
    }

    /// Takes back what was [added](Self::add). A pool or an id with nothing in flight stays as it is.
    pub fn subtract(&mut self, pool: u64, id: u64, load: &Load) {
        let Some(has) = self.pools.get_mut(&pool) else { return };
        has.all.subtract(load);
        if let Some(own) = has.by_id.get_mut(&id) {
            own.subtract(load);
            if own.requests == 0 {
                has.by_id.remove(&id);
            }
        }
        if has.by_id.is_empty() {
            self.pools.remove(&pool);
        }
    }

    /// Whether no pool has anything in flight.
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
    const POOL: u64 = 1;

    fn admit(admission: &mut Admission, tokens: u64, priority: i64, fairness: u64) -> Result<(), Shed> {
        admission.check(POOL, LIMITS, Ask { tokens, priority, fairness })?;
        admission.add(POOL, fairness, &Load { tokens, requests: 1 });
        Ok(())
    }

    #[test]
    fn a_pool_takes_what_it_may_have_and_again_what_it_gives_back() {
        let mut admission = Admission::default();
        (0..10).for_each(|_| admit(&mut admission, 1, 0, 0).unwrap());
        assert_eq!(admit(&mut admission, 1, 0, 0), Err(Shed::Saturated));
        admission.subtract(POOL, 0, &Load { tokens: 10, requests: 10 });
        assert!(admission.is_empty());
        assert_eq!(admit(&mut admission, 5_000, 0, 0), Ok(()));
        assert_eq!(admit(&mut admission, 1, 0, 0), Err(Shed::Saturated), "by tokens");
        admission.subtract(POOL, 0, &Load { tokens: 5_000, requests: 1 });
        assert_eq!(admit(&mut admission, 1, 0, 0), Ok(()));
    }

    #[test]
    fn sheddable_requests_and_large_shares_go_first() {
        let mut admission = Admission::default();
        let mut admit = |priority, id| admit(&mut admission, 1, priority, id);
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
            let mut admission = Admission::default();
            let mut taken = Vec::new();
            for (tokens, priority, id, leaves) in asks {
                if admit(&mut admission, tokens, priority, id).is_ok() {
                    taken.push((tokens, id));
                }
                prop_assert!(taken.len() <= 10);
                if leaves && !taken.is_empty() {
                    let (tokens, id) = taken.swap_remove(0);
                    admission.subtract(POOL, id, &Load { tokens, requests: 1 });
                }
            }
            taken.into_iter().for_each(|(tokens, id)| admission.subtract(POOL, id, &Load { tokens, requests: 1 }));
            prop_assert!(admission.is_empty());
        }
    }
}
