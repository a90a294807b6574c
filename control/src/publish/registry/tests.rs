use pd_core::wire::{Role, State, Stated};
use proptest::prelude::*;

use super::*;

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

fn endpoint(n: u8, weight: f64) -> Endpoint {
    Endpoint { weight, ..Endpoint::new(([10, 0, 0, n], 8000).into(), Role::Both) }
}

fn list(numbers: impl IntoIterator<Item = u8>) -> EndpointList {
    EndpointList::new(numbers.into_iter().map(|n| endpoint(n, 1.0)).collect()).unwrap()
}

fn advance(published: &Published, list: EndpointList) -> Published {
    published.advance(list, NOW).unwrap().0
}

/// A filter, reduced to its table.
#[derive(Default)]
struct Follower {
    epoch: String,
    version: u64,
    table: BTreeMap<String, Endpoint>,
}

impl Follower {
    fn poll(&mut self, published: &Published) {
        let Some(bytes) = published.answer(&self.epoch, self.version) else {
            assert_eq!(self.version, published.version());
            return;
        };
        let snapshot = Snapshot::parse(&bytes).unwrap();
        match snapshot.base {
            None => self.table.clear(),
            Some(base) => assert_eq!(base, self.version),
        }
        for id in &snapshot.removed {
            assert!(self.table.remove(id).is_some(), "{id} was never announced");
        }
        self.table.extend(snapshot.endpoints.into_iter().map(|endpoint| (endpoint.id().to_string(), endpoint)));
        (self.epoch, self.version) = (snapshot.epoch, snapshot.version);
    }

    fn list(&self) -> EndpointList {
        EndpointList::new(self.table.values().cloned().collect()).unwrap()
    }
}

#[test]
fn a_first_list_is_version_one_even_when_empty() {
    let nothing = Published::nothing("e", NOW);
    assert_eq!(nothing.snapshot("other", 7), None, "without a list nobody is answered");
    let first = advance(&nothing, list([]));
    assert_eq!(first.version(), 1);
    let snapshot = first.snapshot("", 0).unwrap();
    assert_eq!((snapshot.base, snapshot.endpoints.len()), (None, 0));
}

#[test]
fn equal_content_in_another_order_is_no_change() {
    let first = advance(&Published::nothing("e", NOW), list([1, 2]));
    assert!(first.advance(list([2, 1]), NOW).is_none());
}

#[test]
fn a_change_counts_what_it_touched() {
    let first = advance(&Published::nothing("e", NOW), list([1, 2, 3]));
    let next = EndpointList::new(vec![endpoint(1, 1.0), endpoint(3, 2.0), endpoint(4, 1.0), endpoint(5, 1.0)]);
    let (_, change) = first.advance(next.unwrap(), NOW).unwrap();
    assert_eq!(change, Change { total: 4, added: 2, changed: 1, removed: 1 });
    assert_eq!(change.to_string(), "4 endpoints (+2 -1 ~1)");
}

#[test]
fn another_epoch_or_a_version_of_the_future_gets_the_whole_list() {
    let second = advance(&advance(&Published::nothing("e", NOW), list([1, 2, 3])), list([1, 2, 3, 4]));
    assert_eq!(second.snapshot("e", 1).unwrap().base, Some(1));
    assert_eq!(second.snapshot("e", 2), None);
    for (epoch, since) in [("e", 0), ("e", 3), ("e", u64::MAX), ("f", 1), ("f", 2), ("", 0)] {
        let whole = second.snapshot(epoch, since).unwrap();
        assert_eq!((whole.base, whole.endpoints.len()), (None, 4), "{epoch} {since}");
    }
}

#[test]
fn a_delta_that_is_not_shorter_gives_way_to_the_whole_list() {
    let second = advance(&advance(&Published::nothing("e", NOW), list([1, 2])), list([3, 4]));
    assert_eq!(second.snapshot("e", 1).unwrap().base, None);
}

#[test]
fn the_history_is_bounded_and_older_versions_get_the_whole_list() {
    let mut published = advance(&Published::nothing("e", NOW), list(0..100));
    for round in 0..1_000_u32 {
        let mut next = published.endpoints().to_vec();
        next[0].state = if round % 2 == 0 { State::Draining } else { State::Ready };
        published = advance(&published, EndpointList::new(next).unwrap());
    }
    assert_eq!(published.history.len(), HISTORY_IDS);
    assert_eq!(published.snapshot("e", 1).unwrap().base, None);
    assert_eq!(published.snapshot("e", 990).unwrap().base, Some(990));
}

