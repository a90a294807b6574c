use super::*;

const CONFIG: &str = r#"{
    "trusted_headers": ["x-pd-phase", "x-prefiller-host-port"],
    "endpoints": [
        {"address": "10.0.0.1:1", "role": "prefill", "models": ["m"]},
        {"address": "10.0.0.1:2", "role": "prefill", "models": ["m"]},
        {"address": "10.0.0.2:1", "role": "decode", "models": ["m"]},
        {"address": "10.0.0.2:2", "role": "decode", "models": ["m"]}
    ]
}"#;
const PARAMS: &str =
    r#"{"do_remote_prefill":true,"remote_block_ids":[[1]],"remote_request_id":"r","n":18446744073709551617}"#;

struct Fixture {
    worker: Worker,
    request: Request,
    now: Duration,
}

fn fixture() -> Fixture {
    configured(CONFIG)
}

fn configured(config: &str) -> Fixture {
    let mut worker = Worker::default();
    worker.configure(config.as_bytes()).unwrap();
    Fixture { worker, request: Request::default(), now: Duration::from_secs(5) }
}

#[test]
fn only_a_caller_who_is_trusted_to_learns_why() {
    let explained = |config: &str| {
        let mut fixture = configured(config);
        let stripped = fixture.headers(&[("x-pd-explain", "1")]);
        assert!(stripped.effects.contains(&Effect::RemoveHeader(b"x-pd-explain".to_vec())));
        let outcome = fixture.body(&long_body());
        assert!(outcome.effects.iter().any(|effect| matches!(effect, Effect::Call(_))));
        outcome.effects.iter().any(|effect| matches!(effect, Effect::SetState(EXPLAIN, _)))
    };
    assert!(!explained(CONFIG));
    assert!(explained(&CONFIG.replace("\"x-pd-phase\"", "\"x-pd-phase\", \"x-pd-explain\"")));
}

fn long_body() -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}],"stream":true}}"#, "word ".repeat(600))
}

impl Fixture {
    fn headers(&mut self, extra: &[(&str, &str)]) -> Outcome {
        let pseudo =
            [(":method", "POST"), (":path", "/v1/chat/completions"), (":authority", "a"), ("content-length", "9")];
        let headers = Headers::from_pairs(pseudo.iter().chain(extra).map(|(name, value)| (*name, *value)));
        self.request.headers(&mut self.worker, headers, false, self.now)
    }

    fn body(&mut self, body: &str) -> Outcome {
        self.request.body(&mut self.worker, body.as_bytes(), self.now)
    }

    fn answer(&mut self, status: u16, body: &str) -> Outcome {
        let answer = PrefillAnswer::Answered { status, content_type: Some(b"application/json"), body: body.as_bytes() };
        self.request.prefill_answer(&mut self.worker, answer, || Some(long_body()), self.now)
    }

    fn done(&mut self) {
        self.request.done(&mut self.worker, self.now);
    }

    /// Whether nothing is in flight, anywhere.
    fn is_idle(&self) -> bool {
        let gauges = [Metric::PrefillInFlight, Metric::DecodeInFlight, Metric::DecodeTokensInFlight];
        gauges.iter().all(|gauge| self.worker.counts.pending(*gauge) == 0)
            && self.worker.state.table.iter().all(|(_, slot)| slot.prefill.is_empty() && slot.decode.requests == 0)
    }
}

fn state<'a>(outcome: &'a Outcome, path: &str) -> &'a str {
    let value = outcome.effects.iter().find_map(|effect| match effect {
        Effect::SetState(key, value) if *key == path => Some(value),
        _ => None,
    });
    value.map_or("", |value| core::str::from_utf8(value).unwrap())
}

fn call(outcome: &Outcome) -> &Call {
    let call =
        outcome.effects.iter().find_map(|effect| if let Effect::Call(call) = effect { Some(call) } else { None });
    call.unwrap_or_else(|| panic!("no call in {outcome:?}"))
}

fn leg_destination(outcome: &Outcome) -> String {
    String::from_utf8(call(outcome).headers.get("x-pd-destination").unwrap().to_vec()).unwrap()
}

