//! The endpoint list's way from `pd-control` to every worker.

use std::time::Duration;

use pd_host::{Callout, ClusterState, Fleet, SharedStore, Worker};

use crate::gateway::*;

const TICK: Duration = Duration::from_millis(200);
/// Within this time of a worker's death another one polls: the lease and a tick.
const TAKE_OVER: Duration = Duration::from_millis(1_200);

/// The polls in flight, with the index of the worker that has each.
fn in_flight(workers: &[Worker]) -> Vec<(usize, Callout)> {
    workers.iter().enumerate().flat_map(|(i, worker)| polls(worker).into_iter().map(move |poll| (i, poll))).collect()
}

/// The one poll in flight.
#[track_caller]
fn the_poll(workers: &[Worker]) -> (usize, Callout) {
    let mut polls = in_flight(workers);
    assert_eq!(polls.len(), 1, "{polls:?}");
    polls.remove(0)
}

fn path(poll: &Callout) -> String {
    String::from_utf8(poll.header(":path").unwrap().to_vec()).unwrap()
}

fn answer(worker: &Worker, poll: &Callout, status: &str, body: &str) {
    worker.answer(poll.token, [(":status", status)], body).unwrap();
}

const FIRST: &[(&str, &str)] = &[("10.0.0.1:8000", "both")];
const SECOND: &[(&str, &str)] = &[("10.0.0.2:8000", "both")];

