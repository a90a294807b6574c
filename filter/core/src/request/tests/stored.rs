//! Responses that one endpoint keeps.

use super::*;

const RESPONSES: &str = "/v1/responses";

fn headers(t: &mut Fixture, method: &str, path: &str, end_of_stream: bool) -> Outcome {
    t.request = Request::default();
    let headers = Headers::from_pairs([(":method", method), (":path", path), (":authority", "a")]);
    t.request.headers(&mut t.worker, headers, end_of_stream, t.now)
}

/// Sends a request whose answer comes in these parts; the endpoint that answered.
fn ask(t: &mut Fixture, body: &str, answer: &[&str]) -> String {
    headers(t, "POST", RESPONSES, false);
    let mut outcome = t.body(body);
    if t.request.is_prefilling() {
        outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    }
    let endpoint = state(&outcome, DECODE).to_owned();
    t.request.response_headers(&mut t.worker, Answerer::Host(endpoint.as_bytes()), Some(200), t.now);
    for (i, part) in answer.iter().enumerate() {
        if !t.request.wants_response_body() {
            continue;
        }
        let outcome = t.request.response_part(&mut t.worker, part.as_bytes(), i + 1 == answer.len(), t.now);
        assert_eq!(outcome.flow, Flow::Continue);
    }
    t.done();
    endpoint
}

#[test]
fn a_response_is_asked_of_the_endpoint_that_gave_it() {
    let mut t = fixture();
    let answers: [&[&str]; 3] = [
        &[r#"{"id":"resp_N","output":[{"id":"msg_1"}],"usage":{}}"#],
        &[
            "event: response.created\ndata: {\"response\":{\"id\":\"resp_N\",\"output\":[]}}\n\n",
            "data: {\"id\":\"msg_1\"}",
        ],
        &["data: {\"response\":{\"i", "d\": \"re", "sp_N\"}}\n\n"],
    ];
    for n in 0..30 {
        let id = format!("resp_{n}");
        let parts: Vec<_> =
            answers[n % 3].iter().map(|part| part.replace("resp_N", &id).replace("sp_N", &id[2..])).collect();
        let parts: Vec<_> = parts.iter().map(String::as_str).collect();
        let long = if n % 2 == 0 { "word ".repeat(600) } else { String::new() };
        let keeper = ask(&mut t, &format!(r#"{{"model":"m","input":"{n} {long}","stream":true}}"#), &parts);
        for path in [format!("{RESPONSES}/{id}"), format!("{RESPONSES}/{id}/input_items?limit=1")] {
            let outcome = headers(&mut t, "GET", &path, true);
            assert_eq!(only_destination(&outcome), keeper, "{path}");
        }
        headers(&mut t, "POST", &format!("{RESPONSES}/{id}/cancel"), false);
        assert_eq!(only_destination(&t.body("")), keeper);
        headers(&mut t, "POST", RESPONSES, false);
        let body = format!(r#"{{"model":"m","input":"{}","previous_response_id":"{id}"}}"#, "word ".repeat(600));
        let outcome = t.body(&body);
        assert_eq!((state(&outcome, REASON), state(&outcome, DECODE)), ("stored_response", keeper.as_str()));
        assert_eq!(edited(&outcome, &body), body);
        t.done();
    }
    assert!(t.is_idle());
}

#[test]
fn an_unknown_response_is_refused_unless_one_endpoint_alone_can_have_it() {
    let mut t = fixture();
    assert_eq!(reply(&headers(&mut t, "GET", "/v1/responses/resp_x", true)), (404, "unknown_response"));
    headers(&mut t, "POST", RESPONSES, false);
    let body = r#"{"model":"m","input":"a","previous_response_id":"resp_x"}"#;
    assert_eq!(reply(&t.body(body)), (404, "unknown_response"));
    // A null is none, and what is no string is the engine's to refuse.
    for (value, reason) in [("null", "short"), ("5", "short")] {
        headers(&mut t, "POST", RESPONSES, false);
        let outcome = t.body(&body.replace(r#""resp_x""#, value));
        assert_eq!(state(&outcome, REASON), reason);
        t.done();
    }
    let mut alone =
        configured(&CONFIG.replace(r#""10.0.0.2:2", "role": "decode""#, r#""10.0.0.2:2", "role": "prefill""#));
    let outcome = headers(&mut alone, "GET", "/v1/responses/resp_x", true);
    assert!(state(&outcome, DESTINATION).starts_with("10.0.0.2:1"));
    headers(&mut alone, "POST", RESPONSES, false);
    assert_eq!(state(&alone.body(body), DECODE), "10.0.0.2:1");
}

#[test]
fn a_response_that_is_not_kept_is_not_learnt() {
    let mut t = fixture();
    ask(&mut t, r#"{"model":"m","input":"a","store":false}"#, &[r#"{"id":"resp_1"}"#]);
    assert_eq!(reply(&headers(&mut t, "GET", "/v1/responses/resp_1", true)), (404, "unknown_response"));
    headers(&mut t, "POST", RESPONSES, false);
    let outcome = t.body(r#"{"model":"m","input":"a"}"#);
    let decode = state(&outcome, DECODE).to_owned();
    t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(400), t.now);
    t.request.response_part(&mut t.worker, br#"{"id":"resp_2"}"#, true, t.now);
    assert_eq!(reply(&headers(&mut t, "GET", "/v1/responses/resp_2", true)), (404, "unknown_response"));
}