#[test]
fn cards_go_out_when_they_change_and_stay_when_their_endpoints_leave() {
    let serving = |n: u8, model: &str| Endpoint { models: vec![model.to_owned()], ..endpoint(n, 1.0) };
    let with =
        |endpoints: Vec<Endpoint>, cards: &[ModelCard]| EndpointList::new(endpoints).unwrap().with_cards(cards.iter());
    let card = |id: &str, len| ModelCard { max_model_len: Some(len), ..ModelCard::new(id) };
    let both = || vec![serving(1, "m"), serving(2, "n"), serving(3, "n"), serving(4, "label-only")];
    let first = advance(&Published::nothing("e", NOW), with(both(), &[card("m", 8), card("n", 8), card("n", 4)]));
    assert_eq!(first.snapshot("", 0).unwrap().models, [card("m", 8), card("n", 4)]);
    assert!(first.advance(with(both(), &[card("n", 4), card("m", 8)]), NOW).is_none());
    let second = advance(&first, with(both(), &[card("m", 2), card("n", 4)]));
    let delta = second.snapshot("e", 1).unwrap();
    assert_eq!((delta.base, delta.endpoints.len(), delta.models), (Some(1), 0, vec![card("m", 2)]));
    let third = advance(&second, with(both()[1..3].to_vec(), &[card("n", 4)]));
    let gone = ModelCard::new("label-only");
    assert_eq!(third.snapshot("", 0).unwrap().models, [gone, card("m", 2), card("n", 4)]);
}

#[test]
fn what_objects_state_goes_out_when_it_changes() {
    let with = |priority: i64| {
        let objectives = [("batch".to_owned(), priority)].into();
        list([1, 2, 3]).with_stated(Stated { objectives, ..Stated::default() }).unwrap()
    };
    let nothing = advance(&Published::nothing("e", NOW), list([1, 2, 3]));
    assert_eq!(nothing.snapshot("", 0).unwrap().stated, None);
    let first = advance(&nothing, with(1));
    assert!(first.advance(with(1), NOW).is_none());
    let delta = first.snapshot("e", 1).unwrap();
    assert_eq!((delta.base, delta.endpoints.len()), (Some(1), 0));
    assert_eq!(delta.stated.as_ref(), Some(with(1).stated()));
    let second = advance(&first, list([1, 2, 3]));
    assert_eq!(second.snapshot("e", 2).unwrap().stated, Some(Stated::default()), "nothing any more");
    let third = advance(&second, list([1, 2, 4]));
    assert_eq!(third.snapshot("e", 3).unwrap().stated, None, "no change");
}

#[test]
fn cards_of_models_that_left_are_bounded() {
    let mut published = Published::nothing("e", NOW);
    for n in 0..6_u32 {
        let models = (0..1_000).map(|m| format!("{n}-{m:04}")).collect();
        let list = EndpointList::new(vec![Endpoint { models, ..endpoint(1, 1.0) }]).unwrap();
        published = advance(&published, list);
    }
    let snapshot = published.snapshot("", 0).unwrap();
    assert_eq!(snapshot.models.len(), MAX_CARDS);
    assert!(snapshot.models.iter().any(|card| card.id == "4-0000"), "{:?}", snapshot.models.first());
    assert_eq!(snapshot.validate(), Ok(()));
}

#[test]
fn an_answer_is_encoded_once() {
    let first = advance(&Published::nothing("e", NOW), list([1]));
    let (one, other) = (first.answer("x", 0).unwrap(), first.answer("y", 9).unwrap());
    assert_eq!(one.as_ptr(), other.as_ptr());
}

proptest! {
    #[test]
    fn following_the_answers_equals_the_whole_list(
        lists in prop::collection::vec(prop::collection::btree_map(0_u8..24, 1_u8..4, 0..20), 1..24),
        polls in prop::collection::vec(prop::bool::ANY, 24),
    ) {
        let mut published = Published::nothing("e", NOW);
        let (mut every, mut some) = (Follower::default(), Follower::default());
        for (map, does_poll) in lists.into_iter().zip(polls) {
            let endpoints = map.into_iter().map(|(n, weight)| endpoint(n, weight.into())).collect();
            let list = EndpointList::new(endpoints).unwrap();
            if let Some((next, _)) = published.advance(list.clone(), NOW) {
                prop_assert_eq!(next.version(), published.version() + 1);
                published = next;
            } else {
                prop_assert_eq!(published.endpoints(), list.as_slice());
            }
            every.poll(&published);
            prop_assert_eq!(every.list(), list.clone());
            if does_poll {
                some.poll(&published);
                prop_assert_eq!(some.list(), list);
            }
        }
        some.poll(&published);
        let list = some.list();
        prop_assert_eq!(list.as_slice(), published.endpoints());
    }
}
