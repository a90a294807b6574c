//! What is particular to an engine.

use super::*;
use crate::endpoints::beliefs::Belief;

#[test]
fn sglangs_legs_go_out_at_once_and_name_the_same_room() {
    let mut t = of_engine("sglang");
    t.headers(&[("x-request-id", "r")]);
    let outcome = t.body(&long_body());
    assert_eq!((outcome.flow, state(&outcome, REASON)), (Flow::Continue, "concurrent"));
    let prefill = text(&call(&outcome).body).to_owned();
    let decode = edited(&outcome, &long_body());
    assert_eq!(member(&prefill, "bootstrap_room"), member(&decode, "bootstrap_room"));
    assert_eq!(member(&decode, "bootstrap_host"), r#""10.0.0.1""#);
    assert_eq!((member(&prefill, "stream"), member(&decode, "stream")), ("false", "true"));
    assert!(!leg_destination(&outcome).contains(','), "the room is at one endpoint");
    assert_eq!(state(&outcome, PREFILL), leg_destination(&outcome));

    let decode = state(&outcome, DECODE).to_owned();
    let flow = t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(200), t.now).flow;
    assert_eq!(flow, Flow::Pause, "the prefill leg may still fail");
    t.now += Duration::from_millis(40);
    let outcome = t.answer(200, "{}");
    assert_eq!((outcome.flow, state(&outcome, PREFILL_MS)), (Flow::Pause, "40"));
    assert_eq!(outcome.effects.last(), Some(&Effect::ResumeResponse));
    t.request.first_byte(&mut t.worker, t.now);
    t.done();
    assert!(t.is_idle());
}

