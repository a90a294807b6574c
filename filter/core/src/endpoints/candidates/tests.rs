use super::*;
use crate::endpoints::table::tests::{Fixture, endpoint};
use proptest::prelude::*;

#[test]
fn roles_and_models_decide_who_is_a_candidate() {
    let mut down = endpoint(5, Role::Decode, &["m"]);
    down.state = State::Draining;
    let fixture = Fixture::new(vec![
        endpoint(1, Role::Prefill, &["m"]),
        endpoint(2, Role::Decode, &["m", "n"]),
        Endpoint { pool: "other".into(), ..endpoint(3, Role::Both, &[]) },
        endpoint(4, Role::Decode, &["n"]),
        down,
    ]);
    let m = fixture.table.candidates("m").unwrap();
    assert_eq!((fixture.ports(&m.prefill), fixture.ports(&m.decode)), (vec![1], vec![2]));
    assert_eq!((fixture.ports(&m.whole), fixture.ports(&m.compute)), (vec![2], vec![1]));
    let n = fixture.table.candidates("n").unwrap();
    assert_eq!((fixture.ports(&n.decode), fixture.ports(&n.whole)), (vec![2, 4], vec![2, 4]));
    assert_eq!(fixture.ports(&fixture.table.candidates("other").unwrap().whole), [3]);
    assert_eq!(fixture.table.model_names(), ["m", "n"]);
    assert_eq!(fixture.ports(fixture.table.without_model()), [2, 3, 4]);
}

#[test]
fn an_endpoint_that_has_not_said_its_models_waits_where_others_of_its_pool_have() {
    let pending = |port, role| Endpoint { models_pending: true, ..endpoint(port, role, &[]) };
    let fixture = Fixture::new(vec![
        endpoint(1, Role::Prefill, &["m"]),
        endpoint(2, Role::Decode, &["m"]),
        pending(3, Role::Prefill),
        pending(4, Role::Decode),
        endpoint(5, Role::Both, &[]),
    ]);
    let m = fixture.table.candidates("m").unwrap();
    assert_eq!((fixture.ports(&m.prefill), fixture.ports(&m.whole)), (vec![1], vec![2]));
    assert_eq!(fixture.table.candidates("x"), Err(NoCandidates::UnknownModel));
    assert!(fixture.table.names_all_models());
}

#[test]
fn an_endpoint_that_has_not_said_its_models_serves_where_no_other_could() {
    let mut draining = endpoint(1, Role::Both, &["m"]);
    draining.state = State::Draining;
    let pending = Endpoint { models_pending: true, ..endpoint(2, Role::Both, &[]) };
    let fixture = Fixture::new(vec![draining.clone(), pending]);
    assert_eq!(fixture.ports(&fixture.table.candidates("m").unwrap().whole), [2], "a roll-out of one server");
    assert!(fixture.table.names_all_models(), "the list does not change meanwhile");
    let fixture = Fixture::new(vec![draining, endpoint(2, Role::Both, &[])]);
    assert!(!fixture.table.names_all_models(), "without an answer of its engine, it may serve any model");
    let fixture = Fixture::new(vec![endpoint(1, Role::Decode, &["m"]), endpoint(2, Role::Prefill, &[])]);
    let m = fixture.table.candidates("m").unwrap();
    assert_eq!((fixture.ports(&m.prefill), fixture.ports(&m.decode)), (vec![2], vec![1]), "other work");
}

#[test]
fn a_prefill_endpoint_whose_group_cannot_generate_is_no_candidate() {
    let grouped = |port, role, group: &str| Endpoint { group: Some(group.into()), ..endpoint(port, role, &[]) };
    let mut down = grouped(4, Role::Decode, "b");
    down.state = State::Draining;
    let fixture = Fixture::new(vec![
        grouped(1, Role::Prefill, "a"),
        grouped(2, Role::Prefill, "b"),
        grouped(3, Role::Decode, "a"),
        down,
        endpoint(5, Role::Prefill, &[]),
    ]);
    assert_eq!(fixture.ports(&fixture.table.candidates("m").unwrap().prefill), [1, 5]);
}

