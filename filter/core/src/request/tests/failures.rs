//! Legs that fail, endpoints and clients that leave.

use super::*;
use crate::endpoints::beliefs::Belief;
use crate::request::effect::{MAX_RETRIES, RETRY_ON};

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
fn a_refusal_of_two_engines_is_the_clients_error() {
    let mut t = fixture();
    t.headers(&[]);
    let first = leg_destination(&t.body(&long_body()));
    let second = leg_destination(&t.answer(400, r#"{"error":"too long"}"#));
    assert_ne!(first.split(',').next(), second.split(',').next());
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
    t.request.response_headers(&mut t.worker, Answerer::Host(addresses[1].as_bytes()), None, t.now);
    let load = |t: &Fixture, address: &str| {
        let (_, state) = t.worker.state.table.iter().find(|(_, state)| &*state.address == address).unwrap();
        (state.decode.requests, state.health.is_failing())
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
                t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(200), t.now);
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
    let flow = t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(503), t.now).flow;
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

/// Sends a long prompt and answers each prefill leg by its endpoint; the last outcome, and the warnings on the way.
fn split_by(t: &mut Fixture, number: usize, bad: &str, status: u16) -> (Outcome, usize) {
    t.request = Request::default();
    t.headers(&[]);
    let mut outcome = t.body(&long_body().replace("word", &format!("w{number}")));
    let mut warnings = 0;
    while t.request.is_prefilling() {
        let is_bad = leg_destination(&outcome).split(',').next() == Some(bad);
        let good = format!(r#"{{"kv_transfer_params":{PARAMS}}}"#);
        outcome = if is_bad { t.answer(status, "{}") } else { t.answer(200, &good) };
        warnings += outcome.effects.iter().filter(|effect| matches!(effect, Effect::Warn(_))).count();
    }
    (outcome, warnings)
}

#[test]
fn a_prefill_endpoint_that_fails_alone_is_ejected_and_no_client_sees_its_error() {
    for status in [404, 401, 403, 400, 500, 503, 429] {
        let mut t = fixture();
        let mut warnings = 0;
        for number in 0..60 {
            let (outcome, more) = split_by(&mut t, number, "10.0.0.1:1", status);
            assert_eq!(state(&outcome, REASON), "prefilled", "{status}, request {number}");
            warnings += more;
            t.done();
        }
        let count = |metric| t.worker.counts.pending(metric);
        assert!((3..=5).contains(&count(Metric::PrefillRetries)), "{status}: {}", count(Metric::PrefillRetries));
        assert_eq!(count(Metric::RetriesDenied), 0);
        let outliers = [Metric::OutliersServer, Metric::OutliersOverload, Metric::OutliersRefusal].map(count);
        assert_eq!((outliers.iter().sum::<i64>(), warnings), (1, 1), "{status}");
        assert!(t.is_idle());
    }
}

/// Sends short prompts that are in flight together with others, and counts those that the failing endpoint got.
fn wins_of_a_failing_decode_endpoint(servers: usize, requests: usize, status: u16) -> usize {
    wins_of_failing_decode_endpoints((1, servers), requests, status)
}

/// As [`wins_of_a_failing_decode_endpoint`], where the first `bad` of the endpoints fail.
fn wins_of_failing_decode_endpoints((bad, servers): (usize, usize), requests: usize, status: u16) -> usize {
    let list: Vec<_> =
        (1..=servers).map(|port| format!(r#"{{"address":"10.0.0.2:{port}","role":"decode"}}"#)).collect();
    let mut t = configured(&format!(r#"{{"endpoints":[{}]}}"#, list.join(",")));
    let mut in_flight = std::collections::VecDeque::new();
    let mut wins = 0;
    for number in 0..requests {
        t.request = Request::default();
        t.headers(&[]);
        let outcome = t.body(&format!(r#"{{"model":"m","messages":[{{"role":"user","content":"w{number}"}}]}}"#));
        let decode = state(&outcome, DECODE).to_owned();
        let is_bad = (1..=bad).any(|port| decode == format!("10.0.0.2:{port}"));
        wins += usize::from(is_bad);
        let status = if is_bad { status } else { 200 };
        t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(status), t.now);
        if is_bad {
            t.done();
        } else {
            // A good endpoint generates for as long as the next requests come.
            in_flight.push_back(core::mem::take(&mut t.request));
        }
        if in_flight.len() > 16
            && let Some(mut request) = in_flight.pop_front()
        {
            request.done(&mut t.worker, t.now);
        }
    }
    wins
}

/// thushan/olla#144.
#[test]
fn a_decode_endpoint_that_fails_at_once_does_not_win() {
    for status in [500, 503, 429] {
        let wins =
            [wins_of_a_failing_decode_endpoint(8, 800, status), wins_of_a_failing_decode_endpoint(2, 100, status)];
        assert!(wins.iter().all(|wins| (3..=8).contains(wins)), "{status}: {wins:?}");
    }
}

#[test]
fn most_of_a_pool_that_fails_at_once_does_not_win() {
    for (bad, servers) in [(2, 3), (3, 4), (6, 8)] {
        for status in [500, 503, 429] {
            let wins = wins_of_failing_decode_endpoints((bad, servers), 1_000, status);
            assert!((3 * bad..=10 * bad).contains(&wins), "{bad} of {servers}, {status}: {wins}");
        }
    }
}

#[test]
fn a_decode_endpoint_that_refuses_everything_at_once_does_not_win() {
    for status in [401, 403, 404] {
        let wins =
            [wins_of_a_failing_decode_endpoint(8, 800, status), wins_of_a_failing_decode_endpoint(2, 200, status)];
        assert!(wins.iter().all(|wins| (16..=24).contains(wins)), "{status}: {wins:?}");
    }
    // What is wrong with a body, all endpoints refuse.
    let wins = wins_of_a_failing_decode_endpoint(2, 200, 400);
    assert!(wins > 100, "{wins}");
}

#[test]
fn a_client_whose_requests_are_refused_ejects_no_endpoint_that_serves_others() {
    let mut t = fixture();
    for number in 0..400 {
        for status in [404, 404, 404, 200] {
            t.request = Request::default();
            t.headers(&[]);
            let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{status}-{number}"}}]}}"#);
            let decode = state(&t.body(&body), DECODE).to_owned();
            t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(status), t.now);
            t.done();
            assert_eq!(failing(&t, ""), [""; 0], "{number}");
        }
    }
}

/// Sends a short request that is answered after so many seconds, with a good one after a second in between, where another
/// endpoint has it. `end` is what happens to the first one.
fn silent(t: &mut Fixture, stream: bool, seconds: u64, peers_answer: bool, end: impl FnOnce(&mut Fixture)) -> String {
    t.request = Request::default();
    t.headers(&[]);
    let body =
        |text: &str| format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}],"stream":{stream}}}"#);
    let decode = state(&t.body(&body("first")), DECODE).to_owned();
    let mut waiting = core::mem::take(&mut t.request);
    t.now = t.now.saturating_add(Duration::from_secs(1));
    t.headers(&[]);
    let other = state(&t.body(&body("second")), DECODE).to_owned();
    assert_ne!(decode, other, "the test's own");
    if peers_answer {
        t.request.response_headers(&mut t.worker, Answerer::Host(other.as_bytes()), Some(200), t.now);
    }
    t.done();
    core::mem::swap(&mut t.request, &mut waiting);
    t.now = t.now.saturating_add(Duration::from_secs(seconds - 1));
    end(t);
    t.done();
    assert!(t.is_idle());
    decode
}

#[test]
fn a_decode_endpoint_that_is_silent_while_others_answer_is_ejected() {
    let limit = |t: &mut Fixture| {
        t.request.response_headers(&mut t.worker, Answerer::Envoy, Some(504), t.now);
    };
    let leaves = |_: &mut Fixture| {};
    let mut t = fixture();
    assert_eq!([silent(&mut t, true, 60, true, limit)].as_slice(), failing(&t, ""), "a limit of Envoy's");
    assert_eq!(t.worker.counts.pending(Metric::DecodeUnanswered), 1);
    let mut t = fixture();
    assert_eq!([silent(&mut t, true, 60, true, leaves)].as_slice(), failing(&t, ""), "a client that gives up");
    let mut t = fixture();
    assert_eq!([silent(&mut t, false, 60, true, limit)].as_slice(), failing(&t, ""));
    for (stream, seconds, peers_answer, why) in [
        (true, 59, true, "no longer than a prefill leg may take"),
        (true, 60, false, "nobody answers"),
        (false, 60, true, "a long answer that is no stream"),
    ] {
        let mut t = fixture();
        silent(&mut t, stream, seconds, peers_answer, leaves);
        assert_eq!(failing(&t, ""), [""; 0], "{why}");
    }
    // It answers others meanwhile: the request alone is slow.
    let mut t = fixture();
    silent(&mut t, true, 60, true, |t| {
        let (mut waiting, mut answered) = (core::mem::take(&mut t.request), Vec::new());
        for number in 0..4 {
            t.request = Request::default();
            t.headers(&[]);
            let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"m{number}"}}]}}"#);
            let decode = state(&t.body(&body), DECODE).to_owned();
            t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(200), t.now);
            // Requests in flight spread over both endpoints.
            answered.push(core::mem::take(&mut t.request));
        }
        answered.iter_mut().for_each(|request| request.done(&mut t.worker, t.now));
        core::mem::swap(&mut t.request, &mut waiting);
    });
    assert_eq!(failing(&t, ""), [""; 0]);
}

