//! Several Envoys and one hub, on one clock.

use core::time::Duration;

use hashbrown::HashMap;
use proptest::prelude::*;

use super::client::{CallKind, ExchangeCall, ExchangeClient, TICK};
use super::hub::{GATEWAY_LIFE, Hub};
use super::message::{ExchangeRequest, MAX_MESSAGE_BYTES, Record};
use super::outside::EngineReport;
use super::report::{self, MAX_REPORT_BYTES};
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::table::EndpointRef;
use crate::prefix::block_log::block_event;
use crate::prefix::hash::BlockHash;
use crate::time::{Clocks, Monotonic, UnixTime};
use crate::wire::Role;
use crate::workers::shared::testing::Store;
use crate::workers::waits::Parked;
use crate::workers::worker::Worker;

const CONFIG: &[u8] = br#"{"control":{"cluster":"pd-control"},"endpoints":[{"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.1:2","role":"prefill"},{"address":"10.0.0.2:1","role":"decode"}]}"#;
const FAR: Monotonic = Monotonic::from_secs(3_600);

struct Gateway {
    worker: Worker,
    exchange: ExchangeClient,
    /// A question that waits.
    question: Option<ExchangeCall>,
}

impl Gateway {
    fn new(id: u64, now: Monotonic) -> Self {
        let mut worker = Worker::default();
        let config = worker.configure(CONFIG).unwrap();
        worker.start_log(id);
        let mut exchange = ExchangeClient::default();
        exchange.configure(&mut worker, config.control.as_ref());
        assert!(exchange.should_lead(true));
        exchange.lead(&mut worker, id, 0, now);
        Self { worker, exchange, question: None }
    }

    fn endpoint(&self, place: usize) -> EndpointRef {
        let mut all: Vec<_> =
            self.worker.state.table.iter().map(|(endpoint, state)| (state.address.clone(), endpoint)).collect();
        all.sort();
        self.worker.state.table.refer(all[place % all.len()].1).unwrap()
    }

    /// What is in flight at a place, from everywhere.
    fn view(&self, place: usize, now: Monotonic) -> (u64, u64) {
        let state = self.worker.state.table.get(self.endpoint(place).index).unwrap();
        ((state.work(now) * 1e6).round() as u64, state.decode_tokens())
    }

    /// Prefill legs at a place, from everywhere.
    fn legs(&self, place: usize) -> f64 {
        self.worker.state.table.get(self.endpoint(place).index).unwrap().prefill_legs()
    }

    /// A tick with this hub; without one every call fails.
    fn tick(&mut self, hub: Option<&mut Hub>, now: Monotonic) {
        let report = |worker: &Worker| {
            let clocks = Clocks { monotonic: now, unix: UnixTime::default() };
            report::Report::of(worker, Vec::new(), Vec::new(), Parked::default(), Vec::new(), clocks).to_json()
        };
        let calls = self.exchange.tick(&mut self.worker, true, now, report);
        let Some(hub) = hub else {
            for call in calls.into_iter().chain(self.question.take()) {
                self.exchange.failed(&mut self.worker, call.kind, now);
            }
            return;
        };
        for call in calls.into_iter().chain(self.question.take()) {
            let request = ExchangeRequest::from_bytes(&call.body).unwrap();
            hub.take(&request, 0, now);
            if call.kind == CallKind::Receive && !hub.has_news(&request) {
                self.question = Some(call);
                continue;
            }
            let response = hub.answer(&request, 0).to_bytes();
            self.exchange.answered(&mut self.worker, call.kind, Some(200), &response, now);
        }
        self.worker.pending.take();
    }
}

fn settle(gateways: &mut [Gateway], hub: &mut Hub, now: &mut Monotonic, ticks: u32) {
    for _ in 0..ticks {
        *now += TICK;
        hub.prune(*now);
        gateways.iter_mut().for_each(|gateway| gateway.tick(Some(hub), *now));
    }
}