#[test]
fn a_prefill_endpoint_whose_engine_no_decode_endpoint_has_is_no_candidate() {
    let of = |port, role, engine| Endpoint { engine: Some(engine), ..endpoint(port, role, &[]) };
    let grouped = |port, role, engine, group: &str| Endpoint { group: Some(group.into()), ..of(port, role, engine) };
    let fixture = Fixture::new(vec![
        of(1, Role::Prefill, Engine::VllmNixl),
        of(2, Role::Prefill, Engine::Sglang),
        of(3, Role::Both, Engine::Sglang),
        of(4, Role::Decode, Engine::VllmNixl),
        grouped(5, Role::Prefill, Engine::Mooncake, "a"),
        grouped(6, Role::Decode, Engine::VllmNixl, "a"),
        grouped(7, Role::Decode, Engine::Mooncake, "b"),
    ]);
    let mut candidates = Candidates::clone(&fixture.table.candidates("m").unwrap());
    assert_eq!((fixture.ports(&candidates.prefill), fixture.ports(&candidates.compute)), (vec![1], vec![1, 3]));
    // Of a subset too.
    let is = |index, port| fixture.table.get(index).unwrap().endpoint.address.port() == port;
    candidates.retain(|index| is(index, 1) || is(index, 7), |index| fixture.table.get(index));
    assert_eq!((fixture.ports(&candidates.prefill), fixture.ports(&candidates.decode)), (vec![], vec![7]));
}

#[test]
fn prompts_go_to_endpoints_whose_bounds_have_room_while_there_are_some() {
    let bounded =
        |port, role, min, max| Endpoint { min_prompt_tokens: min, max_prompt_tokens: max, ..endpoint(port, role, &[]) };
    let fixture = Fixture::new(vec![
        bounded(1, Role::Prefill, None, Some(2_000)),
        bounded(2, Role::Prefill, Some(2_000), Some(8_000)),
        bounded(3, Role::Decode, None, Some(8_000)),
        bounded(4, Role::Both, Some(2_001), None),
    ]);
    let candidates = fixture.table.candidates("m").unwrap();
    let sets = |tokens: f64| {
        let Candidates { prefill, decode, whole, compute, partners, .. } =
            &*fixture.table.with_room(Arc::clone(&candidates), tokens);
        let partners = partners.values().next().unwrap();
        [prefill, decode, whole, compute, partners].map(|set| fixture.ports(set))
    };
    assert_eq!(sets(100.0), [vec![1], vec![3], vec![3], vec![1], vec![3]]);
    assert_eq!(sets(2_000.0), [vec![1, 2], vec![3], vec![3], vec![1, 2], vec![3]]);
    assert_eq!(sets(5_000.0), [vec![2], vec![3], vec![3, 4], vec![2, 4], vec![3]]);
    // Of those that take a prefill leg or a decode leg nobody has room, so all are candidates.
    assert_eq!(sets(1e9), [vec![1, 2], vec![3], vec![4], vec![4], vec![3]]);
    let unbounded = Fixture::new(vec![endpoint(1, Role::Both, &[])]);
    let candidates = unbounded.table.candidates("m").unwrap();
    assert!(Arc::ptr_eq(&unbounded.table.with_room(Arc::clone(&candidates), 1.0), &candidates));
}

proptest! {
    #[test]
    fn a_set_keeps_those_with_room_or_all(list in prop::collection::vec((0_u8..3, 0_u64..4, 0_u64..4), 1..12), tokens in 0.0..6.0) {
        let endpoints = (1_u16..).zip(&list).map(|(port, (role, min, over))| Endpoint {
            min_prompt_tokens: Some(*min).filter(|min| *min > 0),
            max_prompt_tokens: Some(min + over).filter(|_| *over < 3),
            ..endpoint(port, [Role::Prefill, Role::Decode, Role::Both][usize::from(*role)], &[])
        });
        let fixture = Fixture::new(endpoints.collect());
        let takes = |index: &EndpointIndex| fixture.table.get(*index).unwrap().endpoint.takes_prompt(tokens);
        let before = fixture.table.candidates("m").unwrap();
        let after = fixture.table.with_room(Arc::clone(&before), tokens);
        let (mut before, mut after) = (Candidates::clone(&before), Candidates::clone(&after));
        for (set, kept) in before.sets().into_iter().zip(after.sets()) {
            let fitting: Vec<_> = set.iter().copied().filter(takes).collect();
            prop_assert_eq!(kept, if fitting.is_empty() { set } else { &fitting });
        }
    }
}
