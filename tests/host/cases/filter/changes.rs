//! The list or the configuration changes while a request is between its legs.

use pd_host::{Stream, Worker};

use crate::gateway::*;

/// A request whose prefill leg is in flight, then a new list.
fn with_a_leg_in_flight(before: &[(&str, &str)], after: &[(&str, &str)]) -> (Gateway, Stream) {
    let gateway = Gateway::pushed(before);
    let stream = long_chat(1).send(&gateway);
    leg(&gateway);
    push(&gateway, &list("e", 2, after));
    (gateway, stream)
}

/// Answers the leg, which goes on whatever became of its endpoint, and returns where the request goes then.
fn decode_after(before: &[(&str, &str)], after: &[(&str, &str)]) -> Vec<String> {
    let (gateway, stream) = with_a_leg_in_flight(before, after);
    answer_leg(&gateway);
    let destinations = destinations(&forwarded(&stream));
    respond(&stream);
    gateway.assert_idle();
    destinations
}

#[test]
fn a_decode_endpoint_that_leaves_the_list_between_the_legs_gets_nothing() {
    for gone in [D1, D2] {
        let rest: Vec<_> = TWO_AND_TWO.iter().copied().filter(|(address, _)| *address != gone).collect();
        assert!(!decode_after(TWO_AND_TWO, &rest).contains(&gone.to_owned()));
    }
}

#[test]
fn a_decode_endpoint_that_became_a_prefill_endpoint_gets_no_decode_leg() {
    let after = [(P1, "prefill"), (P2, "prefill"), (D1, "prefill"), (D2, "decode")];
    assert_eq!(decode_after(TWO_AND_TWO, &after), [D2]);
}

#[test]
fn an_endpoint_that_took_the_place_of_a_decode_endpoint_is_not_taken_for_it() {
    let new = "10.0.9.9:8000";
    let after = [(P1, "prefill"), (P2, "prefill"), (new, "prefill"), (D2, "decode")];
    assert_eq!(decode_after(TWO_AND_TWO, &after), [D2]);
}

#[test]
fn a_decode_endpoint_that_is_new_may_get_the_request() {
    let new = "10.0.9.9:8000";
    let after = [(P1, "prefill"), (P2, "prefill"), (new, "decode")];
    assert_eq!(decode_after(TWO_AND_TWO, &after), [new]);
}

#[test]
fn a_prefill_endpoint_that_leaves_the_list_in_mid_leg_answers_all_the_same() {
    let after = [("10.0.9.9:8000", "prefill"), (D1, "decode"), (D2, "decode")];
    let (gateway, stream) = with_a_leg_in_flight(TWO_AND_TWO, &after);
    answer_leg(&gateway);
    assert!(String::from_utf8(forwarded(&stream).body).unwrap().contains(PARAMS));
    respond(&stream);
    gateway.assert_idle();
}

#[test]
fn a_failed_leg_is_run_again_on_an_endpoint_of_the_new_list() {
    let new = "10.0.9.9:8000";
    for after in [
        &[(new, "prefill"), (D1, "decode")][..],
        &[(D1, "decode"), (new, "prefill")],
        &[(P1, "decode"), (P2, "decode"), (D1, "decode"), (D2, "decode"), (new, "prefill")],
    ] {
        let (gateway, stream) = with_a_leg_in_flight(TWO_AND_TWO, after);
        gateway.refuse(leg(&gateway).token).unwrap();
        assert_eq!(addresses(leg(&gateway).header("x-pd-destination")), [new]);
        answer_leg(&gateway);
        respond(&stream);
        gateway.assert_idle();
    }
}

#[test]
fn without_a_prefill_endpoint_left_a_failed_leg_is_given_up() {
    let (gateway, stream) = with_a_leg_in_flight(TWO_AND_TWO, &[(D1, "decode")]);
    gateway.refuse(leg(&gateway).token).unwrap();
    assert_eq!(legs(&gateway), []);
    assert_eq!(destinations(&forwarded(&stream)), [D1]);
    respond(&stream);
    gateway.assert_idle();
}

#[test]
fn without_a_decode_endpoint_left_the_answer_is_503() {
    let (gateway, stream) = with_a_leg_in_flight(TWO_AND_TWO, &[(P1, "prefill")]);
    answer_leg(&gateway);
    assert_eq!(stream.client().status(), Some(503), "{:?}", stream.forwarded());
    assert_eq!(state(&stream, "reason"), "no_endpoint");
    gateway.assert_idle();
}

#[test]
fn an_endpoint_that_leaves_in_mid_stream_disturbs_nothing() {
    let gateway = Gateway::pushed(TWO_AND_TWO);
    let stream = short_chat(1).send(&gateway);
    let first = destinations(&forwarded(&stream)).remove(0);
    push(&gateway, &list("e", 2, &[("10.0.9.9:8000", "both")]));
    stream.set_property("upstream.address", first.as_str());
    stream.response_headers([(":status", "200")], false);
    stream.response_body("a", false);
    push(&gateway, &list("e", 3, TWO_AND_TWO));
    stream.response_body("b", true);
    gateway.assert_idle();
}