#[test]
fn a_pool_whose_endpoints_all_fail_stays() {
    let mut t = fixture();
    for number in 0..60 {
        for index in 0..2 {
            t.request = Request::default();
            t.headers(&[]);
            let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"w{number}-{index}"}}]}}"#);
            let decode = state(&t.body(&body), DECODE).to_owned();
            t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(429), t.now);
            t.done();
        }
        t.now = t.now.saturating_add(Duration::from_secs(6));
    }
    let failing = t.worker.state.table.iter().filter(|(_, state)| state.health.is_failing()).count();
    assert!(failing <= 1, "{failing}");
}

/// Ports of the failing endpoints whose addresses begin so.
fn failing(t: &Fixture, host: &str) -> Vec<String> {
    let states = t.worker.state.table.iter().map(|(_, state)| state);
    let failing = states.filter(|state| state.health.is_failing() && state.address.starts_with(host));
    failing.map(|state| state.address.to_string()).collect()
}

#[test]
fn an_answer_of_envoys_own_is_no_endpoints_fault() {
    let mut t = fixture();
    for status in [429, 403, 401, 503, 504] {
        for _ in 0..20 {
            t.request = Request::default();
            t.headers(&[]);
            t.body(r#"{"model":"m","messages":[]}"#);
            t.request.response_headers(&mut t.worker, Answerer::Envoy, Some(status), t.now);
            t.done();
        }
    }
    assert_eq!(failing(&t, ""), [""; 0]);
    assert_eq!(t.worker.counts.pending(Metric::AnsweredByEnvoy), 100);
    assert_eq!(t.worker.counts.pending(Metric::DecodeUnanswered), 0);
    assert!(t.is_idle());
}

#[test]
fn a_failed_attempt_is_that_of_every_endpoint_up_to_the_last_one() {
    for last in 0..2 {
        let mut t = fixture();
        t.headers(&[]);
        let outcome = t.body(r#"{"model":"m","messages":[]}"#);
        let mut tried: Vec<_> = state(&outcome, DESTINATION).split(',').map(str::to_owned).collect();
        let answerer = Answerer::FailedAttempt(Some(tried[last].as_bytes()));
        t.request.response_headers(&mut t.worker, answerer, Some(503), t.now);
        tried.truncate(last + 1);
        tried.sort();
        assert_eq!(failing(&t, ""), tried);
        t.done();
        assert_eq!(t.worker.counts.pending(Metric::DecodeUnanswered), 1);
        assert!(t.is_idle());
    }
}

#[test]
fn a_leg_that_envoy_did_not_send_is_no_endpoints_fault() {
    for body in
        ["no healthy upstream", "upstream connect error or disconnect/reset before headers. reset reason: overflow"]
    {
        let mut t = fixture();
        t.headers(&[]);
        t.body(&long_body());
        while t.request.is_prefilling() {
            t.answer(503, body);
        }
        assert_eq!(failing(&t, ""), [""; 0], "{body}");
        t.done();
        assert!(t.is_idle());
    }
}

#[test]
fn a_refusal_behind_a_prefill_leg_is_stranded_and_leaves_no_prompt_at_the_decode_endpoint() {
    let mut t = fixture();
    t.headers(&[]);
    t.body(&long_body());
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    let decode = state(&outcome, DECODE).to_owned();
    let held = |t: &Fixture| t.worker.state.index.len();
    let believed = held(&t);
    t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(400), t.now);
    t.done();
    assert_eq!(t.worker.counts.pending(Metric::KvStrandedRefused), 1);
    assert_eq!(held(&t), believed / 2, "the prefill endpoint's blocks are left");

    // What it held before, it still holds.
    for status in [200, 400] {
        t.request = Request::default();
        t.headers(&[]);
        let outcome = t.body(&long_body());
        assert!(t.request.is_prefilling() == (status == 200), "{outcome:?}");
        let outcome =
            if status == 200 { t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#)) } else { outcome };
        let decode = state(&outcome, DECODE).to_owned();
        t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(status), t.now);
        t.done();
        assert_eq!(held(&t), believed, "{status}");
    }
    assert_eq!(t.worker.counts.pending(Metric::KvStrandedRefused), 1, "a whole request strands nothing");
    assert!(t.is_idle());
}

/// Blocks that a prefill endpoint is believed to hold, of a prompt that was held nowhere before.
fn believed(t: &Fixture) -> usize {
    t.worker.state.index.len()
}

#[test]
fn a_prompt_that_prefill_endpoints_refuse_is_not_believed_to_be_held_there() {
    let mut t = fixture();
    t.headers(&[]);
    t.body(&long_body());
    assert!(believed(&t) > 0);
    t.answer(400, r#"{"error":"too long"}"#);
    let outcome = t.answer(400, r#"{"error":"too long"}"#);
    assert_eq!(reply(&outcome).0, 400);
    assert_eq!(believed(&t), 0);
    t.done();

    // What an endpoint held before, it still holds.
    t.request = Request::default();
    t.headers(&[]);
    t.body(&long_body());
    t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    t.done();
    let held = believed(&t);
    t.request = Request::default();
    t.headers(&[("x-pd-phase", "prefill")]);
    t.body(&long_body());
    t.done();
    assert_eq!(believed(&t), held);
}

#[test]
fn a_prompt_that_a_prefill_endpoint_refuses_beside_the_decode_leg_is_not_believed_to_be_held_there() {
    let mut t = of_engine("sglang");
    t.headers(&[]);
    let outcome = t.body(&long_body());
    let decode = state(&outcome, DECODE).to_owned();
    let both = believed(&t);
    t.answer(400, r#"{"error":"too long"}"#);
    assert_eq!(believed(&t), both / 2, "the decode endpoint has not answered");
    t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(400), t.now);
    t.done();
    assert!(t.is_idle());
}

const TIMEOUT: &str = "upstream request timeout";

/// sgl-project/sglang#9803, Layr-Labs/d-inference#681: slow prompts were aborted and counted as outages.
#[test]
fn a_leg_over_its_limit_is_no_mark_against_an_endpoint_that_answers_others() {
    for policy in ["decode_only", "fail"] {
        let pool = format!(
            r#"{{"pools":{{"default":{{"on_prefill_failure":"{policy}","prefill_attempts":3,"affinity_weight":3}}}},"#
        );
        let mut t = configured(&CONFIG.replacen('{', &pool, 1));
        t.headers(&[]);
        let slow = leg_destination(&t.body(&long_body())).split(',').next().unwrap().to_owned();
        let mut waiting = core::mem::take(&mut t.request);
        t.now = t.now.saturating_add(Duration::from_secs(1));
        for number in 0..20 {
            let (outcome, _) = split_by(&mut t, number, "none", 500);
            assert_eq!(state(&outcome, REASON), "prefilled");
            t.done();
        }
        let answered = |t: &Fixture| {
            let (_, state) = t.worker.state.table.iter().find(|(_, state)| *state.address == *slow).unwrap();
            state.answered_at > Monotonic::from_secs(5)
        };
        assert!(answered(&t), "the test's own: the endpoint got another leg");
        core::mem::swap(&mut t.request, &mut waiting);
        t.now = t.now.saturating_add(Duration::from_secs(60));
        let outcome = t.answer(504, TIMEOUT);
        if policy == "fail" {
            assert_eq!(reply(&outcome), (503, "prefill_failed"));
        } else {
            assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), ("decode_only", "prefill_timeout"));
        }
        t.done();
        assert_eq!(failing(&t, ""), [""; 0]);
        assert_eq!(t.worker.counts.pending(Metric::PrefillTimedOut), 1);
        assert_eq!(t.worker.counts.pending(Metric::PrefillRetries), 0);
        assert!(t.is_idle());
    }
}

#[test]
fn a_leg_over_its_limit_at_an_endpoint_that_answers_nothing_is_tried_elsewhere() {
    let mut t = fixture();
    t.headers(&[]);
    let dead = leg_destination(&t.body(&long_body())).split(',').next().unwrap().to_owned();
    t.now = t.now.saturating_add(Duration::from_secs(60));
    let second = t.answer(504, TIMEOUT);
    assert_ne!(leg_destination(&second).split(',').next(), Some(&*dead));
    assert_eq!(failing(&t, ""), [dead]);
    t.done();
}

#[test]
fn the_limit_of_a_leg_follows_the_queue_and_the_prompt() {
    // Two seconds for each prompt, whatever its length.
    let pool = r#"{"pools":{"default":{"prefill_timeout_ms":3000,"cost":{"a_ms":2000,"b_us":0,"c_ns":0}}},"#;
    let mut t = configured(
        &CONFIG.replacen('{', pool, 1).replace(r#"{"address": "10.0.0.1:2", "role": "prefill", "models": ["m"]},"#, ""),
    );
    let mut limits = Vec::new();
    for number in 0..3 {
        t.request = Request::default();
        t.headers(&[]);
        limits.push(call(&t.body(&long_body().replace("word", &format!("w{number}")))).timeout.as_secs_f64());
    }
    assert_eq!(limits, [8.0, 16.0, 24.0]);
    let quick = configured(&CONFIG.replacen('{', r#"{"pools":{"default":{"prefill_timeout_ms":3000}},"#, 1));
    let mut t = quick;
    t.headers(&[]);
    assert_eq!(call(&t.body(&long_body())).timeout, Duration::from_secs(3));
}

#[test]
fn a_prefill_endpoint_that_answers_for_absent_ones_does_not_reach_the_client() {
    let mut t = fixture();
    let short = r#"{"model":"m","messages":[]}"#;
    t.headers(&[]);
    t.body(short);
    let outcome = t.request.response_headers(&mut t.worker, Answerer::Host(b"10.0.0.1:1"), Some(200), t.now);
    assert_eq!(reply(&outcome), (503, "wrong_endpoint"));
    let warnings: Vec<_> = outcome.effects.iter().filter(|effect| matches!(effect, Effect::Warn(_))).collect();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    t.done();
    assert!(t.is_idle());
    assert_eq!(t.worker.counts.pending(Metric::AnsweredByOther), 1);

    // Neither of them gets a request before its probe is due.
    t.request = Request::default();
    t.headers(&[]);
    assert_eq!(reply(&t.body(short)), (503, "no_endpoint"));
    t.now = t.now.saturating_add(Duration::from_millis(500));
    t.request = Request::default();
    t.headers(&[]);
    let decode = state(&t.body(short), DECODE).to_owned();
    let outcome = t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(200), t.now);
    assert_eq!(outcome.effects, []);
    t.done();
    assert_eq!(failing(&t, "10.0.0.2").len(), 1, "the one that was probed is back");
    assert!(t.is_idle());
}

#[test]
fn a_host_outside_of_the_list_ejects_nothing() {
    let mut t = fixture();
    t.headers(&[]);
    t.body(r#"{"model":"m","messages":[]}"#);
    let outcome = t.request.response_headers(&mut t.worker, Answerer::Host(b"10.9.9.9:1"), Some(200), t.now);
    assert_eq!((outcome.flow, outcome.effects), (Flow::Continue, vec![]));
    t.done();
    assert_eq!((failing(&t, ""), t.worker.counts.pending(Metric::AnsweredByOther)), (vec![], 1));
}

/// The list has port 8080 of a pod, as its label says, and the Service behind Envoy's cluster port 8000.
#[test]
fn a_cluster_with_other_ports_than_the_list_is_named() {
    let mut t = fixture();
    let short = r#"{"model":"m","messages":[]}"#;
    t.headers(&[]);
    t.body(short);
    let tried = Answerer::FailedConnect(Some(b"10.0.0.1:8000"));
    let outcome = t.request.response_headers(&mut t.worker, tried, Some(503), t.now);
    assert_eq!(reply(&outcome), (503, "wrong_endpoint"));
    let Some(Effect::Reply(reply)) = outcome.effects.last() else { panic!("{outcome:?}") };
    assert!(String::from_utf8_lossy(&reply.body).contains("the Service behind its route"), "{reply:?}");
    let warnings =
        outcome.effects.iter().filter_map(|effect| if let Effect::Warn(text) = effect { Some(text) } else { None });
    let warnings: Vec<_> = warnings.collect();
    assert!(
        warnings.len() == 2
            && warnings.iter().all(|it| it.contains("Envoy went to 10.0.0.1:8000. If the ports differ: the Service")),
        "{warnings:?}"
    );
    t.done();
    assert!(t.is_idle());
    assert_eq!(t.worker.counts.pending(Metric::AnsweredByOther), 1);

    // A host of another pod says nothing of ports.
    let mut t = fixture();
    t.headers(&[]);
    t.body(short);
    let tried = Answerer::FailedConnect(Some(b"10.9.9.9:8000"));
    assert_eq!(t.request.response_headers(&mut t.worker, tried, Some(503), t.now).effects, []);
    t.done();
}

#[test]
fn another_decode_endpoint_that_answers_has_the_request() {
    let mut t = configured(&CONFIG.replacen('{', r#"{"pools":{"default":{"alternates":0}},"#, 1));
    t.headers(&[]);
    let decode = state(&t.body(r#"{"model":"m","messages":[]}"#), DECODE).to_owned();
    let other = if decode == "10.0.0.2:1" { "10.0.0.2:2" } else { "10.0.0.2:1" };
    let outcome = t.request.response_headers(&mut t.worker, Answerer::Host(other.as_bytes()), Some(200), t.now);
    assert_eq!(outcome.flow, Flow::Continue);
    let requests_at = |t: &Fixture, address: &str| {
        let (_, state) = t.worker.state.table.iter().find(|(_, state)| &*state.address == address).unwrap();
        state.decode.requests
    };
    assert_eq!((requests_at(&t, &decode), requests_at(&t, other)), (0, 1));
    assert_eq!(failing(&t, ""), [decode]);
    t.done();
    assert!(t.is_idle());
}

/// Sends a long prompt by both legs or whole; the decode endpoint answers `split` or `whole`. Returns the reason.
fn decoded_by(t: &mut Fixture, number: usize, split: u16, whole: u16) -> String {
    let (outcome, _) = split_by(t, number, "none", 500);
    let reason = state(&outcome, REASON).to_owned();
    let status = if reason == "prefilled" { split } else { whole };
    let decode = state(&outcome, DECODE).to_owned();
    t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(status), t.now);
    t.done();
    reason
}

#[test]
fn a_prefill_endpoint_whose_kv_caches_cannot_be_fetched_gets_no_prompts() {
    let one = CONFIG.replace(r#"{"address": "10.0.0.1:2", "role": "prefill", "models": ["m"]},"#, "");
    let mut t = configured(&one);
    let reasons: Vec<_> = (0..20).map(|number| decoded_by(&mut t, number, 500, 200)).collect();
    assert_eq!(reasons.iter().filter(|reason| *reason == "prefilled").count(), 3, "{reasons:?}");
    assert!(reasons[3..].iter().all(|reason| reason == "no_prefill_endpoint"));
    assert_eq!(t.worker.counts.pending(Metric::OutliersHandover), 1);
    assert_eq!(failing(&t, ""), ["10.0.0.1:1"]);

    // One probe each pause; it heals the endpoint where the decode endpoint answers well.
    t.now = t.now.saturating_add(Duration::from_secs(5));
    let reasons: Vec<_> = (20..30).map(|number| decoded_by(&mut t, number, 500, 200)).collect();
    assert_eq!(reasons.iter().filter(|reason| *reason == "prefilled").count(), 1, "{reasons:?}");
    t.now = t.now.saturating_add(Duration::from_secs(10));
    assert!((30..40).all(|number| decoded_by(&mut t, number, 200, 200) == "prefilled"));
    assert_eq!((failing(&t, ""), t.worker.counts.pending(Metric::OutliersHandover)), (vec![], 1));
    assert!(t.is_idle());
}

#[test]
fn decode_endpoints_that_fail_at_everything_blame_no_prefill_endpoint() {
    let mut t = fixture();
    for number in 0..40 {
        t.request = Request::default();
        t.headers(&[]);
        let short = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"w{number}"}}]}}"#);
        let decode = state(&t.body(&short), DECODE).to_owned();
        t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(500), t.now);
        t.done();
        decoded_by(&mut t, number, 500, 500);
    }
    assert_eq!(failing(&t, "10.0.0.1"), [""; 0]);
    assert_eq!(t.worker.counts.pending(Metric::OutliersHandover), 0);
}

/// Blocks of the long prompt that the index has for an endpoint.
fn held(t: &Fixture, address: &str) -> usize {
    let (index, _) = t.worker.state.table.iter().find(|(_, state)| &*state.address == address).unwrap();
    t.worker.state.index.newest(index, 1_000).count()
}

#[test]
fn what_an_endpoint_holds_is_forgotten_where_nothing_listens_there() {
    let refused = "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure, \
                   transport failure reason: delayed connect error: 111";
    for (body, is_forgotten) in
        [(refused, true), ("upstream connect error. reset reason: connection termination", false)]
    {
        let mut t = fixture();
        t.headers(&[]);
        let prefill = leg_destination(&t.body(&long_body())).split(',').next().unwrap().to_owned();
        assert!(held(&t, &prefill) > 0);
        t.answer(503, body);
        assert_eq!(held(&t, &prefill) == 0, is_forgotten, "{body}");
        t.done();
        assert_eq!(t.worker.counts.pending(Metric::CachesForgotten), i64::from(is_forgotten));
    }
    let mut t = fixture();
    t.headers(&[]);
    // Long enough for a block, too short to be split.
    let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}]}}"#, "word ".repeat(140));
    let decode = state(&t.body(&body), DECODE).to_owned();
    let before = held(&t, &decode);
    t.request.response_headers(&mut t.worker, Answerer::FailedConnect(Some(decode.as_bytes())), Some(503), t.now);
    assert_eq!((before > 0, held(&t, &decode)), (true, 0));
    t.done();
}