#[test]
fn the_poll_says_who_asks_for_what() {
    let mut envoy = envoy(&config(&[r#""control":{"cluster":"pd-control","authority":"c","wait_ms":700}"#], &[], ""));
    envoy.environment = vec![("PD_CONTROL_TOKEN".into(), "secret".into())];
    let gateway = Gateway::within(envoy);
    assert_eq!(gateway.tick_period(), Some(TICK));
    assert_eq!(gateway.callouts(), [], "not before the first tick");
    gateway.tick();
    let poll = polls(&gateway).remove(0);
    assert_eq!(path(&poll), "/v1/watch?epoch=&since=0&wait_ms=700");
    assert_eq!(poll.header(":method"), Some(&b"GET"[..]));
    assert_eq!(poll.header(":authority"), Some(&b"c"[..]));
    assert_eq!(poll.header("authorization"), Some(&b"Bearer secret"[..]));
    assert!(poll.header("x-pd-filter").unwrap().starts_with(b"version=0.1.0;build="));
    assert_eq!(poll.timeout, Duration::from_millis(5_700));
    push(&gateway, &list("e-1.a_b", 7, FIRST));
    assert_eq!(path(&polls(&gateway)[0]), "/v1/watch?epoch=e-1.a_b&since=7&wait_ms=700");
    assert!(gateway.logs().iter().all(|(_, line)| !line.contains("secret")));
    gateway.assert_idle();
}

#[test]
fn an_epoch_that_does_not_belong_in_a_path_is_cut_to_what_does() {
    let gateway = Gateway::new(&controlled());
    gateway.tick();
    push(&gateway, &list(r"a&b c\r\n\u0000%é", 1, FIRST));
    assert_eq!(path(&polls(&gateway)[0]), "/v1/watch?epoch=abc&since=1&wait_ms=30000");
    gateway.assert_clean();
}

#[test]
fn one_worker_polls_whatever_their_number() {
    for count in [1, 4, 16] {
        let fleet = fleet(count, &controlled());
        fleet.advance(TICK);
        let (poller, poll) = the_poll(fleet.workers());
        fleet.advance(Duration::from_secs(3));
        assert_eq!(the_poll(fleet.workers()).1.token, poll.token);
        answer(&fleet.workers()[poller], &poll, "200", &list("e", 1, FIRST));
        assert_eq!(the_poll(fleet.workers()).0, poller);
        for _ in 0..3 {
            fleet.advance(Duration::from_secs(30));
            let (index, poll) = the_poll(fleet.workers());
            assert_eq!(index, poller);
            answer(&fleet.workers()[index], &poll, "304", "");
        }
        assert_eq!(the_poll(fleet.workers()).0, poller);
        assert_eq!(fleet.violations(), []);
    }
}

#[test]
fn every_worker_has_a_new_list_at_its_next_request() {
    let fleet = fleet(4, &controlled());
    fleet.tick();
    for (version, endpoints, address) in [(1, FIRST, "10.0.0.1:8000"), (2, SECOND, "10.0.0.2:8000")] {
        let (poller, _) = the_poll(fleet.workers());
        push(&fleet.workers()[poller], &list("e", version, endpoints));
        for worker in fleet.workers() {
            assert_eq!(reached(worker), set(&[address]));
        }
    }
    assert_eq!(fleet.violations(), []);
}

#[test]
fn every_worker_applies_a_list_once() {
    let fleet = fleet(4, &controlled());
    fleet.tick();
    let (poller, _) = the_poll(fleet.workers());
    push(&fleet.workers()[poller], &list("e", 3, FIRST));
    fleet.advance(Duration::from_secs(2));
    assert_eq!(fleet.shared().counter("pd_snapshots_total;result=applied"), 4);
    assert_eq!(fleet.shared().gauge("pd_endpoints"), 1);
    assert_eq!(fleet.shared().gauge("pd_list_version"), 3);
}

#[test]
fn a_worker_that_starts_late_has_the_list_at_once() {
    let mut fleet = fleet(2, &controlled());
    fleet.tick();
    let (poller, _) = the_poll(fleet.workers());
    push(&fleet.workers()[poller], &list("e", 1, FIRST));
    fleet.replace(1 - poller).unwrap();
    assert_eq!(reached(&fleet.workers()[1 - poller]), set(&["10.0.0.1:8000"]));
}

#[test]
fn a_dead_workers_poll_is_taken_over() {
    for count in [1, 2, 4] {
        let mut fleet = fleet(count, &controlled());
        fleet.tick();
        for round in 1..4 {
            let (poller, _) = the_poll(fleet.workers());
            push(&fleet.workers()[poller], &list("e", round, FIRST));
            fleet.advance(TICK);
            fleet.replace(poller).unwrap();
            assert_eq!(in_flight(fleet.workers()), []);
            fleet.advance(TAKE_OVER);
            let (_, poll) = the_poll(fleet.workers());
            assert!(path(&poll).contains("&since="));
        }
        assert_eq!(fleet.violations(), []);
    }
}

#[test]
fn a_silent_workers_poll_is_taken_over() {
    let fleet = fleet(3, &controlled());
    fleet.tick();
    let (silent, poll) = the_poll(fleet.workers());
    let awake: Vec<&Worker> = (0..3).filter(|i| *i != silent).map(|i| &fleet.workers()[i]).collect();
    let steps = TAKE_OVER.as_millis() / TICK.as_millis();
    for _ in 0..steps {
        fleet.clock().advance(TICK);
        for worker in &awake {
            worker.tick();
        }
    }
    assert_eq!(awake.iter().flat_map(|worker| polls(worker)).count(), 1);
    // It comes back, its answer still counts, and it lets the other one go on alone.
    fleet.workers()[silent].tick();
    answer(&fleet.workers()[silent], &poll, "200", &list("e", 1, FIRST));
    assert_eq!(polls(&fleet.workers()[silent]), []);
    for worker in fleet.workers() {
        assert_eq!(reached(worker), set(&["10.0.0.1:8000"]));
    }
    assert_ne!(the_poll(fleet.workers()).0, silent);
}

/// Answers to a poll that leave the list as it is, by name.
fn bad_answers() -> Vec<(&'static str, &'static str, String)> {
    let many: Vec<String> = (0..100_001).map(|i| format!("10.{}.{}.{}:1", i >> 16, (i >> 8) & 255, i & 255)).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|address| (address.as_str(), "both")).collect();
    vec![
        ("nothing", "200", String::new()),
        ("no JSON", "200", "<html>".into()),
        ("half a list", "200", list("e", 2, FIRST)[..40].into()),
        ("another wire version", "200", list("e", 2, FIRST).replace(r#""wire":1"#, r#""wire":2"#)),
        ("a bad endpoint", "200", list("e", 2, &[("10.0.0.1:0", "both")])),
        ("an endpoint twice", "200", list("e", 2, &[("10.0.0.1:1", "both"), ("10.0.0.1:1", "both")])),
        ("an empty list", "200", list("e", 2, &[])),
        ("too many endpoints", "200", list("e", 2, &many)),
        ("a change of an unknown list", "200", r#"{"wire":1,"epoch":"x","version":9,"base":8}"#.into()),
        ("unauthorised", "401", list("e", 2, SECOND)),
        ("a broken server", "500", list("e", 2, SECOND)),
        ("Envoy's 503", "503", "no healthy upstream".into()),
        ("no status", "", String::new()),
        ("a status that is no number", "OK", list("e", 2, SECOND)),
    ]
}

#[test]
fn bad_answers_leave_the_last_good_list_in_force_and_the_poll_going() {
    for (name, status, body) in bad_answers() {
        let gateway = Gateway::pushed(FIRST);
        let poll = polls(&gateway).remove(0);
        answer(&gateway, &poll, status, &body);
        assert_eq!(reached(&gateway), set(&["10.0.0.1:8000"]), "{name}");
        gateway.advance(Duration::from_secs(1));
        push(&gateway, &list("e", 3, SECOND));
        assert_eq!(reached(&gateway), set(&["10.0.0.2:8000"]), "{name}");
        gateway.assert_idle();
    }
}

#[test]
fn bad_answers_at_the_start_leave_the_configured_endpoints_in_force() {
    let top = [r#""control":{"cluster":"pd-control"}"#];
    for (name, status, body) in bad_answers() {
        let gateway = Gateway::new(&config(&top, FIRST, ""));
        gateway.tick();
        let poll = polls(&gateway).remove(0);
        answer(&gateway, &poll, status, &body);
        assert_eq!(reached(&gateway), set(&["10.0.0.1:8000"]), "{name}");
        gateway.assert_idle();
    }
}

#[test]
fn refused_lists_and_failed_polls_are_counted_apart() {
    let gateway = Gateway::pushed(FIRST);
    for (body, refused, failed) in [("{", 1, 1), (list("e", 2, &[]).as_str(), 2, 1), ("", 3, 2)] {
        gateway.advance(Duration::from_secs(2));
        let poll = polls(&gateway).remove(0);
        answer(&gateway, &poll, "200", body);
        assert_eq!(gateway.counter("pd_snapshots_total;result=refused"), refused, "{body}");
        assert_eq!(gateway.counter("pd_polls_total;result=failed"), failed, "{body}");
    }
    gateway.advance(Duration::from_secs(2));
    gateway.fail(polls(&gateway)[0].token).unwrap();
    assert_eq!(gateway.counter("pd_polls_total;result=failed"), 3);
    assert_eq!(gateway.counter("pd_polls_total;result=changed"), 2);
}

#[test]
fn failures_slow_the_poll_down_and_a_good_answer_ends_that() {
    let gateway = Gateway::new(&controlled());
    let mut polled = 0;
    for _ in 0..100 {
        gateway.advance(TICK);
        for poll in polls(&gateway) {
            polled += 1;
            gateway.refuse(poll.token).unwrap();
        }
    }
    assert!((18..30).contains(&polled), "{polled} polls in 20 s");
    assert_eq!(gateway.logs().iter().filter(|(_, line)| line.contains("does not answer")).count(), 1);
    gateway.advance(Duration::from_secs(1));
    push(&gateway, &list("e", 1, FIRST));
    assert_eq!(polls(&gateway).len(), 1, "at once");
    assert_eq!(reached(&gateway), set(&["10.0.0.1:8000"]));
}

#[test]
fn a_poll_that_the_host_refuses_is_tried_again() {
    for cluster in [None, Some(ClusterState::FailsAtOnce)] {
        let gateway = Gateway::new(&controlled());
        gateway.set_cluster(CONTROL, cluster);
        gateway.advance(Duration::from_secs(10));
        assert_eq!(gateway.callouts(), []);
        gateway.set_cluster(CONTROL, Some(ClusterState::Ready));
        gateway.advance(TAKE_OVER);
        push(&gateway, &list("e", 1, FIRST));
        assert_eq!(reached(&gateway), set(&["10.0.0.1:8000"]));
        gateway.assert_idle();
    }
}

#[test]
fn a_poll_that_is_never_answered_ends_by_its_time_limit() {
    let gateway = Gateway::new(&controlled());
    gateway.tick();
    let first = polls(&gateway).remove(0);
    assert_eq!(first.timeout, Duration::from_secs(35));
    gateway.advance(Duration::from_secs(36));
    assert_ne!(polls(&gateway)[0].token, first.token);
    gateway.assert_idle();
}

#[test]
fn a_restarted_control_is_believed_whatever_its_version() {
    let fleet = fleet(2, &controlled());
    fleet.tick();
    for (epoch, version, endpoints, address) in [
        ("a", 9, FIRST, "10.0.0.1:8000"),
        ("b", 1, SECOND, "10.0.0.2:8000"),
        ("a", 9, FIRST, "10.0.0.1:8000"),
        ("", 1, SECOND, "10.0.0.2:8000"),
    ] {
        let (poller, _) = the_poll(fleet.workers());
        push(&fleet.workers()[poller], &list(epoch, version, endpoints));
        for worker in fleet.workers() {
            assert_eq!(reached(worker), set(&[address]), "{epoch} {version}");
        }
    }
}

#[test]
fn changes_reach_every_worker_and_build_on_each_other() {
    let fleet = fleet(2, &controlled());
    fleet.tick();
    let pushed = |text: &str| {
        let (poller, _) = the_poll(fleet.workers());
        push(&fleet.workers()[poller], text);
        let reached: Vec<_> = fleet.workers().iter().map(reached).collect();
        assert_eq!(reached[0], reached[1]);
        reached[0].clone()
    };
    pushed(&list("e", 1, FIRST));
    let added =
        r#"{"wire":1,"epoch":"e","version":2,"base":1,"endpoints":[{"address":"10.0.0.2:8000","role":"both"}]}"#;
    assert_eq!(pushed(added), set(&["10.0.0.1:8000", "10.0.0.2:8000"]));
    let removed = r#"{"wire":1,"epoch":"e","version":3,"base":2,"removed":["10.0.0.1:8000"]}"#;
    assert_eq!(pushed(removed), set(&["10.0.0.2:8000"]));
    let drained = r#"{"wire":1,"epoch":"e","version":4,"base":3,"endpoints":[{"address":"10.0.0.2:8000","role":"both","state":"draining"}]}"#;
    assert_eq!(pushed(drained), set(&[]));
}

/// Two generations with configurations of their own.
fn generations(old: &str, new: &str) -> Fleet {
    let mut fleet = fleet(2, old);
    fleet.tick();
    fleet.reconfigure(new.as_bytes(), None).unwrap();
    fleet
}

#[test]
fn a_generation_of_the_same_control_waits_until_the_old_one_is_gone() {
    let mut fleet = generations(&controlled(), &controlled());
    fleet.advance(Duration::from_secs(3));
    assert_eq!(in_flight(fleet.workers()), []);
    let (poller, _) = the_poll(fleet.draining());
    push(&fleet.draining()[poller], &list("e", 1, FIRST));
    for worker in fleet.workers().iter().chain(fleet.draining()) {
        assert_eq!(reached(worker), set(&["10.0.0.1:8000"]));
    }
    fleet.retire();
    fleet.advance(TAKE_OVER);
    the_poll(fleet.workers());
    assert_eq!(fleet.violations(), []);
}

#[test]
fn a_generation_of_another_control_takes_the_poll_from_the_old_one() {
    let new = config(&[r#""control":{"cluster":"pd-control","authority":"new"}"#], &[], "");
    let mut fleet = generations(&controlled(), &new);
    fleet.advance(2 * TICK);
    let (poller, _) = the_poll(fleet.workers());
    // The old poll is in flight until it ends, and no other follows it.
    let (old, poll) = the_poll(fleet.draining());
    answer(&fleet.draining()[old], &poll, "304", "");
    fleet.advance(Duration::from_secs(3));
    assert_eq!(in_flight(fleet.draining()), []);
    push(&fleet.workers()[poller], &list("e", 1, FIRST));
    for worker in fleet.workers().iter().chain(fleet.draining()) {
        assert_eq!(reached(worker), set(&["10.0.0.1:8000"]));
    }
    fleet.retire();
    fleet.advance(Duration::from_secs(3));
    assert_eq!(the_poll(fleet.workers()).0, poller);
    assert_eq!(fleet.violations(), []);
}

#[test]
fn two_roots_of_a_worker_share_one_poll() {
    let mut fleet = fleet(2, &controlled());
    fleet.tick();
    let old: Vec<u32> = fleet.workers().iter().map(Worker::root).collect();
    fleet.add_roots(controlled().as_bytes());
    fleet.advance(Duration::from_secs(3));
    let (poller, _) = the_poll(fleet.workers());
    push(&fleet.workers()[poller], &list("e", 1, FIRST));
    for (worker, old) in fleet.workers().iter().zip(&old) {
        assert_eq!(reached(worker), set(&["10.0.0.1:8000"]));
        let stream = worker.stream_of(*old);
        stream.request_headers([(":method", "GET"), (":path", "/version")], true);
        assert_eq!(destinations(&forwarded(&stream)), ["10.0.0.1:8000"]);
        respond(&stream);
        worker.retire_root(*old);
    }
    // The retired roots' poll is Envoy's to end; its answer is nobody's.
    let (poller, poll) = the_poll(fleet.workers());
    answer(&fleet.workers()[poller], &poll, "304", "");
    fleet.advance(TAKE_OVER);
    the_poll(fleet.workers());
    assert_eq!(fleet.violations(), []);
}

#[test]
fn policies_do_not_share_what_they_learn() {
    let shared = SharedStore::new();
    let other = pd_host::WorkerConfig { vm_id: "other".into(), ..envoy(&controlled()) };
    let workers = [envoy(&controlled()), other].map(|envoy| Worker::new(module(), shared.clone(), envoy).unwrap());
    for worker in &workers {
        worker.tick();
        assert_eq!(polls(worker).len(), 1);
    }
    push(&workers[0], &list("e", 1, FIRST));
    assert_eq!(reached(&workers[0]), set(&["10.0.0.1:8000"]));
    assert_eq!(reached(&workers[1]), set(&[]));
}

#[test]
fn the_age_of_the_list_grows_while_control_is_away() {
    let gateway = Gateway::pushed(FIRST);
    gateway.advance(TICK);
    let poll = polls(&gateway).remove(0);
    gateway.refuse(poll.token).unwrap();
    gateway.set_cluster(CONTROL, None);
    gateway.advance(Duration::from_secs(60));
    let age = gateway.shared.gauge("pd_list_age_ms");
    assert!((59_000..61_000).contains(&age), "{age}");
    assert_eq!(reached(&gateway), set(&["10.0.0.1:8000"]));
}
