//! Readiness under load: an engine that computes long prompts answers its readiness probe late, so most servers of a role
//! can turn unready at once while all of them work.

use std::collections::{BTreeMap, BTreeSet};

use pd_core::wire::{Endpoint, EndpointId, State};

use crate::list::role;
use crate::sources::kubernetes::pod::{Pod, PodName};

/// An endpoint and its pod.
pub struct Owned<'a> {
    /// The pod.
    pub name: &'a PodName,
    /// The pod as it was read.
    pub pod: &'a Pod,
    /// The endpoint, in the state of its pod.
    pub endpoint: Endpoint,
}

/// A run of a pod's containers.
type Run = (PodName, u64);

/// The endpoints that have been ready in the present run of their containers.
#[derive(Debug, Default)]
pub struct Readiness {
    seen_ready: BTreeMap<EndpointId, Run>,
}

impl Readiness {
    /// Sets busy endpoints to ready again. Endpoints are busy if, of those of their pool and role that were
    /// ready before, more than half and at least two are unready now. Returns one line for each such pool and role.
    ///
    /// An endpoint whose containers have ended or restarted is not busy. An endpoint whose pod is being deleted is not
    /// busy.
    pub fn settle(&mut self, all: &mut [Owned<'_>]) -> Vec<String> {
        let present: BTreeSet<_> = all.iter().map(|it| it.endpoint.id()).collect();
        self.seen_ready.retain(|id, _| present.contains(id));
        let mut roles: BTreeMap<(String, &str), (Vec<usize>, usize)> = BTreeMap::new();
        for (index, it) in all.iter().enumerate() {
            let (id, run) = (it.endpoint.id(), (it.name.clone(), it.pod.restarts));
            if it.endpoint.state == State::Ready {
                self.seen_ready.insert(id, run.clone());
            }
            if self.seen_ready.get(&id) != Some(&run) || it.pod.state == State::Draining {
                continue;
            }
            let (busy, known) = roles.entry((it.endpoint.pool.clone(), role(it.endpoint.role))).or_default();
            *known += 1;
            let is_unready = it.pod.state == State::Down && it.pod.is_running && !it.is_taken_out();
            if it.endpoint.state == State::Down && is_unready {
                busy.push(index);
            }
        }
        let mut lines = Vec::new();
        for ((pool, role), (busy, known)) in roles {
            // A single unready endpoint shows nothing about the others.
            if busy.len() < 2 || busy.len() * 2 <= known {
                continue;
            }
            lines.push(format!(
                "{} of {known} {role} endpoints of pool {pool} are unready at once. They count as busy and stay in the \
                 list. If requests wait, add servers; if they fail, look at the engines' readiness probes",
                busy.len()
            ));
            for index in busy {
                if let Some(it) = all.get_mut(index) {
                    it.endpoint.state = State::Ready;
                }
            }
        }
        lines
    }
}

impl Owned<'_> {
    /// Whether an annotation takes the endpoint out of service.
    fn is_taken_out(&self) -> bool {
        let state = format!("{}state", super::annotations::ANNOTATION_PREFIX);
        self.pod.annotations.get(&state).is_some_and(|state| state != "ready")
    }
}

#[cfg(test)]
mod tests {
    use pd_core::wire::Role;

    use super::*;

    const READY: (State, bool, u64) = (State::Ready, true, 0);
    const UNREADY: (State, bool, u64) = (State::Down, true, 0);

    /// The states in the list of pods with these states, running containers and restarts.
    fn settle(readiness: &mut Readiness, pods: &[(State, bool, u64)]) -> (Vec<State>, usize) {
        let pods: Vec<_> =
            pods.iter().map(|(state, is_running, restarts)| pod(*state, *is_running, *restarts)).collect();
        let names: Vec<_> = (0..pods.len()).map(|n| PodName { namespace: "n".into(), name: n.to_string() }).collect();
        let mut all: Vec<_> = (1_u8..)
            .zip(pods.iter().zip(&names))
            .map(|(n, (pod, name))| {
                let endpoint = Endpoint { state: pod.state, ..Endpoint::new(([10, 0, 0, n], 80).into(), Role::Decode) };
                Owned { name, pod, endpoint }
            })
            .collect();
        let lines = readiness.settle(&mut all);
        (all.iter().map(|it| it.endpoint.state).collect(), lines.len())
    }

    fn pod(state: State, is_running: bool, restarts: u64) -> Pod {
        Pod { state, is_running, restarts, ..Pod::default() }
    }

    #[test]
    fn most_of_a_role_that_turn_unready_at_once_stay_and_a_few_do_not() {
        use State::{Down, Ready};
        let mut readiness = Readiness::default();
        assert_eq!(settle(&mut readiness, &[READY; 4]), (vec![Ready; 4], 0));
        assert_eq!(settle(&mut readiness, &[UNREADY, READY, READY, READY]), (vec![Down, Ready, Ready, Ready], 0));
        assert_eq!(settle(&mut readiness, &[UNREADY, UNREADY, READY, READY]).0, [Down, Down, Ready, Ready]);
        assert_eq!(settle(&mut readiness, &[UNREADY, UNREADY, UNREADY, READY]), (vec![Ready; 4], 1));
        assert_eq!(settle(&mut readiness, &[UNREADY; 4]), (vec![Ready; 4], 1));
        assert_eq!(settle(&mut readiness, &[READY; 4]), (vec![Ready; 4], 0));
    }

    #[test]
    fn an_endpoint_that_was_never_ready_or_whose_containers_ended_is_not_busy() {
        use State::{Down, Draining, Ready};
        let mut readiness = Readiness::default();
        assert_eq!(settle(&mut readiness, &[UNREADY; 2]), (vec![Down; 2], 0));
        settle(&mut readiness, &[READY; 2]);
        for dead in [(Down, false, 0), (Down, true, 1), (Draining, true, 0)] {
            assert_eq!(settle(&mut readiness, &[dead; 2]), (vec![dead.0; 2], 0), "{dead:?}");
            settle(&mut readiness, &[READY; 2]);
        }
        assert_eq!(settle(&mut readiness, &[UNREADY, (Down, true, 1)]), (vec![Down; 2], 0));
        settle(&mut readiness, &[READY; 3]);
        assert_eq!(settle(&mut readiness, &[UNREADY, UNREADY, (Down, true, 1)]), (vec![Ready, Ready, Down], 1));
    }

    #[test]
    fn an_endpoint_that_an_annotation_takes_out_is_out() {
        let names = [1, 2, 3].map(|n| PodName { namespace: "n".into(), name: n.to_string() });
        let mut readiness = Readiness::default();
        let mut states = |pods: &[Pod]| {
            let all = names.iter().zip(pods).zip(1_u8..).map(|((name, pod), n)| {
                let endpoint = Endpoint { state: pod.state, ..Endpoint::new(([10, 0, 0, n], 80).into(), Role::Decode) };
                Owned { name, pod, endpoint }
            });
            let mut all: Vec<_> = all.collect();
            readiness.settle(&mut all);
            all.iter().map(|it| it.endpoint.state).collect::<Vec<_>>()
        };
        let mut pods = vec![pod(State::Ready, true, 0); 3];
        assert_eq!(states(&pods), [State::Ready; 3]);
        pods.iter_mut().for_each(|pod| pod.state = State::Down);
        pods[0].annotations.insert("envoy-pd/state".into(), "down".into());
        assert_eq!(states(&pods), [State::Down, State::Ready, State::Ready]);
    }
}