fn reply(outcome: &Outcome) -> (u16, &'static str) {
    let reply =
        outcome.effects.iter().find_map(|effect| if let Effect::Reply(reply) = effect { Some(reply) } else { None });
    let reply = reply.unwrap_or_else(|| panic!("no reply in {outcome:?}"));
    (reply.status, reply.reason)
}

fn edited(outcome: &Outcome, body: &str) -> String {
    let mut body = body.as_bytes().to_vec();
    for effect in &outcome.effects {
        if let Effect::EditBody(edit) = effect {
            body.splice(..edit.drain as usize, edit.head.iter().copied());
        }
    }
    String::from_utf8(body).unwrap()
}

#[test]
fn a_long_prompt_runs_both_legs() {
    let mut t = fixture();
    let outcome = t.headers(&[("x-keep", "1"), ("x-pd-destination", "evil:1")]);
    assert_eq!(outcome.flow, Flow::Continue);
    let removed = |name: &str| outcome.effects.contains(&Effect::RemoveHeader(name.into()));
    assert!(removed("content-length") && removed("x-pd-destination"));
    assert_eq!(t.request.body_part(&mut t.worker, 100).flow, Flow::Pause);

    let outcome = t.body(&long_body());
    assert_eq!(outcome.flow, Flow::Pause);
    let leg = call(&outcome);
    assert_eq!(leg.cluster, "engines");
    assert_eq!(leg.headers.get("x-keep"), Some(&b"1"[..]));
    let body = String::from_utf8(leg.body.clone()).unwrap();
    assert!(body.contains(r#""do_remote_decode":true"#) && body.contains(r#""max_tokens":1,"stream":false"#));
    assert!(!body.contains(r#""stream":true"#));
    let chosen = leg_destination(&outcome).split(',').next().unwrap().to_owned();
    assert!(chosen.starts_with("10.0.0.1:"));

    t.now += Duration::from_millis(40);
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    assert_eq!(outcome.flow, Flow::Continue);
    assert_eq!(edited(&outcome, &long_body()), format!(r#"{{"kv_transfer_params":{PARAMS},{}"#, &long_body()[1..]));
    assert!(state(&outcome, DESTINATION).starts_with("10.0.0.2:"));
    assert_eq!(state(&outcome, DESTINATION).split(',').count(), TRIES, "both, and the first once more");
    assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), ("split", "prefilled"));
    assert_eq!((state(&outcome, PREFILL), state(&outcome, PREFILL_MS)), (chosen.as_str(), "40"));
    assert!(!t.is_idle());
    assert!(t.request.awaits_first_byte());
    t.request.first_byte(&mut t.worker, t.now);
    t.done();
    assert!(t.is_idle());
}

#[test]
fn a_short_prompt_is_served_whole_and_untouched() {
    let mut t = fixture();
    t.headers(&[]);
    let body = r#" {"model":"m","messages":[]} "#;
    let outcome = t.body(body);
    assert_eq!(
        (outcome.flow, state(&outcome, DECISION), state(&outcome, REASON)),
        (Flow::Continue, "decode_only", "cached")
    );
    assert_eq!(edited(&outcome, body), body);
    t.done();
    assert!(t.is_idle());
}

#[test]
fn the_second_turn_stays_where_the_first_one_was() {
    let mut t = fixture();
    t.headers(&[]);
    t.body(&long_body());
    let first = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    t.done();
    t.request = Request::default();
    t.headers(&[]);
    let second = t.body(&long_body().replace("\"}]", "\"},{\"role\":\"user\",\"content\":\"and then?\"}]"));
    assert_eq!((state(&second, DECISION), state(&second, REASON)), ("decode_only", "cached"));
    assert_eq!(state(&second, DECODE), state(&first, DECODE));
    assert_ne!(state(&second, MATCHED_TOKENS), "0");
}

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
fn a_phase_header_sends_one_leg_to_its_pool() {
    for (phase, network, decision) in [("prefill", "10.0.0.1:", "prefill_only"), ("decode", "10.0.0.2:", "decode_only")]
    {
        let mut t = fixture();
        let outcome = t.headers(&[(PHASE_HEADER, phase)]);
        assert!(outcome.effects.contains(&Effect::RemoveHeader(PHASE_HEADER.into())));
        let outcome = t.body(&long_body());
        assert!(state(&outcome, DESTINATION).split(',').all(|address| address.starts_with(network)));
        assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), (decision, "phase_header"));
        assert_eq!(edited(&outcome, &long_body()), long_body());
        t.done();
        assert!(t.is_idle());
    }
    let mut t = fixture();
    assert_eq!(reply(&t.headers(&[(PHASE_HEADER, "both")])), (400, "invalid_phase"));
}

#[test]
fn a_trusted_prefiller_is_used_if_it_is_in_the_list() {
    for address in ["10.0.0.1:1", "10.0.0.1:2"] {
        let mut t = fixture();
        t.headers(&[(PREFILLER_HEADER, address)]);
        assert!(leg_destination(&t.body(&long_body())).starts_with(address));
    }
    for address in ["10.9.9.9:1", "10.0.0.2:1", "nonsense"] {
        let mut t = fixture();
        t.headers(&[(PREFILLER_HEADER, address)]);
        assert!(leg_destination(&t.body(&long_body())).starts_with("10.0.0.1:"), "{address}");
        assert_eq!(t.worker.counts.pending(Metric::HintsIgnored), 1);
    }
    let untrusting = CONFIG.replace(r#", "x-prefiller-host-port""#, "");
    let mut t = configured(&untrusting);
    t.headers(&[]);
    let by_itself = leg_destination(&t.body(&long_body())).split(',').next().unwrap().to_owned();
    for address in ["10.0.0.1:1", "10.0.0.1:2"] {
        let mut t = configured(&untrusting);
        let outcome = t.headers(&[(PREFILLER_HEADER, address)]);
        assert!(outcome.effects.contains(&Effect::RemoveHeader(PREFILLER_HEADER.into())));
        assert!(leg_destination(&t.body(&long_body())).starts_with(&by_itself));
    }
}

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
fn a_prefill_answer_without_usable_parameters_is_served_without_them_and_counted() {
    for answer in ["{}", "", r#"{"kv_transfer_params":null}"#, r#"{"kv_transfer_params":{"do_remote_prefill":true}}"#] {
        let mut t = fixture();
        t.headers(&[]);
        t.body(&long_body());
        let outcome = t.answer(200, answer);
        assert_eq!((outcome.flow, state(&outcome, REASON)), (Flow::Continue, "kv_missing"));
        assert_eq!(edited(&outcome, &long_body()), long_body());
        assert_eq!(t.worker.counts.pending(Metric::KvMissing), 1);
    }
}

#[test]
fn a_splice_that_would_pass_the_body_limit_is_left_out() {
    for (room, reason) in [(0, "kv_missing"), (199, "kv_missing"), (200, "prefilled")] {
        let insert = format!(r#""kv_transfer_params":{PARAMS},"#).len();
        let limit = long_body().len() + insert * room / 200;
        let mut t = configured(&CONFIG.replacen('{', &format!(r#"{{"max_body_bytes":{limit},"#), 1));
        t.headers(&[]);
        t.body(&long_body());
        let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        assert_eq!(state(&outcome, REASON), reason);
        assert!(edited(&outcome, &long_body()).len() <= limit);
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
    assert_eq!(ask(&mut configured("{}")), (200, "ready"), "nobody will tell one");
    let mut t = configured(r#"{"control":{"cluster":"c"}}"#);
    assert_eq!(ask(&mut t), (503, "no_list"));
    t.worker.apply(br#"{"wire":1,"epoch":"e","version":1,"endpoints":[]}"#).unwrap();
    assert_eq!(ask(&mut t), (200, "ready"), "an empty one");
    t.worker = Worker::default();
    assert_eq!(ask(&mut t), (503, "not_configured"));
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

/// A gateway of that engine, whose long prompts are split.
fn of_engine(engine: &str) -> Fixture {
    configured(&CONFIG.replacen('{', &format!(r#"{{"pools":{{"default":{{"engine":"{engine}"}}}},"#), 1))
}

fn text(body: &[u8]) -> &str {
    core::str::from_utf8(body).unwrap()
}

/// The value of a member of a JSON object.
fn member<'a>(body: &'a str, key: &str) -> &'a str {
    let value = crate::body::json::raw_member(body.as_bytes(), &[key]).unwrap();
    text(value.unwrap_or_else(|| panic!("no {key} in {body}")))
}

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
    let flow = t.request.response_headers(&mut t.worker, Some(decode.as_bytes()), Some(200), t.now).flow;
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
fn rooms_differ_and_a_short_prompt_is_split_where_decode_cannot_serve_alone() {
    let mut rooms = std::collections::BTreeSet::new();
    for _ in 0..100 {
        let mut t = of_engine("sglang");
        for _ in 0..2 {
            t.request = Request::default();
            t.now += Duration::from_nanos(1);
            t.headers(&[("x-request-id", "the same")]);
            let body = r#"{"model":"m","messages":[],"n":2}"#;
            let outcome = t.body(body);
            assert_eq!(state(&outcome, DECISION), "split");
            let decode = edited(&outcome, body);
            assert_eq!(crate::body::json::elements(member(&decode, "bootstrap_room").as_bytes()).count(), 2);
            rooms.insert(member(&decode, "bootstrap_room").to_owned());
        }
    }
    assert_eq!(rooms.len(), 2, "the same request at the same time has the same room, another one has another");
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
fn a_warning_comes_once_per_change_and_the_answer_says_that_kv_did_not_move() {
    let mut t = fixture();
    let mut warnings = Vec::new();
    let good = format!(r#"{{"kv_transfer_params":{PARAMS}}}"#);
    for (i, answer) in ["{}", "{}", &good, "{}", &good, &good].into_iter().enumerate() {
        t.request = Request::default();
        t.headers(&[(PREFILLER_HEADER, "10.0.0.1:1")]);
        t.body(&long_body().replace("word", &format!("w{i}")));
        let outcome = t.answer(200, answer);
        warnings.push(outcome.effects.iter().any(|effect| matches!(effect, Effect::Warn(_))));
        let upstream = state(&outcome, DECODE).to_owned();
        let outcome = t.request.response_headers(&mut t.worker, Some(upstream.as_bytes()), None, t.now);
        let says = outcome.effects.contains(&Effect::AddResponseHeader(KV_HEADER, "missing".into()));
        assert_eq!((outcome.flow, says), (Flow::Continue, answer == "{}"));
        t.done();
    }
    assert_eq!(warnings, [true, false, false, true, false, false]);
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
fn a_sidecar_is_told_the_prefill_endpoint() {
    let mut t = of_engine("sidecar");
    t.headers(&[]);
    let outcome = t.body(&long_body());
    assert_eq!((outcome.flow, state(&outcome, REASON)), (Flow::Continue, "sidecar"));
    assert!(state(&outcome, PREFILLER).starts_with("10.0.0.1:") && state(&outcome, DECODE).starts_with("10.0.0.2:"));
    assert_eq!(edited(&outcome, &long_body()), long_body());
    assert!(!t.request.awaits_call());
    let work = |t: &Fixture| t.worker.state.table.iter().map(|(_, slot)| slot.prefill.len()).sum::<usize>();
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

#[test]
fn each_leg_says_the_rank_behind_its_address() {
    let mut t = configured(
        r#"{"endpoints":[
        {"address":"10.0.0.1:1","role":"prefill","rank":4},
        {"address":"10.0.0.2:1","role":"decode","rank":0},{"address":"10.0.0.2:1","role":"decode","rank":1},
        {"address":"10.0.0.2:2","role":"decode","rank":0},{"address":"10.0.0.2:2","role":"decode","rank":1}]}"#,
    );
    t.headers(&[("x-data-parallel-rank", "9")]);
    let outcome = t.body(&long_body());
    assert_eq!(call(&outcome).headers.get("x-data-parallel-rank"), Some(&b"4"[..]));
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    assert!(["0", "1"].contains(&state(&outcome, RANK)));
    let addresses: std::collections::BTreeSet<_> = state(&outcome, DESTINATION).split(',').collect();
    assert_eq!(addresses.len(), 2, "the alternate is another address with that rank");
    t.done();
    assert!(t.is_idle());
}

#[test]
fn several_sequences_are_not_split_where_one_is_handed_over() {
    for (engine, decision) in [
        ("vllm-nixl", ("decode_only", "several_sequences")),
        ("trtllm", ("decode_only", "several_sequences")),
        ("vllm-shared", ("split", "prefilled")),
    ] {
        let mut t = of_engine(engine);
        t.headers(&[]);
        let mut outcome = t.body(&long_body().replacen('{', r#"{"n":2,"#, 1));
        if decision.0 == "split" {
            outcome = t.answer(200, "{}");
        }
        assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), decision, "{engine}");
    }
}

#[test]
fn a_decode_endpoint_of_another_engine_is_no_partner() {
    let config = CONFIG.replace(r#""10.0.0.2:2", "role""#, r#""10.0.0.2:2", "engine": "sglang", "role""#);
    for id in 0..20 {
        let mut t = configured(&config);
        t.headers(&[]);
        t.body(&long_body().replace("word", &format!("word{id}")));
        let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        assert_eq!(state(&outcome, DECODE), "10.0.0.2:1");
    }
}

#[test]
fn aggregated_endpoints_serve_whole_requests_beside_the_others() {
    let aggregated = r#"{"address": "10.0.0.3:1", "role": "both", "models": ["m"]}"#;
    let mut t = configured(&CONFIG.replacen("\"endpoints\": [", &format!("\"endpoints\": [{aggregated},"), 1));
    let mut decisions = std::collections::BTreeSet::new();
    for id in 0..30 {
        t.request = Request::default();
        t.headers(&[]);
        let body = long_body().replace("word", &format!("w{id}"));
        let mut outcome = t.body(&body);
        if t.request.is_prefilling() {
            outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
            assert!(!state(&outcome, DESTINATION).contains("10.0.0.3"), "it takes no decode legs");
        } else {
            assert_eq!((state(&outcome, DECODE), edited(&outcome, &body)), ("10.0.0.3:1", body));
        }
        decisions.insert(state(&outcome, REASON).to_owned());
    }
    assert_eq!(decisions.into_iter().collect::<Vec<_>>(), ["aggregated", "prefilled"]);
}

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

#[test]
fn a_trusted_subset_restricts_both_legs_and_the_answer_says_who_served() {
    for header in ["x-gateway-destination-endpoint-subset", "test-epp-endpoint-selection"] {
        let config = CONFIG.replace(r#""x-pd-phase","#, &format!(r#""x-pd-phase", "{header}","#));
        let mut t = configured(&config);
        for i in 0..10 {
            t.request = Request::default();
            t.headers(&[(header, "10.0.0.1:2, 10.0.0.2:1,nonsense")]);
            let outcome = t.body(&long_body().replace("word", &format!("w{i}")));
            assert_eq!(leg_destination(&outcome), "10.0.0.1:2");
            let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
            assert!(state(&outcome, DESTINATION).split(',').all(|address| address == "10.0.0.2:1"));
            let outcome = t.request.response_headers(&mut t.worker, Some(b"10.0.0.2:1"), None, t.now);
            assert_eq!(outcome.effects, [Effect::AddResponseHeader(SERVED_HEADER, "10.0.0.2:1".into())]);
            t.done();
        }
        t.request = Request::default();
        t.headers(&[(header, "10.9.9.9")]);
        assert_eq!(reply(&t.body(&long_body())), (503, "no_endpoint"));
        // A path without a prompt, by address alone.
        t.request = Request::default();
        let headers = Headers::from_pairs([(":method", "GET"), (":path", "/version"), (header, "10.0.0.2")]);
        let outcome = t.request.headers(&mut t.worker, headers, true, t.now);
        assert!(state(&outcome, DESTINATION).split(',').all(|address| address.starts_with("10.0.0.2:")));
        assert!(t.request.is_sent());
        let outcome = t.request.response_headers(&mut t.worker, Some(b"10.0.0.2:1"), None, t.now);
        assert_eq!(outcome.effects, [Effect::AddResponseHeader(SERVED_HEADER, "10.0.0.2:1".into())]);
        t.done();
        assert!(t.is_idle());
        // Untrusted, it is stripped and means nothing.
        let mut t = fixture();
        t.headers(&[(header, "10.9.9.9")]);
        assert_eq!(t.body(&long_body()).flow, Flow::Pause);
    }
}

#[test]
fn the_models_of_all_endpoints_are_listed_and_a_header_may_name_one() {
    let mut t = configured(&CONFIG.replacen(r#"["m"]"#, r#"["m", "m-lora"]"#, 1));
    let headers = Headers::from_pairs([(":method", "GET"), (":path", "/v1/models?x")]);
    let outcome = t.request.headers(&mut t.worker, headers, true, t.now);
    assert_eq!(reply(&outcome), (200, "models"));
    let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!() };
    let list: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    let names: Vec<_> = list["data"].as_array().unwrap().iter().map(|card| card["id"].clone()).collect();
    assert_eq!(names, ["m", "m-lora"]);
    for (name, body, expected) in [
        ("m", r#"{"messages":[]}"#, None),
        ("x", r#"{"messages":[]}"#, Some((404, "unknown_model"))),
        ("x", r#"{"model":"m","messages":[]}"#, None),
        ("m", r#"{"model":7,"messages":[]}"#, Some((400, "missing_model"))),
    ] {
        for header in ["x-ai-eg-model", "x-gateway-model-name"] {
            t.request = Request::default();
            t.headers(&[(header, name)]);
            let outcome = t.body(body);
            match expected {
                Some(expected) => assert_eq!(reply(&outcome), expected),
                None => assert_eq!(outcome.flow, Flow::Continue),
            }
            t.done();
        }
    }
}

const ALIASES: &str = r#"{"models":{
    "gpt":{"targets":[{"model":"m"}],"answer":"asked"},
    "canary":{"targets":[{"model":"m","weight":3},{"model":"m-lora","weight":1}]},
    "nobody":{"targets":[{"model":"x"}]}
},"#;

fn aliased() -> Fixture {
    configured(&CONFIG.replacen('{', ALIASES, 1).replace(r#"["m"]"#, r#"["m", "m-lora"]"#))
}

#[test]
fn an_alias_is_rewritten_in_both_legs_and_put_back_in_the_answer() {
    let mut t = aliased();
    t.headers(&[]);
    let body = long_body().replace(r#""model":"m""#, r#""model" : "gp\u0074""#);
    let outcome = t.body(&body);
    assert!(text(&call(&outcome).body).contains(r#""model" : "m","messages""#));
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    let served = long_body().replace(r#""model":"m""#, r#""model" : "m""#);
    assert_eq!(edited(&outcome, &body), served.replacen('{', &format!(r#"{{"kv_transfer_params":{PARAMS},"#), 1));
    let upstream = state(&outcome, DECODE).to_owned();
    let outcome = t.request.response_headers(&mut t.worker, Some(upstream.as_bytes()), None, t.now);
    assert_eq!(outcome.effects, [Effect::RemoveResponseHeader("content-length")]);
    assert!(t.request.reads_answer());
    let outcome = t.request.answer_part(&mut t.worker, br#"data: {"model":"m"}"#, false);
    assert_eq!(
        outcome.effects,
        [Effect::EditResponse(HeadEdit { drain: 19, head: br#"data: {"model":"gpt"}"#.to_vec() })]
    );
    assert_eq!(t.request.answer_part(&mut t.worker, b"", true).effects, []);
    assert!(!t.request.reads_answer());
    t.done();
    assert!(t.is_idle());
}

#[test]
fn an_alias_named_by_a_header_is_put_into_a_body_without_a_model() {
    let mut t = aliased();
    t.headers(&[("x-gateway-model-name", "gpt")]);
    let body = long_body().replace(r#""model":"m","#, "");
    let prefill = t.body(&body);
    assert!(text(&call(&prefill).body).contains(r#""model":"m","#));
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    assert_eq!(edited(&outcome, &body), format!(r#"{{"kv_transfer_params":{PARAMS},{}"#, &long_body()[1..]));
    t.request = Request::default();
    t.headers(&[("x-gateway-model-name", "gpt")]);
    assert_eq!(edited(&t.body(r#"{"messages":[]}"#), r#"{"messages":[]}"#), r#"{"model":"m","messages":[]}"#);
}

#[test]
fn weights_spread_requests_and_keep_a_session_together() {
    let mut t = aliased();
    let mut served = |session: &str, id: u32| {
        t.request = Request::default();
        let id = id.to_string();
        let named = [("x-request-id", id.as_str()), ("x-session-id", session)];
        t.headers(if session.is_empty() { &named[..1] } else { &named });
        let body = r#"{"model":"canary","messages":[]}"#;
        let outcome = t.body(body);
        assert!(!t.request.reads_answer(), "the answer stays as it is");
        t.done();
        edited(&outcome, body)
    };
    let adapters = (0..400).filter(|id| served("", *id).contains("m-lora")).count();
    assert!((60..140).contains(&adapters), "{adapters} of 400, 100 expected");
    for session in ["a", "b", "c"] {
        let first = served(session, 0);
        assert!((1..20).all(|id| served(session, id) == first));
    }
}

#[test]
fn aliases_are_listed_where_somebody_serves_them() {
    let mut t = aliased();
    t.headers(&[]);
    let outcome = t.body(r#"{"model":"nobody","messages":[]}"#);
    assert_eq!(reply(&outcome), (404, "unknown_model"));
    let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!() };
    let message = text(&answer.body);
    assert!(message.contains("`nobody`") && message.contains("canary, gpt, m, m-lora"), "{message}");
}

#[test]
fn a_rewrite_never_makes_a_body_larger_than_the_limit() {
    let long = "x".repeat(200);
    let top = format!(r#"{{"max_body_bytes":1024,"models":{{"a":{{"targets":[{{"model":"{long}"}}]}}}},"#);
    let mut t = configured(&CONFIG.replacen('{', &top, 1).replace(r#"["m"]"#, &format!(r#"["{long}"]"#)));
    for (bytes, is_refused) in [(600, false), (900, true)] {
        t.request = Request::default();
        t.headers(&[]);
        let outcome = t.body(&format!(r#"{{"model":"a","messages":[],"user":"{}"}}"#, "u".repeat(bytes)));
        assert_eq!(outcome.flow == Flow::Pause, is_refused);
        t.done();
    }
}

/// A split request whose legs say that they had so many tokens of 1,000 cached; what comes of its answer.
fn judged(t: &mut Fixture, body: &str, prefill: u64, decode: u64) -> Vec<Effect> {
    t.request = Request::default();
    t.headers(&[(PREFILLER_HEADER, "10.0.0.1:1")]);
    let mut outcome = t.body(body);
    let usage =
        |cached| format!(r#""usage":{{"prompt_tokens":1000,"prompt_tokens_details":{{"cached_tokens":{cached}}}}}"#);
    let is_concurrent = outcome.flow == Flow::Continue;
    let answered = t.answer(200, &format!(r#"{{{},"kv_transfer_params":{PARAMS}}}"#, usage(prefill)));
    if !is_concurrent {
        outcome = answered;
    }
    assert_eq!(state(&outcome, DECISION), "split");
    let decode_endpoint = state(&outcome, DECODE).to_owned();
    t.request.response_headers(&mut t.worker, Some(decode_endpoint.as_bytes()), Some(200), t.now);
    let reads = t.request.reads_answer();
    let effects = t.request.answer_part(&mut t.worker, format!("{{{}}}", usage(decode)).as_bytes(), true).effects;
    assert!(reads || effects.is_empty());
    t.done();
    effects
}

fn whole_body() -> String {
    long_body().replace(r#","stream":true"#, "")
}

#[test]
fn cached_tokens_are_those_of_the_prefill_leg() {
    for engine in ["vllm-nixl", "vllm-shared", "sglang"] {
        for (policy, is_edited) in
            [("", true), (r#","cached_tokens":"prefill""#, true), (r#","cached_tokens":"decode""#, false)]
        {
            let pool =
                format!(r#"{{"pools":{{"default":{{"engine":"{engine}","split":{{"mode":"always"}}{policy}}}}},"#);
            let mut t = configured(&CONFIG.replacen('{', &pool, 1));
            for (body, is_seen) in [
                (whole_body(), true),
                (long_body(), false),
                (long_body().replacen('{', r#"{"stream_options":{"include_usage":true},"#, 1), true),
            ] {
                let effects = judged(&mut t, &body, 16, 999);
                let edited = effects.iter().any(|effect| match effect {
                    Effect::EditResponse(edit) => text(&edit.head).contains(r#""cached_tokens": 16}"#),
                    _ => panic!("{effect:?}"),
                });
                assert_eq!(edited, is_edited && is_seen, "{engine}{policy} {body:.60}");
            }
            assert_eq!(t.worker.counts.pending(Metric::KvNotMoved), 0);
        }
    }
}

#[test]
fn a_prompt_that_was_computed_twice_is_counted_each_time_and_said_once() {
    for engine in ["vllm-nixl", "vllm-shared", "mooncake"] {
        let pool = format!(r#"{{"pools":{{"default":{{"engine":"{engine}","split":{{"mode":"always"}}}}}},"#);
        // One decode endpoint: what is said is said of each.
        let mut t = configured(
            &CONFIG
                .replacen('{', &pool, 1)
                .replace(r#""10.0.0.2:2", "role": "decode""#, r#""10.0.0.2:2", "role": "prefill""#),
        );
        let prefill = t.worker.state.table.iter().map(|(at, _)| at).collect::<Vec<_>>();
        for at in prefill {
            t.worker.state.table.get_mut(at).unwrap().engine_id = Some(br#""e""#[..].into());
        }
        let mut warnings = |decode, times: usize| {
            let each =
                |_| judged(&mut t, &whole_body(), 0, decode).iter().filter(|e| matches!(e, Effect::Warn(_))).count();
            (0..times).map(each).sum::<usize>()
        };
        assert_eq!(warnings(999, 3), 0, "{engine}");
        assert_eq!(warnings(0, 3), 1, "{engine}");
        assert_eq!((warnings(999, 5), warnings(16, 1)), (0, 0), "{engine}: it comes and goes");
        assert_eq!((warnings(999, 40), warnings(16, 2)), (0, 1), "{engine}");
        assert_eq!(t.worker.counts.pending(Metric::KvNotMoved), 6, "{engine}");
    }
    let mut t = of_engine("sglang");
    judged(&mut t, &whole_body(), 0, 0);
    assert_eq!(t.worker.counts.pending(Metric::KvNotMoved), 0, "its decode endpoint cannot compute a prompt");
    let mut t = of_engine("vllm-nixl");
    judged(&mut t, &whole_body().replace(&"word ".repeat(580), ""), 0, 0);
    assert_eq!(t.worker.counts.pending(Metric::KvNotMoved), 0, "too short as it was estimated");
}

#[test]
fn prompts_go_to_pods_whose_bounds_have_room() {
    let config = CONFIG
        .replace(r#""10.0.0.1:1", "role""#, r#""10.0.0.1:1", "max_prompt_tokens": 500, "role""#)
        .replace(r#""10.0.0.1:2", "role""#, r#""10.0.0.1:2", "min_prompt_tokens": 501, "role""#)
        .replace(r#""10.0.0.2:1", "role""#, r#""10.0.0.2:1", "max_prompt_tokens": 500, "role""#);
    for _ in 0..8 {
        let mut fixture = configured(&config);
        fixture.headers(&[]);
        let outcome = fixture.body(&long_body());
        assert_eq!(leg_destination(&outcome), "10.0.0.1:2");
        let outcome = fixture.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        assert!(state(&outcome, DESTINATION).split(',').all(|name| name == "10.0.0.2:2"), "{outcome:?}");
    }
    // Where nobody has room, everybody is asked.
    let mut fixture = configured(
        &config.replace(r#""10.0.0.1:2", "min_prompt_tokens": 501"#, r#""10.0.0.1:2", "min_prompt_tokens": 99999"#),
    );
    fixture.headers(&[]);
    assert!(leg_destination(&fixture.body(&long_body())).contains("10.0.0.1:1"));
}
