//! Answers that begin later than the lease on the KV cache.

use super::*;

/// Just within vLLM's lease of 30 s, less the margin; and beyond it.
const IN_TIME: Duration = Duration::from_secs(28);
const LATE: Duration = Duration::from_secs(31);

/// A gateway that splits every prompt, whatever decode endpoints hold.
fn splitting(policy: &str) -> Fixture {
    let pools = format!(r#"{{"pools":{{"default":{{"split":{{"mode":"always"}}{policy}}}}},"#);
    configured(&CONFIG.replacen('{', &pools, 1))
}

fn body(path: &str, is_stream: bool) -> String {
    let words = "word ".repeat(600);
    let prompt = match path {
        "/v1/responses" => format!(r#""input":"{words}""#),
        "/v1/completions" => format!(r#""prompt":"{words}""#),
        _ => format!(r#""max_tokens":9,"messages":[{{"role":"user","content":"{words}"}}]"#),
    };
    format!(r#"{{"model":"m","stream":{is_stream},{prompt}}}"#)
}

/// A split request whose prefill leg has just ended; the address of its decode endpoint.
fn handed_over(t: &mut Fixture, path: &str, is_stream: bool) -> String {
    t.request = Request::default();
    let pseudo = [(":method", "POST"), (":path", path), (":authority", "a")];
    t.request.headers(&mut t.worker, Headers::from_pairs(pseudo), false, t.now);
    t.body(&body(path, is_stream));
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    assert_eq!(state(&outcome, REASON), "prefilled");
    state(&outcome, DECODE).to_owned()
}

fn answered(t: &mut Fixture, decode: &str, status: u16) -> Outcome {
    t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(status), t.now)
}

fn part(t: &mut Fixture, part: &str, is_last: bool) -> Outcome {
    if !t.request.wants_response_body() {
        return Outcome { flow: Flow::Continue, effects: vec![] };
    }
    t.request.response_part(&mut t.worker, part.as_bytes(), is_last, t.now)
}

/// What the client gets of a part.
fn passed(outcome: &Outcome, part: &str) -> String {
    let edit = outcome.effects.iter().find_map(|effect| match effect {
        Effect::EditResponse(edit) => Some(edit),
        _ => None,
    });
    edit.map_or(part.to_owned(), |edit| {
        assert_eq!(edit.drain as usize, part.len());
        text(&edit.head).to_owned()
    })
}

fn later(t: &mut Fixture, by: Duration) {
    t.now = t.now.saturating_add(by);
}

#[test]
fn a_stream_whose_first_token_is_in_time_passes_however_long_it_takes() {
    let mut t = splitting("");
    let decode = handed_over(&mut t, "/v1/chat/completions", true);
    answered(&mut t, &decode, 200);
    later(&mut t, IN_TIME);
    assert!(t.request.wants_response_body());
    assert_eq!(part(&mut t, "data: {}\n\n", false).effects, []);
    assert!(!t.request.wants_response_body(), "the rest is not read");
    later(&mut t, LATE);
    assert_eq!(part(&mut t, "data: {}\n\n", true).effects, []);
    t.done();
    assert!(t.is_idle());
}

#[test]
fn a_stream_whose_first_token_is_late_ends_with_an_error() {
    let created = "event: response.created\ndata: {}\n\n";
    for (path, preface, token, expected) in [
        ("/v1/chat/completions", ": ping\n\n", "data: {\"wrong\":1}\n\n", "data: {\"error\":{"),
        ("/v1/completions", "", "data: {\"wrong\":1}\n\n", "data: {\"error\":{"),
        ("/v1/messages", "", "event: message_start\ndata: {\"wrong\":1}\n\n", "event: error\ndata: {"),
        (
            "/v1/responses",
            created,
            "event: response.output_text.delta\ndata: {\"wrong\":1}\n\n",
            "event: error\ndata: {",
        ),
    ] {
        let mut t = splitting("");
        let decode = handed_over(&mut t, path, true);
        assert_eq!(answered(&mut t, &decode, 200).flow, Flow::Continue);
        assert_eq!(passed(&part(&mut t, preface, false), preface), preface);
        later(&mut t, LATE);
        assert_eq!(passed(&part(&mut t, preface, false), preface), preface);
        let outcome = part(&mut t, token, false);
        let got = passed(&outcome, token);
        assert!(got.starts_with(expected) && got.contains("kv_lease_over") != (path == "/v1/messages"), "{got}");
        assert!(!got.contains("wrong\":1"), "{got}");
        let warnings = outcome.effects.iter().filter(|effect| matches!(effect, Effect::Warn(_))).count();
        assert_eq!(warnings, 1);
        // Nothing more goes on, and the stream is reset.
        let outcome = part(&mut t, token, false);
        assert_eq!((passed(&outcome, token).as_str(), reply(&outcome).1), ("", "kv_lease_over"));
        t.done();
        assert!(t.is_idle());
        assert_eq!(t.worker.counts.pending(Metric::LateRefused), 1);
        // The same of the next one: counted, and not said again.
        let decode = handed_over(&mut t, path, true);
        later(&mut t, LATE);
        let outcome = answered(&mut t, &decode, 200);
        assert_eq!(reply(&outcome), (503, "kv_lease_over"), "nothing was sent yet");
        t.done();
        assert!(t.is_idle());
        assert_eq!(t.worker.counts.pending(Metric::LateRefused), 2);
    }
}

#[test]
fn a_late_whole_answer_waits_for_the_prefill_servers_count_of_expired_kv_leases() {
    let page = |count: u32| format!("# x\nvllm:nixl_num_kv_expired_reqs_total{{engine=\"0\"}} {count}.0\n");
    for (answer, is_right) in [
        (Some((200, page(0))), true),
        (Some((200, page(1))), false),
        (Some((200, "other 1\n".to_owned())), false),
        (Some((404, page(0))), false),
        (Some((503, "upstream connect error".to_owned())), false),
        (None, false),
    ] {
        let mut t = splitting("");
        let decode = handed_over(&mut t, "/v1/chat/completions", false);
        later(&mut t, LATE);
        let outcome = answered(&mut t, &decode, 200);
        assert_eq!((outcome.flow, t.request.awaits_call()), (Flow::Pause, true));
        let question = call(&outcome);
        assert_eq!(question.headers.get(":path"), Some(&b"/metrics"[..]));
        assert!(leg_destination(&outcome).starts_with("10.0.0.1:"));
        let outcome = match &answer {
            Some((status, body)) => t.answer(*status, body),
            None => t.request.prefill_answer(&mut t.worker, PrefillAnswer::None, || None::<Vec<u8>>, t.now),
        };
        if is_right {
            assert_eq!(outcome, Outcome { flow: Flow::Pause, effects: vec![Effect::ResumeResponse] });
            assert_eq!(part(&mut t, "{}", true).effects, []);
        } else {
            assert_eq!(reply(&outcome), (503, "kv_lease_over"), "{answer:?}");
        }
        t.done();
        assert!(t.is_idle());
        let counts = [Metric::LatePassed, Metric::LateRefused].map(|metric| t.worker.counts.pending(metric));
        assert_eq!(counts, [i64::from(is_right), i64::from(!is_right)]);
    }
}

#[test]
fn leases_that_expired_before_are_no_news() {
    let mut t = splitting("");
    let ask = |t: &mut Fixture, count: u32| {
        let decode = handed_over(t, "/v1/chat/completions", false);
        later(t, LATE);
        answered(t, &decode, 200);
        let outcome = t.answer(200, &format!("vllm:nixl_num_kv_expired_reqs_total {count}.0\n"));
        t.done();
        outcome.effects.contains(&Effect::ResumeResponse)
    };
    // Without pd-control the first look is the first that is known; prompts go to either prefill endpoint.
    let passed: Vec<_> = (0..6).map(|_| ask(&mut t, 7)).collect();
    assert!(passed.iter().filter(|passed| !**passed).count() <= 2 && passed[5], "{passed:?}");
    // As pd-control publishes it.
    let list = |expired: u32| {
        let of = |address: &str, role| {
            format!(r#"{{"address":"{address}","role":"{role}","models":["m"],"expired_kv_leases":{expired}}}"#)
        };
        let endpoints = [of("10.0.0.1:1", "prefill"), of("10.0.0.2:1", "decode")].join(",");
        format!(r#"{{"wire":1,"epoch":"e","version":{expired},"endpoints":[{endpoints}]}}"#)
    };
    t.worker.apply(list(9).as_bytes()).unwrap();
    assert!(ask(&mut t, 9) && !ask(&mut t, 10) && ask(&mut t, 10));
    t.worker.apply(list(11).as_bytes()).unwrap();
    assert!(ask(&mut t, 11));
}

#[test]
fn only_split_requests_of_engines_with_a_lease_are_late() {
    for (pool, path) in [
        (r#","engine":"vllm-shared""#, "/v1/chat/completions"),
        (r#","kv_lease_ms":0"#, "/v1/chat/completions"),
        (r#","kv_lease_ms":60000"#, "/v1/chat/completions"),
    ] {
        let mut t = splitting(pool);
        let decode = if pool.contains("shared") {
            t.headers(&[]);
            t.body(&body(path, true));
            let outcome = t.answer(200, "{}");
            state(&outcome, DECODE).to_owned()
        } else {
            handed_over(&mut t, path, true)
        };
        later(&mut t, LATE);
        assert_eq!(answered(&mut t, &decode, 200).flow, Flow::Continue);
        assert_eq!(passed(&part(&mut t, "data: {}\n\n", false), "data: {}\n\n"), "data: {}\n\n");
        t.done();
    }
    // An error is an error, and a whole request fetches nothing.
    let mut t = splitting("");
    let decode = handed_over(&mut t, "/v1/chat/completions", true);
    later(&mut t, LATE);
    assert_eq!(answered(&mut t, &decode, 500).flow, Flow::Continue);
    assert!(!t.request.wants_response_body());
    t.done();
    let mut t = fixture();
    t.headers(&[]);
    let decode = state(&t.body(r#"{"model":"m","stream":true,"messages":[]}"#), DECODE).to_owned();
    later(&mut t, LATE);
    assert_eq!(answered(&mut t, &decode, 200).flow, Flow::Continue);
    assert!(!t.request.wants_response_body());
    assert_eq!(t.worker.counts.pending(Metric::LateRefused), 0);
}
