//! Legs that fail, endpoints and clients that leave.

use super::*;

#[test]
fn a_failed_prefill_goes_to_another_endpoint_then_to_the_pools_policy() {
    for (policy, last) in [("decode_only", None), ("fail", Some((503, "prefill_failed")))] {
        let mut t = configured(&CONFIG.replacen(
            '{',
            &format!(r#"{{"pools":{{"default":{{"on_prefill_failure":"{policy}"}}}},"#),
            1,
        ));
        t.headers(&[]);
        let first = leg_destination(&t.body(&long_body()));
        let second = t.answer(503, "upstream connect error or disconnect/reset before headers");
        assert_eq!(second.flow, Flow::Pause);
        assert_ne!(first.split(',').next(), leg_destination(&second).split(',').next());
        let third = t.answer(500, "{}");
        match last {
            Some(expected) => assert_eq!(reply(&third), expected),
            None => {
                assert_eq!((state(&third, DECISION), state(&third, REASON)), ("decode_only", "prefill_failed"));
                assert_eq!(edited(&third, &long_body()), long_body());
            }
        }
        t.done();
        assert!(t.is_idle());
        assert_eq!(t.worker.counts.pending(Metric::PrefillRetries), 1);
    }
}

#[test]
fn an_unreachable_endpoint_is_left_out_by_the_next_request() {
    let mut t = fixture();
    t.headers(&[]);
    let dead = leg_destination(&t.body(&long_body())).split(',').next().unwrap().to_owned();
    t.answer(503, "upstream connect error");
    t.done();
    t.request = Request::default();
    t.headers(&[]);
    let next = leg_destination(&t.body(&long_body()));
    assert!(!next.split(',').any(|address| address == dead), "{next}");
}

#[test]
fn an_engines_own_refusal_is_passed_on_at_once() {
    let mut t = fixture();
    t.headers(&[]);
    t.body(&long_body());
    let outcome = t.answer(400, r#"{"error":"too long"}"#);
    let Some(Effect::Reply(reply)) = outcome.effects.last() else { panic!("{outcome:?}") };
    assert_eq!((reply.status, reply.body.as_slice()), (400, &br#"{"error":"too long"}"#[..]));
    assert!(t.is_idle());
}

#[test]
fn envoys_retry_to_an_alternate_moves_the_load() {
    let mut t = fixture();
    t.headers(&[]);
    let outcome = t.body(r#"{"model":"m","messages":[]}"#);
    let addresses: Vec<_> = state(&outcome, DESTINATION).split(',').map(str::to_owned).collect();
    t.request.response_headers(&mut t.worker, Some(addresses[1].as_bytes()), None, t.now);
    let load = |t: &Fixture, address: &str| {
        let (_, slot) = t.worker.state.table.iter().find(|(_, slot)| &*slot.address == address).unwrap();
        (slot.decode.requests, slot.health.is_failing())
    };
    assert_eq!(load(&t, &addresses[0]), (0, true));
    assert_eq!(load(&t, &addresses[1]), (1, false));
    assert_eq!(t.worker.counts.pending(Metric::DecodeMoved), 1);
    t.done();
    assert!(t.is_idle());
}

#[test]
fn a_client_that_leaves_between_the_legs_is_counted_and_its_leg_runs_out() {
    let mut t = fixture();
    t.headers(&[]);
    t.body(&long_body());
    t.done();
    assert_eq!(t.worker.counts.pending(Metric::KvStranded), 1);
    assert_eq!(t.answer(200, "{}").effects, [], "a late answer changes nothing");
    t.worker.prune(t.now + Duration::from_secs(1));
    assert!(t.is_idle());
}

#[test]
fn an_endpoint_that_leaves_the_list_in_mid_request_disturbs_nothing() {
    let mut t = fixture();
    t.headers(&[]);
    t.body(&long_body());
    let list = br#"{"wire":1,"epoch":"e","version":1,"endpoints":[{"address":"10.0.0.9:9","role":"decode"}]}"#;
    t.worker.apply(list).unwrap();
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    // The candidates of the request are gone; what took their places in the table was never chosen.
    assert!(matches!(outcome.effects.last(), Some(Effect::Reply(_) | Effect::EditBody(_))), "{outcome:?}");
    t.done();
    assert!(t.is_idle());
}

#[test]
fn a_prefill_leg_that_fails_beside_its_decode_leg_ends_the_request() {
    for (status, body, expected) in [
        (503, "upstream connect error", (503, "prefill_failed")),
        (500, "{}", (503, "prefill_failed")),
        (400, r#"{"error":"too long"}"#, (400, "prefill_answer")),
    ] {
        for held in [false, true] {
            let mut t = of_engine("sglang");
            t.headers(&[]);
            let sent = t.body(&long_body());
            let decode = state(&sent, DECODE).to_owned();
            if held {
                t.request.response_headers(&mut t.worker, Some(decode.as_bytes()), Some(200), t.now);
            }
            let outcome = t.answer(status, body);
            assert_eq!(reply(&outcome), expected);
            t.done();
            assert!(t.is_idle());
        }
    }
}

#[test]
fn retries_end_when_their_budget_is_spent() {
    let mut t = fixture();
    for i in 0..40 {
        t.request = Request::default();
        t.headers(&[]);
        t.body(&long_body().replace("word", &format!("w{i}")));
        while t.request.is_prefilling() {
            t.answer(500, "{}");
        }
        t.done();
    }
    let retries = t.worker.counts.pending(Metric::PrefillRetries);
    assert_eq!(retries + t.worker.counts.pending(Metric::RetriesDenied), 40);
    assert!((10..=18).contains(&retries), "{retries}");
    assert!(t.is_idle());
}

#[test]
fn a_decode_endpoint_that_refuses_does_not_wait_for_the_prefill_leg() {
    let mut t = of_engine("sglang");
    t.headers(&[]);
    let sent = t.body(&long_body());
    let decode = state(&sent, DECODE).to_owned();
    let flow = t.request.response_headers(&mut t.worker, Some(decode.as_bytes()), Some(503), t.now).flow;
    assert_eq!(flow, Flow::Continue);
    assert_eq!(t.answer(503, "upstream connect error").effects, [], "the client has its answer");
    t.done();
    assert!(t.is_idle());
}

#[test]
fn a_client_that_leaves_while_both_legs_run_leaves_nothing_behind() {
    let mut t = of_engine("sglang");
    t.headers(&[]);
    t.body(&long_body());
    t.done();
    assert_eq!(t.worker.counts.pending(Metric::KvStranded), 1);
    assert_eq!(t.answer(200, "{}").effects, []);
    t.worker.prune(t.now + Duration::from_secs(1));
    assert!(t.is_idle());
}
