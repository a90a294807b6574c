//! Requests that are refused, or have no prompt.

use super::*;

#[test]
fn a_clients_own_transfer_parameters_never_reach_an_engine() {
    let evil = r#""kv_transfer_params":{"do_remote_prefill":true},"#;
    let body = long_body().replacen('{', &format!("{{{evil}"), 1);
    let mut t = fixture();
    t.headers(&[]);
    let outcome = t.body(&body);
    assert!(!String::from_utf8_lossy(&call(&outcome).body).contains(r#""do_remote_prefill":true"#));
    let outcome = t.answer(503, "upstream connect error");
    assert!(!String::from_utf8_lossy(&call(&outcome).body).contains(r#""do_remote_prefill":true"#));
    let outcome = t.answer(500, "{}");
    assert_eq!(edited(&outcome, &body), long_body());

    for (path, phase) in [("/v1/chat/completions", "prefill"), ("/v1/completions", "decode"), ("/invocations", "")] {
        let mut t = fixture();
        let pairs = [(":method", "POST"), (":path", path), (PHASE_HEADER, phase)];
        let pairs = &pairs[..if phase.is_empty() { 2 } else { 3 }];
        let headers = Headers::from_pairs(pairs.iter().map(|(name, value)| (*name, *value)));
        t.request.headers(&mut t.worker, headers, false, t.now);
        let outcome = t.body(&body);
        assert_eq!(edited(&outcome, &body), long_body(), "{path}");
    }
}

#[test]
fn bad_requests_get_an_error_that_says_why() {
    for (body, expected) in [
        ("", (400, "invalid_json")),
        ("{", (400, "invalid_json")),
        ("[]", (400, "invalid_json")),
        ("\u{0}", (400, "invalid_json")),
        (r#"{"messages":[]}"#, (400, "missing_model")),
        (r#"{"model":1}"#, (400, "missing_model")),
        (r#"{"model":"x"}"#, (404, "unknown_model")),
    ] {
        let mut t = fixture();
        t.headers(&[]);
        let outcome = t.body(body);
        assert_eq!(reply(&outcome), expected, "{body}");
        assert_eq!((outcome.flow, state(&outcome, DECISION)), (Flow::Pause, "rejected"));
        assert!(t.is_idle());
    }
    let mut t = fixture();
    let outcome = t.headers(&[("content-encoding", "gzip")]);
    assert_eq!(reply(&outcome), (415, "content_encoding"));
}

#[test]
fn a_body_over_the_limit_is_refused_as_soon_as_it_is_known() {
    let config = CONFIG.replacen('{', r#"{"max_body_bytes":2000,"#, 1);
    let mut t = configured(&config);
    let pseudo = [(":method", "POST"), (":path", "/v1/completions"), ("content-length", "2001")];
    let outcome = t.request.headers(&mut t.worker, Headers::from_pairs(pseudo), false, t.now);
    assert_eq!(reply(&outcome), (413, "too_large"));
    let mut t = configured(&config);
    t.headers(&[]);
    assert_eq!(t.request.body_part(&mut t.worker, 2_000).flow, Flow::Pause);
    assert_eq!(reply(&t.request.body_part(&mut t.worker, 2_001)), (413, "too_large"));
    let mut t = configured(&config);
    t.headers(&[]);
    assert_eq!(reply(&t.body(&long_body())), (413, "too_large"));
}

#[test]
fn requests_without_a_prompt_reach_a_ready_endpoint_unchanged() {
    for (method, path, end) in
        [("GET", "/version", true), ("POST", "/v1/embeddings", true), ("GET", "/v1/chat/completions", true)]
    {
        let mut t = fixture();
        let headers = Headers::from_pairs([(":method", method), (":path", path)]);
        let outcome = t.request.headers(&mut t.worker, headers, end, t.now);
        assert_eq!((outcome.flow, state(&outcome, DECISION)), (Flow::Continue, "passed"), "{path}");
        assert!(state(&outcome, DESTINATION).starts_with("10.0.0."));
    }
    let mut t = fixture();
    let headers = Headers::from_pairs([(":method", "POST"), (":path", "/v1/embeddings")]);
    t.request.headers(&mut t.worker, headers, false, t.now);
    for body in [r#"{"input":"a"}"#, "not json", ""] {
        let outcome = t.body(body);
        assert_eq!(edited(&outcome, body), body);
    }
}

#[test]
fn without_endpoints_or_configuration_the_answer_is_503() {
    let mut t = configured("");
    t.headers(&[]);
    assert_eq!(reply(&t.body(r#"{"model":"m"}"#)), (503, "no_endpoint"));
    let mut t = configured("");
    t.worker = Worker::default();
    t.worker.configure(br#"{"clutser":1}"#).unwrap_err();
    let outcome = t.headers(&[]);
    assert_eq!(reply(&outcome), (503, "not_configured"));
    let Some(Effect::Reply(reply)) = outcome.effects.last() else { panic!() };
    assert!(String::from_utf8_lossy(&reply.body).contains("clutser"));
}

#[test]
fn it_is_ready_once_there_is_a_list() {
    let ask = |t: &mut Fixture| {
        t.request = Request::default();
        let headers = Headers::from_pairs([(":method", "GET"), (":path", "/.pd-ready")]);
        let outcome = t.request.headers(&mut t.worker, headers, true, t.now);
        assert!(t.is_idle());
        reply(&outcome)
    };
    assert_eq!(ask(&mut fixture()), (200, "ready"));
    assert_eq!(ask(&mut configured("{}")), (200, "ready"), "no list will come");
    let mut t = configured(r#"{"control":{"cluster":"c"}}"#);
    assert_eq!(ask(&mut t), (503, "no_list"));
    t.worker.apply(br#"{"wire":1,"epoch":"e","version":1,"endpoints":[]}"#).unwrap();
    assert_eq!(ask(&mut t), (200, "ready"), "an empty one");
    t.worker = Worker::default();
    assert_eq!(ask(&mut t), (503, "not_configured"));
}