#[test]
fn what_an_endpoint_holds_is_forgotten_after_answers_that_say_otherwise() {
    // What it had cached of 1,000 tokens, answer by answer; after how many answers it is forgotten.
    for (cached, after) in [(&[0, 0, 0][..], 2), (&[300, 300, 300, 300], 3), (&[0, 900, 0, 900, 300], 0)] {
        let mut t = fixture();
        t.headers(&[]);
        t.body(&long_body());
        t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        t.done();
        let (index, _) = t.worker.state.table.iter().find(|(_, state)| state.endpoint.address.port() == 1).unwrap();
        let endpoint = t.worker.state.table.refer(index).unwrap();
        let forgotten = |t: &Fixture| t.worker.counts.pending(Metric::CachesForgotten);
        let mut count = 0;
        for (number, cached) in cached.iter().enumerate() {
            t.worker.judge_belief(endpoint, Belief { tokens: 1_000.0, ..Belief::default() }, *cached);
            if forgotten(&t) > 0 && count == 0 {
                count = number + 1;
            }
        }
        assert_eq!(count, after, "{cached:?}");
        let missing: u64 = cached.iter().map(|cached| 1_000 - cached).sum();
        assert_eq!(t.worker.counts.pending(Metric::BelievedTokensMissing), missing as i64);
        t.worker.judge_belief(endpoint, Belief { tokens: 511.0, ..Belief::default() }, 0);
        assert_eq!(t.worker.counts.pending(Metric::BelievedTokensMissing), missing as i64, "too few to tell");
    }
}

