use super::*;
use crate::config::Config;
use crate::prefix::hash::BlockHash;
use crate::prefix::index::PrefixIndex;
use crate::wire::{Endpoint, Role, Stated};
use proptest::prelude::*;
use std::collections::BTreeMap;

pub(crate) fn endpoint(port: u16, role: Role, models: &[&str]) -> Endpoint {
    let models = models.iter().map(|model| (*model).to_owned()).collect();
    Endpoint { models, ..Endpoint::new(([10, 0, 0, 1], port).into(), role) }
}

pub(crate) fn whole(version: u64, endpoints: Vec<Endpoint>) -> Snapshot {
    Snapshot {
        wire: 1,
        epoch: "e".into(),
        version,
        base: None,
        endpoints,
        removed: vec![],
        models: vec![],
        stated: None,
    }
}

pub(crate) struct Fixture {
    pub(crate) table: Table,
    index: PrefixIndex,
    config: Config,
}

impl Fixture {
    pub(crate) fn new(endpoints: Vec<Endpoint>) -> Self {
        let mut new =
            Self { table: Table::default(), index: PrefixIndex::new(1 << 20), config: Config::parse(b"").unwrap() };
        assert_eq!(new.apply(&whole(1, endpoints)), Applied::Changed);
        new
    }

    pub(crate) fn apply(&mut self, snapshot: &Snapshot) -> Applied {
        self.table.apply(snapshot, &self.config, &mut self.index)
    }

    pub(crate) fn ports(&self, indexes: &[EndpointIndex]) -> Vec<u16> {
        let mut ports: Vec<u16> =
            indexes.iter().map(|index| self.table.get(*index).unwrap().endpoint.address.port()).collect();
        ports.sort_unstable();
        ports
    }
}

#[test]
fn what_the_cluster_states_stays_until_a_list_says_otherwise() {
    let stated = |priority| Stated { objectives: [("batch".to_owned(), priority)].into(), ..Stated::default() };
    let list = vec![endpoint(1, Role::Both, &[])];
    let mut fixture = Fixture::new(list.clone());
    let change = |version, stated| Snapshot { base: Some(version - 1), stated, ..whole(version, vec![]) };
    fixture.apply(&change(2, Some(stated(1))));
    fixture.apply(&change(3, None));
    assert_eq!(fixture.table.stated(), &stated(1));
    assert_eq!(fixture.table.snapshot().stated, Some(stated(1)), "for the other workers");
    fixture.apply(&change(4, Some(stated(2))));
    assert_eq!(fixture.table.stated(), &stated(2));
    fixture.apply(&whole(5, list));
    assert_eq!((fixture.table.stated(), fixture.table.snapshot().stated), (&Stated::default(), None));
}

#[test]
fn candidates_are_in_the_order_of_their_keys_not_of_their_arrival() {
    let ports = 1..40;
    let named = |port: u16| match port % 3 {
        0 => endpoint(port, Role::Both, &["m"]),
        _ => endpoint(port, Role::Prefill, &[]),
    };
    let mut fixture = Fixture::new(ports.clone().map(named).collect());
    let change = |version, removed: &[u16], added: Vec<u16>| Snapshot {
        base: Some(version - 1),
        removed: removed.iter().map(|port| named(*port).id().to_string()).collect(),
        ..whole(version, added.into_iter().map(named).collect())
    };
    fixture.apply(&change(2, &[3, 7, 9], vec![]));
    fixture.apply(&change(3, &[], vec![9, 60, 61]));
    for model in ["m", "other"] {
        let candidates = fixture.table.candidates(model).unwrap();
        let key = |index: &EndpointIndex| fixture.table.get(*index).unwrap().key;
        assert!(candidates.compute.is_sorted_by_key(key));
        let mut all = candidates.compute.clone();
        all.dedup();
        assert_eq!(all.len(), if model == "m" { 39 - 3 + 3 } else { 39 - 13 - 1 + 1 });
    }
}

#[test]
fn an_unknown_model_and_a_model_that_is_down_differ() {
    let mut down = endpoint(1, Role::Decode, &["m"]);
    down.state = State::Down;
    let fixture = Fixture::new(vec![down, endpoint(2, Role::Decode, &["n"])]);
    assert_eq!(fixture.table.candidates("m"), Err(NoCandidates::NoEndpoint));
    assert_eq!(fixture.table.candidates("x"), Err(NoCandidates::UnknownModel));
    assert_eq!(Table::default().candidates("m"), Err(NoCandidates::NoEndpoint));
}

#[test]
fn endpoints_that_stay_keep_their_state() {
    let (a, b) = (endpoint(1, Role::Both, &[]), endpoint(2, Role::Both, &[]));
    let mut fixture = Fixture::new(vec![a.clone(), b.clone()]);
    let index = fixture.table.find(a.id()).unwrap();
    fixture.table.get_mut(index).unwrap().decode.add(7);
    fixture.index.insert(index, &[BlockHash(1)]);
    let kept = fixture.table.refer(index).unwrap();
    let left = fixture.table.refer(fixture.table.find(b.id()).unwrap()).unwrap();
    let c = endpoint(3, Role::Both, &[]);
    assert_eq!(fixture.apply(&whole(2, vec![c.clone(), Endpoint { weight: 2.0, ..a.clone() }])), Applied::Changed);
    assert_eq!(fixture.table.resolve(kept).unwrap().decode.tokens, 7);
    assert_eq!(fixture.table.resolve(kept).unwrap().endpoint.weight, 2.0);
    assert_eq!(fixture.index.matched(index, &[BlockHash(1)]), 1);
    assert!(fixture.table.resolve(left).is_none(), "its place was taken by another endpoint");
    assert_eq!(fixture.table.len(), 2);
}