fn fleet(count: u64, hub: &mut Hub, now: &mut Monotonic) -> Vec<Gateway> {
    let mut gateways: Vec<_> = (1..=count).map(|id| Gateway::new(id, *now)).collect();
    // An Envoy that is alone sends once a second.
    settle(&mut gateways, hub, now, 45);
    gateways
}

fn blocks(id: u64, len: u64) -> Vec<BlockHash> {
    (0..len).map(|i| BlockHash((id * 1_000_003 + i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
}

#[test]
fn a_decision_is_known_elsewhere_after_two_ticks() {
    let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
    let mut gateways = fleet(3, &mut hub, &mut now);
    assert!(gateways.iter().all(|of| of.worker.state.table.fleet == Fleet { gateways: 3, exchanging: 3 }));
    let (prefill, decode) = (gateways[0].endpoint(0), gateways[0].endpoint(2));
    gateways[0].worker.prefill_started(prefill, 7, 4.0, now, FAR);
    gateways[0].worker.prefill_started(prefill, 8, 1.0, now, FAR);
    gateways[0].worker.decode_started(decode, 1_000);
    gateways[0].worker.holds(prefill, &blocks(1, 12));
    settle(&mut gateways, &mut hub, &mut now, 2);
    for other in &gateways[1..] {
        let (work, tokens) = other.view(0, now);
        assert!((4_800_000..=5_000_000).contains(&work) && tokens == 0, "{work} {tokens}");
        assert_eq!((other.legs(0), other.legs(1)), (2.0, 0.0));
        assert_eq!(other.view(2, now).1, 1_000);
        assert_eq!(other.worker.state.index.matched(other.endpoint(0).index, &blocks(1, 12)), 12);
    }
    gateways[0].worker.prefill_ended(prefill, 7, now);
    gateways[0].worker.prefill_ended(prefill, 8, now);
    gateways[0].worker.decode_ended(decode, 1_000);
    settle(&mut gateways, &mut hub, &mut now, 2);
    assert!(gateways.iter().all(|of| of.view(0, now) == (0, 0) && of.view(2, now) == (0, 0)));
    assert!(gateways.iter().all(|of| of.legs(0) == 0.0));
    let report = hub.reports(now).find(|(id, ..)| *id == 1).and_then(|(.., text)| report::Report::from_json(text));
    assert_eq!(report.unwrap().endpoints, 3);
}

#[test]
fn equal_requests_get_equal_answers() {
    let mut hub = Hub::new(9);
    for gateway in (1..=20).rev() {
        let blocks = block_event(1, &blocks(gateway, 1)).into_vec();
        let record = Record { gateway, turn: 1, blocks, ..Record::default() };
        hub.take(
            &ExchangeRequest { from: gateway, records: vec![record], ..ExchangeRequest::default() },
            0,
            Monotonic::ZERO,
        );
    }
    let response = hub.answer(&ExchangeRequest { from: 99, wants: true, ..ExchangeRequest::default() }, 0);
    assert!(response.batches.iter().map(|batch| batch.gateway).eq(1..=20), "{:?}", response.batches);
}

/// One record of an Envoy that claims what it likes.
fn claims(gateway: u64, turn: u64, loads: Vec<(u64, Totals)>, report: Vec<u8>) -> ExchangeRequest {
    let record = Record { gateway, turn, loads, report, ..Record::default() };
    ExchangeRequest { from: gateway, records: vec![record], ..ExchangeRequest::default() }
}

#[test]
fn what_an_envoy_claims_is_capped_and_ends_with_it() {
    let mut hub = Hub::new(9);
    let huge = Totals { work: u64::MAX, tokens: u64::MAX, requests: u64::MAX, legs: u64::MAX };
    let honest = Totals { work: 5, tokens: 7, requests: 1, legs: 2 };
    hub.take(&claims(1, 1, vec![(4, huge)], Vec::new()), 0, Monotonic::ZERO);
    hub.take(&claims(2, 1, vec![(4, honest)], Vec::new()), 0, Monotonic::ZERO);
    let seen = |hub: &Hub| {
        let listener = ExchangeRequest { from: 3, wants: true, ..ExchangeRequest::default() };
        hub.answer(&listener, 0).loads.unwrap_or_default().into_iter().find(|(endpoint, _)| *endpoint == 4)
    };
    let (_, sum) = seen(&hub).unwrap();
    assert!(sum.tokens <= 10_000_000_007 && sum.work <= 1_000_000_000_005 && sum.requests <= 1_000_001, "{sum:?}");
    assert!(sum.legs <= 10_002, "{sum:?}");
    let later = Monotonic::ZERO + GATEWAY_LIFE + Duration::from_secs(1);
    hub.take(&claims(2, 2, vec![(4, honest)], Vec::new()), 0, later);
    assert!(hub.prune(later));
    assert_eq!(seen(&hub), Some((4, honest)));
}

/// What others have in flight, as a stranger receives it.
fn loads_of(hub: &Hub) -> Vec<(u64, Totals)> {
    let listener = ExchangeRequest { from: 999_999, wants: true, ..ExchangeRequest::default() };
    hub.answer(&listener, 0).loads.unwrap_or_default()
}

const ONE: Totals = Totals { work: 1, tokens: 1, requests: 1, legs: 1 };

#[test]
fn the_public_name_of_an_envoy_does_not_let_others_speak_for_it() {
    let mut hub = Hub::new(9).with_public_names(|gateway| gateway ^ 0xffff);
    let mut honest = claims(7, 1, vec![(4, ONE)], Vec::new());
    honest.records[0].blocks = block_event(4, &blocks(1, 3)).into_vec();
    hub.take(&honest, 0, Monotonic::ZERO);
    let known = |known| ExchangeRequest { from: 8, wants: true, known, ..ExchangeRequest::default() };
    let answer = hub.answer(&known(Vec::new()), 0);
    let name = answer.batches[0].gateway;
    assert_eq!(name, 7 ^ 0xffff);
    assert!(hub.reports(Monotonic::ZERO).all(|(id, ..)| id == name));
    // It claims to be the other Envoy, and to replace it, by the name that the exchange gave it.
    let mut attack = claims(name, 9, Vec::new(), Vec::new());
    hub.take(&attack, 0, Monotonic::ZERO);
    (attack.from, attack.records[0].gateway, attack.records[0].replaces) = (8, 8, name);
    hub.take(&attack, 0, Monotonic::ZERO);
    assert_eq!(loads_of(&hub), [(4, ONE)]);
    // What it has by that name, it does not get again.
    let asks = known(vec![(name, 1)]);
    assert!(hub.answer(&asks, 0).batches.is_empty());
    let state = hub.answer(&asks, 0).state;
    assert!(!hub.has_news(&ExchangeRequest { known_state: (9, state), ..asks }));
}

#[test]
fn a_message_that_came_before_changes_nothing_and_shows_no_life() {
    let mut hub = Hub::new(9);
    let first = claims(7, 5, vec![(4, ONE)], Vec::new());
    hub.take(&first, 0, Monotonic::ZERO);
    hub.take(&claims(7, 6, vec![], Vec::new()), 0, Monotonic::ZERO);
    let later = Monotonic::ZERO + GATEWAY_LIFE;
    for replayed in [&first, &claims(7, 6, vec![(4, ONE)], Vec::new())] {
        hub.take(replayed, 0, later);
        assert_eq!(loads_of(&hub), []);
    }
    assert!(hub.prune(later + TICK), "it has been silent since its last new message");
    hub.take(&first, 0, later + TICK);
    assert_eq!(hub.answer(&ExchangeRequest::default(), 0).exchanging, 0, "nor does it come back to life");
}

#[test]
fn an_envoy_that_replaces_itself_keeps_its_share() {
    let mut hub = Hub::new(9);
    let mut odd = claims(7, 1, vec![(4, ONE)], Vec::new());
    odd.records[0].replaces = 7;
    hub.take(&odd, 0, Monotonic::ZERO);
    assert_eq!(loads_of(&hub), [(4, ONE)]);
}

#[test]
fn largest_numbers_are_numbers_like_others() {
    let mut hub = Hub::new(9);
    let mut huge = claims(u64::MAX, u64::MAX, vec![(u64::MAX, ONE); 3], Vec::new());
    let record = &mut huge.records[0];
    (record.first, record.oldest, record.hash_scheme, record.replaces) = (u64::MAX, u64::MAX, u64::MAX, u64::MAX);
    record.blocks = [block_event(u64::MAX, &blocks(1, 3)), block_event(1, &blocks(1, 3))].concat();
    hub.take(&huge, u64::MAX, Monotonic::ZERO);
    hub.take(&claims(7, 1, vec![(4, ONE)], Vec::new()), 1, Monotonic::ZERO);
    assert!(loads_of(&hub).contains(&(4, ONE)));
    let all = hub.relay(&HashMap::new(), Monotonic::ZERO);
    assert!(all.iter().all(|request| ExchangeRequest::from_bytes(&request.to_bytes()).is_some()));
    let gone = Monotonic::ZERO + GATEWAY_LIFE + TICK;
    hub.take(&claims(7, 2, vec![(4, ONE)], Vec::new()), 1, gone);
    hub.prune(gone);
    assert_eq!(loads_of(&hub), [(4, ONE)]);
}

#[test]
fn loads_of_endpoints_that_are_not_listed_do_not_count() {
    let mut hub = Hub::new(9);
    hub.take(&claims(7, 1, vec![(4, ONE), (5, ONE)], Vec::new()), 0, Monotonic::ZERO);
    hub.count_only(Some([4, 6].into_iter().collect()));
    assert_eq!(loads_of(&hub), [(4, ONE)]);
    assert!(!hub.take(&claims(7, 2, vec![(4, ONE), (5, ONE)], Vec::new()), 0, Monotonic::ZERO), "that is nothing new");
    hub.take(&claims(8, 1, (0..9_999).map(|endpoint| (endpoint, ONE)).collect(), Vec::new()), 0, Monotonic::ZERO);
    assert_eq!(loads_of(&hub).iter().map(|(endpoint, _)| *endpoint).collect::<Vec<_>>(), [4, 6]);
    hub.count_only(None);
    hub.take(&claims(7, 3, vec![(5, ONE)], Vec::new()), 0, Monotonic::ZERO);
    assert!(loads_of(&hub).contains(&(5, ONE)));
}

#[test]
fn a_host_that_makes_up_envoys_has_the_share_of_one_host() {
    let mut hub = Hub::new(9);
    let full: Vec<u8> = (0..20).flat_map(|endpoint| block_event(endpoint, &blocks(1, 1_000)).into_vec()).collect();
    let take = |hub: &mut Hub, gateway: u64, origin: u64| {
        let mut request = claims(gateway, 1, (0..2_000).map(|endpoint| (endpoint, ONE)).collect(), vec![b' '; 20_000]);
        request.records[0].blocks = full.clone();
        hub.take(&request, origin, Monotonic::from_secs(gateway));
    };
    (1..=3).for_each(|honest| take(&mut hub, honest, honest));
    (1_000..3_500).for_each(|made_up| take(&mut hub, made_up, 66));
    take(&mut hub, 4, 4);
    let messages = hub.relay(&HashMap::new(), Monotonic::from_secs(1));
    let has = |id: u64| {
        let all = || messages.iter().flat_map(|message| message.records.iter().zip(&message.origins));
        let (record, origin) = all().find(|(record, _)| record.gateway == id).expect("it is kept");
        assert_eq!(*origin, id);
        (record.loads.len(), record.oldest, record.report.len())
    };
    for honest in 1..=4 {
        assert_eq!(has(honest), (2_000, 0, 20_000), "{honest}");
    }
    assert_eq!(hub.answer(&ExchangeRequest::default(), 0).exchanging, 1_024);
}

#[test]
fn loads_and_reports_of_many_envoys_have_a_bound_that_spares_the_modest() {
    let mut hub = Hub::new(9);
    let one = ONE;
    hub.take(&claims(1, 1, vec![(4, one)], vec![b' '; 100]), 0, Monotonic::ZERO);
    for gateway in 2..24 {
        let loads = (0..100_000).map(|endpoint| (endpoint, one)).collect();
        hub.take(&claims(gateway, 1, loads, Vec::new()), 0, Monotonic::ZERO);
    }
    let messages = hub.relay(&HashMap::new(), Monotonic::ZERO);
    let records = || messages.iter().flat_map(|message| &message.records);
    let total: usize = records().map(|record| record.loads.len()).sum();
    assert!(total <= 1 << 18, "{total}");
    assert!(records().any(|record| record.gateway == 1 && record.loads == [(4, one)] && record.report.len() == 100));
    for gateway in 2_000..2_400 {
        hub.take(&claims(gateway, 1, Vec::new(), vec![b' '; 64 << 10]), 0, Monotonic::ZERO);
    }
    let reports: usize = hub.reports(Monotonic::ZERO).map(|(.., report)| report.len()).sum();
    assert!((7 << 20..=8 << 20).contains(&reports), "{reports}");
}

#[test]
fn a_leg_behind_work_from_elsewhere_makes_no_progress_until_that_is_over() {
    let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
    let mut gateways = fleet(2, &mut hub, &mut now);
    let prefill = gateways[0].endpoint(0);
    gateways[0].worker.prefill_started(prefill, 1, 2.0, now, FAR);
    settle(&mut gateways, &mut hub, &mut now, 2);
    gateways[1].worker.prefill_started(prefill, 2, 1.0, now, FAR);
    settle(&mut gateways, &mut hub, &mut now, 20);
    // One second later one of three is done, not two.
    let (work, _) = gateways[1].view(0, now);
    assert!((1_850_000..=2_000_000).contains(&work), "{work}");
    let state = gateways[1].worker.state.table.get(prefill.index).unwrap();
    assert_eq!(state.prefill.service_seconds(2, now + Duration::from_secs(2)), None, "that was waiting as well");
}

#[test]
fn without_pd_control_an_envoy_has_its_own_view_and_receives_all_again_later() {
    let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
    let mut gateways = fleet(2, &mut hub, &mut now);
    let decode = gateways[0].endpoint(2);
    gateways[0].worker.decode_started(decode, 500);
    settle(&mut gateways, &mut hub, &mut now, 3);
    assert_eq!(gateways[1].view(2, now).1, 500);
    for _ in 0..60 {
        now += TICK;
        gateways[1].tick(None, now);
    }
    assert_eq!(gateways[1].view(2, now).1, 0);
    assert_eq!(gateways[1].worker.state.table.fleet, Fleet { gateways: 2, exchanging: 1 });
    assert!((gateways[1].worker.state.table.fleet.not_exchanging() - 1.0).abs() < 1e-9);
    // Another hub in its place, which knows nothing, receives everything that happened meanwhile.
    let prefill = gateways[0].endpoint(1);
    gateways[0].worker.holds(prefill, &blocks(5, 9));
    let mut hub = Hub::new(10);
    settle(&mut gateways, &mut hub, &mut now, 45);
    assert_eq!(gateways[1].view(2, now).1, 500);
    assert_eq!(gateways[1].worker.state.index.matched(prefill.index, &blocks(5, 9)), 9);
    assert_eq!(gateways[1].worker.state.table.fleet.not_exchanging(), 0.0);
}

#[test]
fn an_envoy_that_is_gone_is_out_of_the_others_views() {
    let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
    let mut gateways = fleet(3, &mut hub, &mut now);
    let decode = gateways[2].endpoint(2);
    gateways[2].worker.decode_started(decode, 500);
    settle(&mut gateways, &mut hub, &mut now, 3);
    gateways.truncate(2);
    let ticks = (GATEWAY_LIFE.as_millis() / TICK.as_millis()) as u32 + 30;
    settle(&mut gateways, &mut hub, &mut now, ticks);
    assert!(gateways.iter().all(|of| of.view(2, now).1 == 0 && of.worker.state.table.fleet.exchanging == 2));
}

#[test]
fn the_worker_with_the_lease_takes_the_lead_in_place_of_the_latest_leader() {
    let (store, now) = (Store::default(), Monotonic::from_secs(1));
    let worker = || {
        let (mut worker, mut exchange) = (Worker::default(), ExchangeClient::default());
        let config = worker.configure(CONFIG).unwrap();
        exchange.configure(&mut worker, config.control.as_ref());
        (worker, exchange)
    };
    let record = |worker: &mut Worker, exchange: &mut ExchangeClient| {
        let calls = exchange.tick(worker, true, now, |_| Vec::new());
        ExchangeRequest::from_bytes(&calls[0].body).unwrap().records.remove(0)
    };
    let ((mut first, mut leader), (mut second, mut next)) = (worker(), worker());
    next.take_lead(&mut second, &store, false, || panic!("it holds no lease"), now);
    assert!(next.tick(&mut second, false, now, |_| Vec::new()).is_empty());
    leader.take_lead(&mut first, &store, true, || 0, now);
    let sent = record(&mut first, &mut leader);
    assert_eq!((sent.gateway, sent.replaces), (1, 0));
    leader.take_lead(&mut first, &store, true, || panic!("it leads already"), now);
    next.take_lead(&mut second, &store, true, || 42, now);
    let sent = record(&mut second, &mut next);
    assert_eq!((sent.gateway, sent.replaces), (42, 1));
}

#[test]
fn without_an_exchange_nobody_leads() {
    let (mut worker, mut exchange) = (Worker::default(), ExchangeClient::default());
    exchange.configure(&mut worker, None);
    exchange.take_lead(&mut worker, &Store::default(), true, || panic!("there is no exchange"), Monotonic::ZERO);
    assert!(exchange.tick(&mut worker, true, Monotonic::ZERO, |_| Vec::new()).is_empty());
}

#[test]
fn a_new_leader_of_an_envoy_takes_the_old_ones_place_at_once() {
    let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
    let mut gateways = fleet(2, &mut hub, &mut now);
    let decode = gateways[0].endpoint(2);
    gateways[0].worker.decode_started(decode, 500);
    settle(&mut gateways, &mut hub, &mut now, 3);
    let first = &mut gateways[0];
    first.exchange.resign(&mut first.worker);
    first.exchange.lead(&mut first.worker, 77, 1, now);
    first.question = None;
    settle(&mut gateways, &mut hub, &mut now, 3);
    assert_eq!(gateways[1].view(2, now).1, 500);
    assert_eq!(gateways[1].worker.state.table.fleet, Fleet { gateways: 2, exchanging: 2 });
}

#[test]
fn a_new_leader_without_an_answer_counts_on_those_that_the_old_one_knew() {
    let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
    let mut gateways = fleet(2, &mut hub, &mut now);
    let first = &mut gateways[0];
    first.exchange.resign(&mut first.worker);
    first.exchange.lead(&mut first.worker, 77, 1, now);
    first.question = None;
    for _ in 0..60 {
        now += TICK;
        first.tick(None, now);
    }
    assert_eq!(first.worker.state.table.fleet, Fleet { gateways: 2, exchanging: 1 });
}

#[test]
fn hubs_relay_what_they_received_and_one_that_restarts_catches_up() {
    let mut now = Monotonic::from_secs(1);
    let mut hubs = [Hub::new(8), Hub::new(9)];
    let mut gateways = [Gateway::new(1, now), Gateway::new(2, now)];
    let mut have = [HashMap::new(), HashMap::new()];
    let mut run = |hubs: &mut [Hub; 2], gateways: &mut [Gateway; 2], ticks: u32| {
        for _ in 0..ticks {
            now += TICK;
            for (index, gateway) in gateways.iter_mut().enumerate() {
                gateway.tick(Some(&mut hubs[index]), now);
            }
            for from in 0..2 {
                for request in hubs[from].relay(&have[from], now) {
                    hubs[1 - from].take(&request, 0, now);
                    have[from].extend(hubs[1 - from].answer(&request, 0).have);
                }
            }
            hubs.iter_mut().for_each(|hub| _ = hub.prune(now));
        }
        now
    };
    run(&mut hubs, &mut gateways, 45);
    let (prefill, decode) = (gateways[0].endpoint(0), gateways[0].endpoint(2));
    gateways[0].worker.holds(prefill, &blocks(3, 20));
    gateways[0].worker.decode_started(decode, 40);
    let now = run(&mut hubs, &mut gateways, 4);
    assert_eq!(gateways[1].view(2, now).1, 40);
    assert_eq!(gateways[1].worker.state.index.matched(prefill.index, &blocks(3, 20)), 20);
    // The second hub dies with all it has, and its gateway with it; those that replace them receive it all.
    hubs[1] = Hub::new(10);
    gateways[1] = Gateway::new(3, now);
    let now = run(&mut hubs, &mut gateways, 90);
    assert_eq!(gateways[1].view(2, now).1, 40);
    assert_eq!(gateways[1].worker.state.index.matched(prefill.index, &blocks(3, 20)), 20);
    assert!(gateways.iter().all(|of| of.worker.state.table.fleet == Fleet { gateways: 2, exchanging: 2 }));
}

#[test]
fn however_much_gateways_sent_a_hub_relays_it_in_messages_that_are_taken() {
    let now = Monotonic::from_secs(1);
    let (mut full, mut empty) = (Hub::new(8), Hub::new(9));
    for id in 1..=40 {
        let blocks: Vec<_> =
            (0..20).flat_map(|endpoint| block_event(endpoint, &blocks(id, 1_000)).into_vec()).collect();
        let report = vec![b'x'; MAX_REPORT_BYTES];
        let record = Record { gateway: id, turn: 1, blocks, report, ..Record::default() };
        full.take(&ExchangeRequest { from: id, records: vec![record], ..ExchangeRequest::default() }, 0, now);
    }
    let mut have = HashMap::new();
    let messages = full.relay(&have, now);
    assert!(messages.len() > 5);
    for request in messages {
        let bytes = request.to_bytes();
        assert!(bytes.len() <= MAX_MESSAGE_BYTES / 2, "{}", bytes.len());
        empty.take(&ExchangeRequest::from_bytes(&bytes).unwrap(), 0, now);
        have.extend(empty.answer(&request, 0).have);
    }
    assert_eq!(have.len(), 40);
    assert!(have.values().all(|next| *next == 20));
    assert!(full.relay(&have, now).iter().flat_map(|request| &request.records).all(|record| record.blocks.is_empty()));
}

#[derive(Clone, Debug)]
enum Step {
    Start { gateway: usize, place: usize, tokens: u64 },
    End { number: usize },
    Holds { gateway: usize, place: usize, prompt: u64 },
    Tick { gateway: usize, is_lost: bool },
    Restart,
    Rubbish { gateway: usize, bytes: Vec<u8> },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3_usize, 0..3_usize, 1..1_000_u64).prop_map(|(gateway, place, tokens)| Step::Start { gateway, place, tokens }),
        3 => any::<usize>().prop_map(|number| Step::End { number }),
        3 => (0..3_usize, 0..3_usize, 0..20_u64).prop_map(|(gateway, place, prompt)| Step::Holds { gateway, place, prompt }),
        8 => (0..3_usize, any::<bool>()).prop_map(|(gateway, is_lost)| Step::Tick { gateway, is_lost }),
        1 => Just(Step::Restart),
        1 => (0..3_usize, prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(gateway, bytes)| Step::Rubbish { gateway, bytes }),
    ]
}

proptest! {
    /// Whatever is lost on the way, and however often pd-control starts over: once calls get through again, everyone
    /// sees what everybody has in flight, and nothing else.
    #[test]
    fn views_agree_in_the_end(steps in prop::collection::vec(step(), 0..120)) {
        let (mut hub, mut now, mut hubs) = (Hub::new(100), Monotonic::from_secs(1), 100);
        let mut gateways = fleet(3, &mut hub, &mut now);
        let mut running: Vec<(usize, usize, u64)> = Vec::new();
        for step in steps {
            match step {
                Step::Start { gateway, place, tokens } => {
                    let endpoint = gateways[gateway].endpoint(place);
                    gateways[gateway].worker.decode_started(endpoint, tokens);
                    running.push((gateway, place, tokens));
                }
                Step::End { number } if !running.is_empty() => {
                    let (gateway, place, tokens) = running.swap_remove(number % running.len());
                    let endpoint = gateways[gateway].endpoint(place);
                    gateways[gateway].worker.decode_ended(endpoint, tokens);
                }
                Step::End { .. } => {}
                Step::Holds { gateway, place, prompt } => {
                    let endpoint = gateways[gateway].endpoint(place);
                    gateways[gateway].worker.holds(endpoint, &blocks(prompt, 9));
                }
                Step::Tick { gateway, is_lost } => {
                    now += TICK;
                    gateways[gateway].tick((!is_lost).then_some(&mut hub), now);
                }
                Step::Restart => {
                    hubs += 1;
                    hub = Hub::new(hubs);
                }
                Step::Rubbish { gateway, bytes } => {
                    let of = &mut gateways[gateway];
                    of.exchange.answered(&mut of.worker, CallKind::Send, Some(200), &bytes, now);
                }
            }
        }
        settle(&mut gateways, &mut hub, &mut now, 100);
        for gateway in &gateways {
            for place in 0..3 {
                let tokens: u64 = running.iter().filter(|of| of.1 == place).map(|of| of.2).sum();
                prop_assert_eq!(gateway.view(place, now).1, tokens);
            }
        }
        for prompt in 0..20 {
            for place in 0..3 {
                let held: Vec<_> = gateways.iter().map(|of| of.worker.state.index.matched(of.endpoint(place).index, &blocks(prompt, 9))).collect();
                prop_assert!(held.iter().all(|of| *of == held[0]), "{prompt} at {place}: {held:?}");
            }
        }
    }
}

#[test]
fn requests_of_another_gateway_count_until_the_hub_is_silent() {
    let (mut hub, mut now) = (Hub::new(9), Monotonic::from_secs(1));
    for count in [1, 2] {
        let mut gateways = fleet(count, &mut hub, &mut now);
        let decode = gateways[0].endpoint(2);
        let key = gateways[0].worker.state.table.get(decode.index).unwrap().key;
        for _ in 0..6 {
            let report = |requests: f64| EngineReport { requests, kv_tokens: Some(4_000.0) };
            hub.engine_reports(&[(key, Role::Decode)], report(8.0), now);
            hub.engine_reports(&[(key + 1, Role::Decode)], report(0.0), now);
            settle(&mut gateways, &mut hub, &mut now, 20);
        }
        assert!(gateways.iter().all(|of| of.view(2, now).1 == 1_000), "a quarter of the tokens, {count}");
        for _ in 0..80 {
            now = now.saturating_add(TICK);
            gateways.iter_mut().for_each(|of| of.tick(None, now));
        }
        assert!(gateways.iter().all(|of| of.view(2, now).1 == 0), "{count}");
        hub = Hub::new(9);
    }
}