#[test]
fn mooncakes_engine_id_is_asked_once_and_again_after_a_failure() {
    let mut t = of_engine("mooncake");
    let request = |t: &mut Fixture, fails: bool| {
        t.request = Request::default();
        t.headers(&[(PREFILLER_HEADER, "10.0.0.1:1")]);
        let mut outcome = t.body(&long_body());
        let asked = call(&outcome).headers.get(":path") == Some(b"/query");
        if asked {
            assert_eq!((outcome.flow, leg_destination(&outcome).as_str()), (Flow::Pause, "10.0.0.1:8998"));
            outcome = t.answer(200, r#"{"0":{"engine_id":"e-1"}}"#);
        }
        assert_eq!((outcome.flow, state(&outcome, REASON)), (Flow::Continue, "concurrent"));
        let (prefill, decode) = (text(&call(&outcome).body).to_owned(), edited(&outcome, &long_body()));
        let (prefill, decode) = (member(&prefill, "kv_transfer_params"), member(&decode, "kv_transfer_params"));
        assert_eq!(member(prefill, "transfer_id"), member(decode, "transfer_id"));
        assert_eq!(member(decode, "remote_engine_id"), r#""e-1""#);
        t.answer(if fails { 503 } else { 200 }, "");
        t.done();
        asked
    };
    let asked = [false, true, false, false].map(|fails| request(&mut t, fails));
    assert_eq!(asked, [true, false, true, false]);
    assert!(t.is_idle());
}

/// Another process has another id. Decode servers wait for the old one until their time limit.
#[test]
fn mooncakes_engine_id_is_asked_anew_where_the_process_is_another_one() {
    let list = |version: u64, process: &str| {
        format!(
            r#"{{"wire":1,"epoch":"e","version":{version},"endpoints":[
            {{"address":"10.0.0.1:1","role":"prefill","models":["m"]{process}}},
            {{"address":"10.0.0.2:1","role":"decode","models":["m"]}}]}}"#
        )
    };
    type Signal = fn(&mut Fixture, &dyn Fn(u64, &str) -> String);
    let nothing: Signal = |_, _| {};
    let container: Signal = |t, list| {
        t.worker.apply(list(2, r#","container":"b""#).as_bytes()).unwrap();
    };
    let start: Signal = |t, list| {
        t.worker.apply(list(2, r#","container":"a","cache_epoch":8"#).as_bytes()).unwrap();
    };
    let refused: Signal = |t, _| {
        let (index, _) = t.worker.state.table.iter().find(|(_, state)| &*state.address == "10.0.0.1:1").unwrap();
        let endpoint = t.worker.state.table.refer(index).unwrap();
        t.worker.failed_to_connect(endpoint, t.now);
        t.worker.answered(endpoint);
    };
    let answers: Signal = |t, _| {
        let (index, _) = t.worker.state.table.iter().find(|(_, state)| &*state.address == "10.0.0.1:1").unwrap();
        let endpoint = t.worker.state.table.refer(index).unwrap();
        for _ in 0..2 {
            t.worker.judge_belief(endpoint, Belief { tokens: 1_000.0, ..Belief::default() }, 0);
        }
    };
    for (signal, is_asked, what) in [
        (nothing, false, "nothing"),
        (container, true, "container"),
        (start, true, "start"),
        (refused, true, "refused"),
        (answers, true, "answers"),
    ] {
        let mut t = of_engine("mooncake");
        t.worker.apply(list(1, r#","container":"a","cache_epoch":7"#).as_bytes()).unwrap();
        t.headers(&[]);
        assert_eq!(leg_destination(&t.body(&long_body())), "10.0.0.1:8998");
        t.answer(200, r#"{"0":{"engine_id":"e-1"}}"#);
        t.answer(200, "{}");
        t.done();
        signal(&mut t, &list);
        t.request = Request::default();
        t.headers(&[(PREFILLER_HEADER, "10.0.0.1:1")]);
        let outcome = t.body(&long_body().replace("word", "other"));
        assert_eq!(call(&outcome).headers.get(":path") == Some(b"/query"), is_asked, "{what}");
        t.done();
    }
}

#[test]
fn without_an_engine_id_the_next_endpoint_is_asked_then_the_policy_rules() {
    for answer in ["{}", "", r#"{"0":{"engine_id":null}}"#] {
        let mut t = of_engine("mooncake");
        t.headers(&[]);
        let first = leg_destination(&t.body(&long_body()));
        assert_eq!(first, "10.0.0.1:8998");
        assert_eq!(leg_destination(&t.answer(200, answer)), "10.0.0.1:8998");
        let outcome = t.answer(404, answer);
        assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), ("decode_only", "prefill_failed"));
        assert_eq!(edited(&outcome, &long_body()), long_body());
        t.done();
        assert!(t.is_idle());
    }
}

#[test]
fn a_sidecar_gets_the_prefill_endpoint() {
    let mut t = of_engine("sidecar");
    t.headers(&[]);
    let outcome = t.body(&long_body());
    assert_eq!((outcome.flow, state(&outcome, REASON)), (Flow::Continue, "sidecar"));
    assert!(state(&outcome, PREFILLER).starts_with("10.0.0.1:") && state(&outcome, DECODE).starts_with("10.0.0.2:"));
    assert_eq!(edited(&outcome, &long_body()), long_body());
    assert!(!t.request.awaits_call());
    let work = |t: &Fixture| t.worker.state.table.iter().map(|(_, state)| state.prefill.len()).sum::<usize>();
    assert_eq!(work(&t), 1);
    t.request.first_byte(&mut t.worker, t.now);
    assert_eq!(work(&t), 0);
    t.done();
    assert!(t.is_idle());
}

#[test]
fn trtllms_prompt_is_replaced_by_its_token_ids() {
    let mut t = of_engine("trtllm");
    let prompt = "word ".repeat(600);
    let body = format!(r#"{{"model":"m","prompt":"{prompt}","max_tokens":7}}"#);
    let pseudo = [(":method", "POST"), (":path", "/v1/completions")];
    t.request.headers(&mut t.worker, Headers::from_pairs(pseudo), false, t.now);
    let outcome = t.body(&body);
    let params = member(text(&call(&outcome).body), "disaggregated_params").to_owned();
    assert_eq!(member(&params, "request_type"), r#""context_only""#);
    assert!(member(&params, "disagg_request_id").parse::<u64>().unwrap() >= 1 << 42);
    let answer =
        r#"{"choices":[{"disaggregated_params":{"request_type":"context_only","x":1e5}}],"prompt_token_ids":[5,6]}"#;
    let answer = PrefillAnswer::Answered { status: 200, content_type: None, body: answer.as_bytes() };
    let outcome = t.request.prefill_answer(&mut t.worker, answer, || Some(body.clone()), t.now);
    assert_eq!(
        edited(&outcome, &body),
        r#"{"disaggregated_params":{"request_type":"generation_only","x":1e5},"prompt":[5,6],"model":"m","max_tokens":7}"#
    );
    t.done();
    assert!(t.is_idle());
}