#[test]
fn an_endpoint_that_returns_from_down_holds_nothing() {
    let mut t = fixture();
    t.headers(&[]);
    let prefill = leg_destination(&t.body(&long_body())).split(',').next().unwrap().to_owned();
    t.done();
    let mut list = |version: u64, prefill_state: &str| {
        let text = format!(
            r#"{{"wire":1,"epoch":"e","version":{version},"endpoints":[{{"address":"{prefill}","role":"prefill",
            "models":["m"],"state":"{prefill_state}"}},{{"address":"10.0.0.2:1","role":"decode","models":["m"]}}]}}"#
        );
        t.worker.apply(text.as_bytes()).unwrap();
        held(&t, &prefill)
    };
    assert!(list(1, "ready") > 0 && list(2, "draining") > 0 && list(3, "ready") > 0);
    assert!(list(4, "down") > 0, "the endpoint's requests may show it");
    assert_eq!(list(5, "ready"), 0);
}

#[test]
fn an_endpoint_holds_what_its_process_holds() {
    // What the list says of the process, one list after the other; whether the last one forgets.
    let container = |id: &str| format!(r#","container":"{id}""#);
    let start = |epoch: u32| format!(r#","cache_epoch":{epoch}"#);
    let down = r#","state":"down""#;
    for (lists, is_forgotten) in [
        (vec![container("a"), container("b")], true),
        (vec![start(1), start(2)], true),
        (vec![format!("{}{}", container("a"), start(1)), format!("{}{}", container("a"), start(2))], true),
        (vec![container("a"), container("a")], false),
        // A flap of readiness is no restart, where the process is known.
        (vec![start(1), format!("{}{down}", start(1)), start(1)], false),
        (vec![container("a"), format!("{}{down}", container("a")), container("a")], false),
        (vec![start(1), format!("{}{down}", start(1)), start(2)], true),
        // A source that does not know it for a moment knows it before and after.
        (vec![container("a"), down.to_owned(), container("a")], false),
        (vec![container("a"), down.to_owned(), container("b")], true),
        (vec![start(1), String::new(), start(1)], false),
        // Learning it is no news.
        (vec![String::new(), start(1)], false),
        (vec![container("a"), format!("{}{}", container("a"), start(1))], false),
        (vec![String::new(), down.to_owned(), String::new()], true),
    ] {
        let mut t = fixture();
        t.headers(&[]);
        let prefill = leg_destination(&t.body(&long_body())).split(',').next().unwrap().to_owned();
        t.done();
        for (version, process) in lists.iter().enumerate() {
            let text = format!(
                r#"{{"wire":1,"epoch":"e","version":{},"endpoints":[{{"address":"{prefill}","role":"prefill",
                "models":["m"]{process}}},{{"address":"10.0.0.2:1","role":"decode","models":["m"]}}]}}"#,
                version + 1
            );
            assert!(held(&t, &prefill) > 0, "{lists:?}");
            t.worker.apply(text.as_bytes()).unwrap();
        }
        assert_eq!(held(&t, &prefill) == 0, is_forgotten, "{lists:?}");
    }
}