#[test]
fn the_body_that_comes_after_a_change_is_routed_by_the_new_list() {
    let gateway = Gateway::pushed(TWO_AND_TWO);
    let stream = gateway.stream();
    let request = short_chat(1);
    stream.request_headers(request.headers.iter().map(|(name, value)| (name, value)), false);
    push(&gateway, &list("e", 2, &[("10.0.9.9:8000", "both")]));
    stream.request_body(request.chunks.concat(), true);
    assert_eq!(destinations(&forwarded(&stream)), ["10.0.9.9:8000"]);
    respond(&stream);
    gateway.assert_idle();
}

/// Requests in every phase of their life: headers read, leg in flight, sent, answering.
struct InFlight {
    reading: Stream,
    prefilling: Stream,
    sent: Stream,
    answering: Stream,
}

impl InFlight {
    fn start(worker: &Worker) -> Self {
        let reading = worker.stream();
        reading.request_headers(short_chat(1).headers.iter().map(|(name, value)| (name, value)), false);
        let sent = short_chat(2).send(worker);
        let answering = short_chat(3).send(worker);
        answering.set_property("upstream.address", destinations(&forwarded(&answering))[0].as_str());
        answering.response_headers([(":status", "200")], false);
        let prefilling = long_chat(4).send(worker);
        Self { reading, prefilling, sent, answering }
    }

    /// Lets all of them end; returns where the first and second went.
    fn finish(self, worker: &Worker) -> [Vec<String>; 2] {
        self.reading.request_body(short_chat(1).chunks.concat(), true);
        answer_leg(worker);
        let went = [&self.reading, &self.prefilling].map(|stream| destinations(&forwarded(stream)));
        for stream in [&self.reading, &self.prefilling, &self.sent] {
            respond(stream);
        }
        self.answering.response_body("a", true);
        went
    }
}

const NEW: &str = "10.0.9.9:8000";

#[test]
fn streams_of_an_earlier_root_finish_by_its_configuration() {
    let gateway = Gateway::new(&two_and_two());
    let old = gateway.root();
    let in_flight = InFlight::start(&gateway);
    gateway.add_root(config(&[], &[(NEW, "both")], "").as_bytes());
    let stream = short_chat(9).send(&gateway);
    assert_eq!(destinations(&forwarded(&stream)), [NEW]);
    respond(&stream);
    for went in in_flight.finish(&gateway) {
        assert!(went.iter().all(|address| [D1, D2].contains(&address.as_str())), "{went:?}");
    }
    gateway.retire_root(old);
    gateway.assert_idle();
}

#[test]
fn a_root_that_retires_leaves_its_gauges_at_zero() {
    let gateway = Gateway::new(&two_and_two());
    let old = gateway.root();
    let in_flight = InFlight::start(&gateway);
    gateway.tick();
    assert_eq!(gateway.shared.gauge("pd_decode_in_flight"), 2);
    gateway.add_root(two_and_two().as_bytes());
    in_flight.finish(&gateway);
    // No tick between the end of its last stream and its own.
    gateway.retire_root(old);
    gateway.assert_idle();
    assert_eq!(gateway.shared.counter("pd_requests_total;decision=decode_only"), 3);
}

#[test]
fn streams_of_an_earlier_generation_finish_by_its_configuration() {
    let mut fleet = fleet(1, &two_and_two());
    let in_flight = InFlight::start(&fleet.workers()[0]);
    fleet.reconfigure(config(&[], &[(NEW, "both")], "").as_bytes(), None).unwrap();
    let stream = short_chat(9).send(&fleet.workers()[0]);
    assert_eq!(destinations(&forwarded(&stream)), [NEW]);
    respond(&stream);
    for went in in_flight.finish(&fleet.draining()[0]) {
        assert!(went.iter().all(|address| [D1, D2].contains(&address.as_str())), "{went:?}");
    }
    assert_eq!(fleet.violations(), []);
    fleet.retire();
    fleet.tick();
    assert_gauges_are_zero(fleet.shared());
}

#[test]
fn an_answer_for_a_root_that_is_gone_changes_nothing() {
    let gateway = Gateway::new(&controlled());
    gateway.tick();
    let poll = polls(&gateway).remove(0);
    let old = gateway.root();
    gateway.add_root(two_and_two().as_bytes());
    gateway.retire_root(old);
    gateway.answer(poll.token, [(":status", "200")], list("e", 1, TWO_AND_TWO)).unwrap();
    assert_eq!(polls(&gateway), []);
    gateway.assert_idle();
}
