//! Pools with limits, priorities and deadlines.

use super::*;

#[test]
fn a_pool_with_limits_answers_429_until_something_ends() {
    let mut t = configured(&CONFIG.replacen('{', r#"{"pools":{"default":{"max_requests":1}},"#, 1));
    t.headers(&[]);
    t.body(&long_body());
    let mut first = core::mem::take(&mut t.request);
    t.headers(&[]);
    let outcome = t.body(&long_body());
    assert_eq!(reply(&outcome), (429, "saturated"));
    let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!() };
    for header in ["retry-after", crate::request::reply::DROPPED_HEADER] {
        assert!(answer.headers.iter().any(|(name, _)| *name == header), "{header}");
    }
    t.done();
    first.done(&mut t.worker, t.now);
    assert!(t.worker.state.admission.is_empty());
    t.request = Request::default();
    t.headers(&[]);
    assert_eq!(t.body(&long_body()).flow, Flow::Pause);
    t.done();
    t.worker.prune(t.now + Duration::from_secs(100));
    assert!(t.is_idle() && t.worker.state.admission.is_empty());
}

#[test]
fn objectives_have_priorities_and_deadlines_count_the_queue() {
    let top = r#"{"objectives":[{"name":"batch","priority":-5}],"pools":{"default":{"max_requests":10}},"#;
    let mut t = configured(&CONFIG.replacen('{', top, 1));
    let mut others = Vec::new();
    for i in 0..8 {
        t.headers(&[("x-llm-d-inference-fairness-id", &format!("user-{i}"))]);
        t.body(r#"{"model":"m","messages":[]}"#);
        others.push(core::mem::take(&mut t.request));
    }
    for (objective, expected) in
        [("batch", Some((429, "sheddable"))), ("-1", Some((429, "sheddable"))), ("other", None)]
    {
        t.request = Request::default();
        t.headers(&[("x-llm-d-inference-objective", objective)]);
        let outcome = t.body(r#"{"model":"m","messages":[]}"#);
        match expected {
            Some(expected) => assert_eq!(reply(&outcome), expected, "{objective}"),
            None => assert_eq!(outcome.flow, Flow::Continue),
        }
        t.done();
    }
    for (ms, expected) in [("1", Some((429, "deadline"))), ("60000", None), ("soon", None)] {
        t.request = Request::default();
        let outcome = t.headers(&[("x-pd-deadline-ms", ms)]);
        assert!(outcome.effects.contains(&Effect::RemoveHeader(b"x-pd-deadline-ms".to_vec())));
        let outcome = t.body(&long_body());
        match expected {
            Some(expected) => assert_eq!(reply(&outcome), expected),
            None => assert_eq!(outcome.flow, Flow::Pause),
        }
        t.done();
    }
    others.iter_mut().for_each(|request| request.done(&mut t.worker, t.now));
    assert!(t.worker.state.admission.is_empty());
}
