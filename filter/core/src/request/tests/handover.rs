//! KV caches that are handed over, or not.

use super::*;

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
        let outcome = t.request.response_headers(&mut t.worker, Answerer::Host(upstream.as_bytes()), None, t.now);
        let says = outcome.effects.contains(&Effect::AddResponseHeader(KV_HEADER, "missing".into()));
        assert_eq!((outcome.flow, says), (Flow::Continue, answer == "{}"));
        t.done();
    }
    assert_eq!(warnings, [true, false, false, true, false, false]);
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
    t.request.response_headers(&mut t.worker, Answerer::Host(decode_endpoint.as_bytes()), Some(200), t.now);
    let reads = t.request.wants_response_body();
    let effects =
        t.request.response_part(&mut t.worker, format!("{{{}}}", usage(decode)).as_bytes(), true, t.now).effects;
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

/// vLLM 0.32 and later: decode reports the `remote_prefill_cached_tokens` of its parameters, if they have it.
#[test]
fn a_decode_endpoint_that_would_repeat_the_prefill_legs_count_is_judged_by_its_own() {
    let params = PARAMS.replacen('{', r#"{"remote_prefill_cached_tokens":16,"#, 1);
    let streamed = long_body().replacen('{', r#"{"stream_options":{"include_usage":true},"#, 1);
    for (path, body, details, repeats) in [
        ("/v1/chat/completions", whole_body(), true, false),
        ("/v1/chat/completions", whole_body(), false, false),
        ("/v1/chat/completions", streamed, true, false),
        // Nothing of the answer is read, so that nothing of it can be put right.
        ("/v1/chat/completions", long_body(), true, true),
        ("/v1/messages", whole_body().replacen('{', r#"{"max_tokens":9,"#, 1), true, true),
    ] {
        let mut t = fixture();
        t.request.headers(
            &mut t.worker,
            Headers::from_pairs([(":method", "POST"), (":path", path), (":authority", "a")]),
            false,
            t.now,
        );
        t.body(&body);
        let details = if details { r#","prompt_tokens_details":{"cached_tokens":16}"# } else { "" };
        let answer = format!(r#"{{"usage":{{"prompt_tokens":1000{details}}},"kv_transfer_params":{params}}}"#);
        let outcome = t.answer(200, &answer);
        let leg = edited(&outcome, &body);
        let count = member(member(&leg, "kv_transfer_params"), "remote_prefill_cached_tokens").to_owned();
        assert_eq!(count == "16", repeats, "{path} {body:.60}");
        if repeats {
            continue;
        }
        let decode = state(&outcome, DECODE).to_owned();
        t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(200), t.now);
        let own = r#"{"usage":{"prompt_tokens":1000,"prompt_tokens_details":{"cached_tokens":999}}}"#;
        let effects = t.request.response_part(&mut t.worker, own.as_bytes(), true, t.now).effects;
        let is_edited = effects.iter().any(|effect| match effect {
            Effect::EditResponse(edit) => text(&edit.head).contains(r#""cached_tokens": 16}"#),
            _ => false,
        });
        assert!(is_edited, "the client reads the prefill leg's count: {effects:?}");
        assert_eq!(t.worker.counts.pending(Metric::KvNotMoved), 0);
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
        let prefill = t.worker.state.table.iter().map(|(index, _)| index).collect::<Vec<_>>();
        for index in prefill {
            t.worker.state.table.get_mut(index).unwrap().engine_id = Some(br#""e""#[..].into());
        }
        let mut warnings = |decode, times: usize| {
            let each =
                // What the prefill endpoint is believed to hold it has, but for the first time.
                |_| judged(&mut t, &whole_body(), 900, decode).iter().filter(|e| matches!(e, Effect::Warn(_))).count();
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