#[test]
fn versions_decide_what_is_applied() {
    let (a, b) = (endpoint(1, Role::Both, &[]), endpoint(2, Role::Both, &[]));
    let mut fixture = Fixture::new(vec![a.clone()]);
    assert_eq!(fixture.apply(&whole(1, vec![b.clone()])), Applied::Unchanged);
    let change = |base, version| Snapshot { base: Some(base), ..whole(version, vec![b.clone()]) };
    assert_eq!(fixture.apply(&change(5, 6)), Applied::OutOfStep);
    assert_eq!(fixture.apply(&change(1, 2)), Applied::Changed);
    assert_eq!(fixture.apply(&change(1, 2)), Applied::Unchanged);
    assert_eq!(fixture.apply(&Snapshot { epoch: "f".into(), ..change(2, 3) }), Applied::OutOfStep);
    assert_eq!(fixture.table.len(), 2);
    assert_eq!(fixture.apply(&Snapshot { epoch: "f".into(), ..whole(1, vec![]) }), Applied::Empty);
    assert_eq!(fixture.table.len(), 2, "an empty list leaves the last good one in force");
    assert_eq!(fixture.apply(&Snapshot { epoch: "f".into(), ..whole(1, vec![b]) }), Applied::Changed);
    assert_eq!(fixture.table.len(), 1);
    assert_eq!(fixture.table.version(), ("f", 1));
}

#[test]
fn a_model_whose_endpoints_left_is_known_and_another_is_not() {
    let mut fixture = Fixture::new(vec![endpoint(1, Role::Both, &["m"]), endpoint(2, Role::Both, &["n"])]);
    fixture.apply(&whole(2, vec![endpoint(2, Role::Both, &["n"])]));
    assert_eq!(fixture.table.candidates("m"), Err(NoCandidates::NoEndpoint));
    assert_eq!(fixture.table.candidates("x"), Err(NoCandidates::UnknownModel));
    assert_eq!(fixture.table.model_names(), ["n"]);
    let mut late = Fixture::new(vec![endpoint(3, Role::Both, &["o"])]);
    late.apply(&Snapshot { epoch: "f".into(), ..fixture.table.snapshot() });
    assert_eq!(late.table.candidates("m"), Err(NoCandidates::NoEndpoint), "a new worker learns it from the list");
}

#[test]
fn a_new_run_of_pd_control_takes_no_models_away_before_it_asked() {
    let pending = |models: &[&str]| Endpoint { models_pending: true, ..endpoint(1, Role::Both, models) };
    let mut fixture = Fixture::new(vec![endpoint(1, Role::Both, &["m", "lora"])]);
    let list = |epoch: &str, endpoint| Snapshot { epoch: epoch.into(), ..whole(1, vec![endpoint]) };
    fixture.apply(&list("f", pending(&["m", "n"])));
    assert_eq!(fixture.table.model_names(), ["lora", "m", "n"]);
    assert_eq!(fixture.table.snapshot().endpoints[0].models, ["m", "n", "lora"]);
    fixture.apply(&list("g", Endpoint { pool: "other".into(), ..pending(&["n"]) }));
    assert_eq!(fixture.table.model_names(), ["n"], "another server has the address");
    fixture.apply(&list("h", endpoint(1, Role::Both, &["m"])));
    assert_eq!(fixture.table.model_names(), ["m"], "the engine has answered its models");
}

proptest! {
    #[test]
    fn changes_lead_to_the_same_table_as_the_whole_list(lists in prop::collection::vec(prop::collection::btree_map(1_u16..12, 0_u8..3, 1..8), 1..8)) {
        let make = |list: &BTreeMap<u16, u8>| -> Vec<Endpoint> {
            let role = |n: &u8| [Role::Prefill, Role::Decode, Role::Both][*n as usize];
            list.iter().map(|(port, n)| endpoint(*port, role(n), if port % 2 == 0 { &["m"] } else { &[] })).collect()
        };
        let mut fixture = Fixture::new(make(&lists[0]));
        for (version, pair) in (2..).zip(lists.windows(2)) {
            let (before, after) = (make(&pair[0]), make(&pair[1]));
            let change = Snapshot {
                base: Some(version - 1),
                removed: before.iter().filter(|old| !after.iter().any(|new| new.id() == old.id())).map(|old| old.id().to_string()).collect(),
                ..whole(version, after.iter().filter(|new| !before.contains(new)).cloned().collect())
            };
            fixture.apply(&change);
            let rebuilt = Fixture::new(after);
            for model in ["m", "other"] {
                let sorted = |fixture: &Fixture| {
                    // A list alone does not separate a model that is gone from one that never existed.
                    let set = fixture.table.candidates(model).ok()?;
                    Some((fixture.ports(&set.prefill), fixture.ports(&set.decode)))
                };
                prop_assert_eq!(sorted(&fixture), sorted(&rebuilt));
            }
        }
    }
}