#[test]
fn whole_requests_judge_what_an_endpoint_holds() {
    let whole = |number: usize| {
        let words = "word ".repeat(1_600);
        format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{words}"}}],"seed":{number}}}"#)
    };
    for (cached, after) in [(0, 2), (900, 3), (2_000, 0)] {
        let never = r#"{"pools":{"default":{"split":{"mode":"never"}}},"#;
        let mut t = configured(
            &CONFIG
                .replacen('{', never, 1)
                .replace(r#"{"address": "10.0.0.2:2", "role": "decode", "models": ["m"]}"#, "")
                .replace(r#""role": "decode", "models": ["m"]},"#, r#""role": "decode", "models": ["m"]}"#),
        );
        let mut forgotten = 0;
        for number in 0..5 {
            t.request = Request::default();
            t.headers(&[]);
            let decode = state(&t.body(&whole(number)), DECODE).to_owned();
            t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(200), t.now);
            let usage =
                format!(r#"{{"usage":{{"prompt_tokens":2000,"prompt_tokens_details":{{"cached_tokens":{cached}}}}}}}"#);
            assert_eq!(t.request.wants_response_body(), number > 0, "the first one is believed to find nothing");
            t.request.response_part(&mut t.worker, usage.as_bytes(), true, t.now);
            t.done();
            if t.worker.counts.pending(Metric::CachesForgotten) > 0 {
                forgotten = number;
                break;
            }
        }
        assert_eq!(forgotten, after, "{cached}");
    }
}

/// uvicorn closes a connection that was idle for 5 s, and a leg that meets it is lost.
#[test]
fn a_leg_that_meets_the_end_of_its_connection_is_tried_on_another_one() {
    const CUT: &str = "upstream connect error or disconnect/reset before headers. reset reason: connection termination";
    let one = CONFIG.replace(r#"{"address": "10.0.0.1:2", "role": "prefill", "models": ["m"]},"#, "");
    let good = format!(r#"{{"kv_transfer_params":{PARAMS}}}"#);
    // At the only endpoint that there is.
    let mut t = configured(&one);
    t.headers(&[]);
    let first = leg_destination(&t.body(&long_body()));
    assert_eq!(leg_destination(&t.answer(503, CUT)), first);
    let outcome = t.answer(200, &good);
    assert_eq!((state(&outcome, REASON), failing(&t, "10.0.0.1")), ("prefilled", vec![]));
    t.done();
    assert!(t.is_idle());
    // Once.
    let mut t = configured(&one);
    t.headers(&[]);
    t.body(&long_body());
    t.answer(503, CUT);
    let outcome = t.answer(503, CUT);
    assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), ("decode_only", "prefill_failed"));
    assert_eq!(t.worker.counts.pending(Metric::PrefillRetries), 1);
    t.done();
    // Elsewhere, where there is another one; and nowhere, where the pool allows one attempt or nothing listens there.
    let mut t = fixture();
    t.headers(&[]);
    let first = leg_destination(&t.body(&long_body()));
    assert_ne!(leg_destination(&t.answer(503, CUT)).split(',').next(), first.split(',').next());
    let refused = "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure";
    for (config, body) in
        [(one.replacen('{', r#"{"pools":{"default":{"prefill_attempts":1}},"#, 1), CUT), (one.clone(), refused)]
    {
        let mut t = configured(&config);
        t.headers(&[]);
        t.body(&long_body());
        assert_eq!(state(&t.answer(503, body), REASON), "prefill_failed");
        t.done();
    }
}

/// llm-d/llm-d-router#2427, ai-dynamo/dynamo#4220: prompts went to decode servers unnoticed while no prefill server was ready.
#[test]
fn a_pool_whose_decode_endpoints_are_not_to_compute_prompts_refuses_them_where_no_prefill_endpoint_is_ready() {
    let short = r#"{"model":"m","messages":[]}"#;
    for state in ["down", "draining"] {
        let list = CONFIG.replace(r#""role": "prefill","#, &format!(r#""role": "prefill", "state": "{state}","#));
        for (policy, is_served) in [("decode_only", true), ("fail", false)] {
            for mode in ["threshold", "always"] {
                let pool = format!(
                    r#"{{"pools":{{"default":{{"on_prefill_failure":"{policy}","split":{{"mode":"{mode}"}}}}}},"#
                );
                let mut t = configured(&list.replacen('{', &pool, 1));
                t.headers(&[]);
                let outcome = t.body(&long_body());
                if is_served {
                    assert_eq!(super::state(&outcome, REASON), "no_prefill_endpoint");
                } else {
                    assert_eq!(reply(&outcome), (503, "prefill_failed"), "{state} {mode}");
                }
                t.done();
                t.request = Request::default();
                t.headers(&[]);
                let outcome = t.body(short);
                if is_served || mode == "threshold" {
                    assert_eq!(super::state(&outcome, DECISION), "decode_only", "a short one is not to be split");
                }
                t.done();
                assert!(t.is_idle());
            }
        }
    }
}

/// llm-d/llm-d-router#2295: a reaper took requests that live for long out of the account, and endpoints seemed idle.
#[test]
fn a_request_that_takes_an_hour_counts_for_an_hour() {
    let mut t = fixture();
    t.headers(&[]);
    let decode = state(&t.body(r#"{"model":"m","messages":[]}"#), DECODE).to_owned();
    t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(200), t.now);
    t.request.first_byte(&mut t.worker, t.now);
    for _ in 0..60 {
        t.now = t.now.saturating_add(Duration::from_secs(60));
        t.worker.prune(t.now);
    }
    let (_, state) = t.worker.state.table.iter().find(|(_, state)| *state.address == *decode).unwrap();
    assert_eq!(state.decode.requests, 1);
    t.done();
    assert!(t.is_idle());
}

/// Sends a short request, which one of the endpoints fails; whether that one got it.
fn gets_next(t: &mut Fixture, number: usize, bad: &str, status: u16) -> bool {
    t.request = Request::default();
    t.headers(&[]);
    let outcome = t.body(&format!(r#"{{"model":"m","messages":[{{"role":"user","content":"w{number}"}}]}}"#));
    let decode = state(&outcome, DECODE).to_owned();
    let status = if decode == bad { status } else { 200 };
    t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(status), t.now);
    t.done();
    decode == bad
}

#[test]
fn a_probe_that_fails_again_lengthens_the_pause() {
    const BAD: &str = "10.0.0.2:1";
    let mut t = fixture();
    let mut number = 0;
    let mut wins = |t: &mut Fixture, status: u16| {
        number += 20;
        (number - 20..number).filter(|number| gets_next(t, *number, BAD, status)).count()
    };
    while failing(&t, "").is_empty() {
        wins(&mut t, 500);
    }
    assert_eq!((failing(&t, ""), wins(&mut t, 500)), (vec![BAD.to_owned()], 0));
    for pause in [500, 1_000, 2_000, 4_000, 5_000, 5_000] {
        t.now = t.now.saturating_add(Duration::from_millis(pause - 1));
        assert_eq!(wins(&mut t, 500), 0, "{pause}");
        t.now = t.now.saturating_add(Duration::from_millis(1));
        assert_eq!(wins(&mut t, 500), 1, "{pause}: the probe");
    }
    assert_eq!(t.worker.counts.pending(Metric::OutliersServer), 1);
    t.now = t.now.saturating_add(Duration::from_secs(5));
    assert!(wins(&mut t, 200) > 1, "the probe succeeds");
    assert_eq!(failing(&t, ""), [""; 0]);
}

/// llm-d/llm-d-router#2636, ai-dynamo/dynamo#13756: without decode servers the gateway says so.
#[test]
fn a_partner_that_leaves_during_the_prefill_leg_leaves_the_request_to_the_pools_policy() {
    for (policy, others, expected) in [
        ("decode_only", true, Ok(("decode_only", "no_partner"))),
        ("decode_only", false, Err((503, "no_endpoint"))),
        ("fail", true, Err((503, "prefill_failed"))),
        ("fail", false, Err((503, "prefill_failed"))),
    ] {
        let pool = format!(r#"{{"pools":{{"default":{{"on_prefill_failure":"{policy}"}}}},"endpoints":[]}}"#);
        let mut t = configured(&pool);
        let list = |version: u64, decode: &str| {
            format!(
                r#"{{"wire":1,"epoch":"e","version":{version},"endpoints":[
                {{"address":"10.0.0.1:1","role":"prefill","models":["m"],"group":"a"}}{decode}]}}"#
            )
        };
        let decode = |port: u16, group: &str| {
            format!(r#",{{"address":"10.0.0.2:{port}","role":"decode","models":["m"],"group":"{group}"}}"#)
        };
        t.worker.apply(list(1, &(decode(1, "a") + &decode(2, "b"))).as_bytes()).unwrap();
        t.headers(&[]);
        assert_eq!(leg_destination(&t.body(&long_body())), "10.0.0.1:1");
        t.worker.apply(list(2, &if others { decode(2, "b") } else { String::new() }).as_bytes()).unwrap();
        let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        match expected {
            Err(error) => assert_eq!(reply(&outcome), error, "{policy} {others}"),
            Ok(decision) => {
                assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), decision);
                assert_eq!(state(&outcome, DECODE), "10.0.0.2:2");
                assert_eq!(edited(&outcome, &long_body()), long_body(), "it gets no KV parameters");
            }
        }
        assert_eq!(t.worker.counts.pending(Metric::KvStrandedNoPartner), 1);
        t.done();
        assert!(t.is_idle());
    }
}

/// istio/istio#61594: the cluster is that of one pool, and the endpoint that of another one.
#[test]
fn an_endpoint_of_another_pool_that_answers_does_not_reach_the_client() {
    let mut t = configured(
        r#"{"pools":{"other":{}},"endpoints":[
            {"address":"10.0.0.2:1","role":"decode","models":["m"]},
            {"address":"10.0.0.3:1","role":"decode","models":["n"],"pool":"other"}]}"#,
    );
    t.headers(&[]);
    t.body(r#"{"model":"m","messages":[]}"#);
    let outcome = t.request.response_headers(&mut t.worker, Answerer::Host(b"10.0.0.3:1"), Some(200), t.now);
    assert_eq!(reply(&outcome), (503, "wrong_endpoint"));
    assert_eq!(failing(&t, ""), ["10.0.0.2:1"]);
    t.done();
    assert!(t.is_idle());
}

/// At what Envoy may send the request once more, and how often.
fn repeats(outcome: &Outcome) -> (&str, &str) {
    (state(outcome, RETRY_ON), state(outcome, MAX_RETRIES))
}

#[test]
fn what_names_no_kv_cache_may_be_sent_once_more() {
    const ONCE: (&str, &str) = ("reset", "1");
    const NEVER: (&str, &str) = ("", "");
    let short = r#"{"model":"m","messages":[]}"#;
    let good = format!(
        r#"{{"kv_transfer_params":{PARAMS},"prompt_token_ids":[1],"choices":[{{"disaggregated_params":{{}}}}]}}"#
    );
    for (engine, whole, split) in [
        ("vllm-nixl", ONCE, NEVER),
        ("vllm-shared", ONCE, ONCE),
        ("sglang", NEVER, NEVER),
        ("neuron", ONCE, NEVER),
        ("mooncake", ONCE, NEVER),
        ("sidecar", ONCE, ONCE),
    ] {
        let mut t = of_engine(engine);
        t.headers(&[]);
        assert_eq!(repeats(&t.body(short)), whole, "{engine}");
        t.done();
        t.request = Request::default();
        t.headers(&[]);
        let mut outcome = t.body(&long_body());
        if engine == "mooncake" {
            outcome = t.answer(200, r#"{"0":{"engine_id":"e-1"}}"#);
        } else if t.request.is_prefilling() {
            assert_eq!(repeats(&outcome), NEVER, "{engine}: not yet");
            outcome = t.answer(200, &good);
        }
        assert_ne!(state(&outcome, DECODE), "", "{engine}");
        assert_eq!(repeats(&outcome), split, "{engine}");
        t.done();
    }
    // No KV cache is handed over.
    for answers in [&[(200, "{}")][..], &[(500, "{}"), (500, "{}")]] {
        let mut t = fixture();
        t.headers(&[]);
        t.body(&long_body());
        let outcomes: Vec<_> = answers.iter().map(|(status, body)| t.answer(*status, body)).collect();
        assert_eq!(repeats(outcomes.last().unwrap()), ONCE, "{answers:?}");
        t.done();
    }
    // A peer hands over itself.
    for phase in ["prefill", "decode"] {
        let mut t = fixture();
        t.headers(&[(PHASE_HEADER, phase)]);
        assert_eq!(repeats(&t.body(&long_body())), NEVER, "{phase}");
        t.done();
    }
}

#[test]
fn what_computes_or_reads_without_a_prompt_may_be_sent_once_more() {
    for (method, path, has_body, may) in [
        ("GET", "/health", false, true),
        ("HEAD", "/health", false, true),
        ("GET", "/v1/responses/r", false, true),
        ("DELETE", "/v1/responses/r", false, false),
        ("POST", "/v1/responses/r/cancel", false, false),
        ("POST", "/v1/responses/r/cancel", true, false),
        ("POST", "/tokenize", true, true),
        ("POST", "/v1/embeddings", true, true),
        ("PUT", "/v1/embeddings", true, false),
        ("POST", "/v1/load_lora_adapter", true, false),
    ] {
        let one = r#"{"allowed_paths":["/v1/load_lora_adapter"],"endpoints":[{"address":"10.0.0.2:1","role":"decode","models":["m"]}]}"#;
        let mut t = configured(one);
        let headers = Headers::from_pairs([(":method", method), (":path", path), (":authority", "a")]);
        let mut outcome = t.request.headers(&mut t.worker, headers, !has_body, t.now);
        if has_body {
            outcome = t.body(r#"{"model":"m","input":"a"}"#);
        }
        assert_eq!(only_destination(&outcome), "10.0.0.2:1", "{method} {path}");
        assert_eq!(repeats(&outcome), if may { ("reset", "1") } else { ("", "") }, "{method} {path}");
        t.done();
    }
}

/// A client that Envoy takes for an internal one would have KV parameters sent twice.
#[test]
fn a_client_asks_for_no_retries() {
    let names = ["x-envoy-retry-on", "x-envoy-retry-grpc-on", "x-envoy-max-retries", "x-envoy-retriable-status-codes"];
    let mut t = fixture();
    let outcome = t.headers(&names.map(|name| (name, "5xx")));
    for name in names {
        assert!(outcome.effects.contains(&Effect::RemoveHeader(name.into())), "{name}");
    }
}
