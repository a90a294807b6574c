//! Headers of peers that are trusted, or not.

use super::*;

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
            let outcome = t.request.response_headers(&mut t.worker, Answerer::Host(b"10.0.0.2:1"), None, t.now);
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
        assert!(t.request.is_forwarded());
        let outcome = t.request.response_headers(&mut t.worker, Answerer::Host(b"10.0.0.2:1"), None, t.now);
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
fn a_prefix_of_the_route_and_a_slash_at_the_end_are_understood() {
    let config = CONFIG.replacen('{', r#"{"path_prefixes":["/team","/openai"],"#, 1);
    for (path, leg_path, set) in [
        ("/team/v1/chat/completions", "/v1/chat/completions", None),
        ("/openai/v1/chat/completions?a=/", "/v1/chat/completions?a=/", None),
        ("/v1/chat/completions/", "/v1/chat/completions", Some("/v1/chat/completions")),
        ("/team/v1/chat/completions/?a", "/v1/chat/completions?a", Some("/team/v1/chat/completions?a")),
        ("/%74eam/v1/chat/completions", "/v1/chat/completions", None),
    ] {
        let mut t = configured(&config);
        let pairs = [(":method", "POST"), (":path", path)];
        let outcome = t.request.headers(&mut t.worker, Headers::from_pairs(pairs), false, t.now);
        let set_path = outcome.effects.iter().find_map(|effect| match effect {
            Effect::SetPath(path) => Some(text(path)),
            _ => None,
        });
        assert_eq!(set_path, set, "{path}");
        let outcome = t.body(&long_body());
        assert_eq!(call(&outcome).headers.get(":path").map(text), Some(leg_path), "{path}");
    }
    let mut t = configured(&config);
    let pairs = [(":method", "POST"), (":path", "/teams/v1/chat/completions")];
    let outcome = t.request.headers(&mut t.worker, Headers::from_pairs(pairs), false, t.now);
    assert_eq!(reply(&outcome), (404, "unknown_path"));
}

#[test]
fn errors_have_the_form_of_the_clients_api() {
    let config = CONFIG.replacen('{', r#"{"path_prefixes":["/anthropic"],"#, 1);
    for (path, is_anthropic) in [
        ("/v1/messages", true),
        ("/v1/messages/count_tokens", true),
        ("/anthropic/v1/messages", true),
        ("/v1/chat/completions", false),
        ("/v1/messagesx", false),
    ] {
        let mut t = configured(&config);
        let pairs = [(":method", "POST"), (":path", path)];
        let mut outcome = t.request.headers(&mut t.worker, Headers::from_pairs(pairs), false, t.now);
        if t.request.wants_body() {
            outcome = t.body(r#"{"model":"nobodys"}"#);
        }
        let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!("{path}: {outcome:?}") };
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(body["type"] == "error", is_anthropic, "{path} {body}");
        assert_eq!(body["error"]["type"], "not_found_error", "{path}");
        assert_eq!(body["error"]["code"].is_string(), !is_anthropic, "{path}");
    }
}

#[test]
fn whole_requests_of_a_session_stay_on_one_endpoint_by_header_or_else_by_cookie() {
    let config = CONFIG.replacen('{', r#"{"session_cookies":["sid"],"#, 1);
    let sessions: [&[(&str, &str)]; 7] = [
        &[("x-session-id", "a")],
        &[("x-claude-code-session-id", "b")],
        &[("x-session-affinity", "c")],
        &[("session_id", "d")],
        &[("session-id", "e")],
        &[("cookie", "theme=dark; sid=f")],
        &[("x-session-id", "a"), ("cookie", "sid=f")],
    ];
    let mut t = configured(&config);
    let mut served = |headers: &[(&str, &str)], turn: u32| {
        t.request = Request::default();
        t.headers(headers);
        let outcome = t.body(&format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{turn}"}}]}}"#));
        t.done();
        (state(&outcome, DECODE).to_owned(), state(&outcome, REASON).to_owned())
    };
    let mut first_turn = 100..;
    let first = sessions.map(|headers| served(headers, first_turn.next().unwrap()).0);
    assert_eq!(first[6], first[0], "the header counts first");
    assert_eq!(first.iter().collect::<std::collections::BTreeSet<_>>().len(), 2, "sessions spread: {first:?}");
    for turn in 1..12 {
        for (headers, first) in sessions.iter().zip(&first) {
            assert_eq!(served(headers, turn), (first.clone(), "short".to_owned()), "{headers:?}");
        }
    }
    let spread: std::collections::BTreeSet<_> = (0..12).map(|turn| served(&[("cookie", "x=1")], turn).0).collect();
    assert_eq!(spread.len(), 2, "without a session they spread");
}

#[test]
fn each_header_of_a_well_known_client_names_a_session() {
    for header in crate::config::SESSION_HEADERS {
        let mut t = fixture();
        let mut served = std::collections::BTreeSet::new();
        for turn in 0..12 {
            t.request = Request::default();
            t.headers(&[(header, "a")]);
            let outcome = t.body(&format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{turn}"}}]}}"#));
            t.done();
            served.insert(state(&outcome, DECODE).to_owned());
        }
        assert_eq!(served.len(), 1, "{header}");
    }
}

fn upgrade_to(t: &mut Fixture, path: &str) -> Outcome {
    t.request = Request::default();
    let pairs = [(":method", "GET"), (":path", path), ("upgrade", "websocket"), ("connection", "Upgrade")];
    t.request.headers(&mut t.worker, Headers::from_pairs(pairs), false, t.now)
}

#[test]
fn an_upgrade_is_refused_at_once_unless_the_operator_allows_it() {
    let mut t = fixture();
    for path in ["/v1/realtime?model=m", "/v1/realtime", "/v1/chat/completions"] {
        assert_eq!(reply(&upgrade_to(&mut t, path)), (501, "upgrade"));
    }
    assert_eq!(reply(&upgrade_to(&mut t, "/sleep")), (404, "unknown_path"));
    let top = r#"{"upgrades":true,"models":{"gpt/a b":{"targets":[{"model":"m"}]}},"#;
    let mut t = configured(&CONFIG.replacen('{', top, 1).replace(
        r#"10.0.0.2:1", "role": "decode", "models": ["m"]"#,
        r#"10.0.0.2:1", "role": "decode", "models": ["x/y"]"#,
    ));
    // A body would pass unread.
    t.request = Request::default();
    let pairs = [(":method", "POST"), (":path", "/v1/chat/completions"), ("upgrade", "websocket")];
    let outcome = t.request.headers(&mut t.worker, Headers::from_pairs(pairs), false, t.now);
    assert_eq!(reply(&outcome), (501, "upgrade"));
    for (path, expected, rewritten) in [
        ("/v1/realtime?model=m", "10.0.0.2:2", None),
        ("/v1/realtime?intent=a&model=x%2Fy&z", "10.0.0.2:1", None),
        ("/v1/realtime?a&model=gpt/a+b&z=%20", "10.0.0.2:2", Some("/v1/realtime?a&model=m&z=%20")),
        ("/v1/realtime?model=gpt%2fa%20b", "10.0.0.2:2", Some("/v1/realtime?model=m")),
    ] {
        let outcome = upgrade_to(&mut t, path);
        assert_eq!((only_destination(&outcome), outcome.flow), (expected, Flow::Continue), "{path}");
        let path =
            outcome.effects.iter().find_map(|it| if let Effect::SetPath(path) = it { Some(text(path)) } else { None });
        assert_eq!(path, rewritten);
        assert!(!t.request.wants_body());
    }
    for path in ["/v1/realtime", "/v1/realtime?model=", "/v1/realtime?model=%ff"] {
        assert!(state(&upgrade_to(&mut t, path), DESTINATION).starts_with("10.0.0.2:"), "{path}");
    }
    assert_eq!(reply(&upgrade_to(&mut t, "/v1/realtime?model=never")), (404, "unknown_model"));
    t.done();
    assert!(t.is_idle());
}

#[test]
fn only_a_body_that_stands_as_it_is_is_read() {
    let mut t = fixture();
    // SGLang's own header.
    assert_eq!(reply(&t.headers(&[("x-body-compressed", "zstd")])), (415, "content_encoding"));
    for (values, is_read) in [
        (&["identity"][..], true),
        (&["Identity , identity"], true),
        (&[""], true),
        (&["gzip"], false),
        (&["GZIP"], false),
        (&["br"], false),
        (&["zstd"], false),
        (&["identity, deflate"], false),
        (&["identity", "gzip"], false),
        (&["\u{ff}"], false),
    ] {
        t.request = Request::default();
        let headers: Vec<_> = values.iter().map(|value| ("content-encoding", *value)).collect();
        let outcome = t.headers(&headers);
        if is_read {
            assert!(t.request.wants_body(), "{values:?}");
        } else {
            assert_eq!(reply(&outcome), (415, "content_encoding"), "{values:?}");
            let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!() };
            assert!(answer.headers.contains(&("accept-encoding", "identity".to_owned())));
        }
    }
}
