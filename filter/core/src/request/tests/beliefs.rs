//! What an endpoint is believed to hold, and what its answers say of it.

use super::*;

/// One decode endpoint that serves everything whole.
fn whole() -> Fixture {
    let one = r#"{"address": "10.0.0.2:1", "role": "decode", "models": ["m"]}"#;
    configured(&format!(r#"{{"pools":{{"default":{{"split":{{"mode":"never"}}}}}},"endpoints":[{one}]}}"#))
}

/// What the response to a request is like: path, members of the request, and the last part, with so many cached tokens.
type Form = (&'static str, &'static str, fn(u64) -> String);

/// Forms of answers that tell of cached tokens.
const FORMS: [Form; 7] = [
    ("/v1/chat/completions", "", |cached| {
        format!(r#"{{"usage":{{"prompt_tokens":2000,"prompt_tokens_details":{{"cached_tokens":{cached}}}}}}}"#)
    }),
    ("/v1/chat/completions", r#","stream":true,"stream_options":{"include_usage":true}"#, stream_of_usage),
    ("/v1/completions", r#","stream":true,"stream_options":{"include_usage":true}"#, stream_of_usage),
    ("/v1/responses", r#","stream":true"#, |cached| {
        format!(
            "event: response.completed\ndata: {{\"response\":{{\"usage\":{{\"input_tokens\":2000,\"input_tokens_details\":{{\"cached_tokens\":{cached}}}}}}}}}\n\n"
        )
    }),
    ("/v1/responses", "", |cached| {
        format!(
            r#"{{"id":"resp_1","usage":{{"input_tokens":2000,"input_tokens_details":{{"cached_tokens":{cached}}}}}}}"#
        )
    }),
    ("/v1/messages", r#","max_tokens":9,"stream":true"#, |cached| {
        format!(
            "event: message_delta\ndata: {{\"usage\":{{\"input_tokens\":9,\"cache_read_input_tokens\":{cached}}}}}\n\n"
        )
    }),
    ("/v1/messages", r#","max_tokens":9"#, |cached| {
        format!(r#"{{"usage":{{"input_tokens":9,"cache_read_input_tokens":{cached}}}}}"#)
    }),
];

fn stream_of_usage(cached: u64) -> String {
    format!(
        "data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":2000,\"prompt_tokens_details\":{{\"cached_tokens\":{cached}}}}}}}\n\ndata: [DONE]\n\n"
    )
}

/// Sends a request with a prompt of 2,000 tokens; the response's headers are there.
fn send(t: &mut Fixture, (path, members, _): Form, name: &str) {
    t.request = Request::default();
    let headers = Headers::from_pairs([(":method", "POST"), (":path", path), (":authority", "a")]);
    t.request.headers(&mut t.worker, headers, false, t.now);
    let text = format!("{name} {}", "word ".repeat(1_600));
    let prompt = match path {
        "/v1/completions" => format!(r#""prompt":"{text}""#),
        "/v1/responses" => format!(r#""input":"{text}""#),
        _ => format!(r#""messages":[{{"role":"user","content":"{text}"}}]"#),
    };
    let outcome = t.body(&format!(r#"{{"model":"m",{prompt}{members}}}"#));
    let decode = state(&outcome, DECODE).to_owned();
    assert_ne!(decode, "", "{outcome:?}");
    t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(200), t.now);
}

fn answer(t: &mut Fixture, (_, _, last): Form, cached: u64) {
    t.request.response_part(&mut t.worker, b"data: {\"choices\":[{}]}\n\n", false, t.now);
    if t.request.wants_response_body() {
        t.request.response_part(&mut t.worker, last(cached).as_bytes(), false, t.now);
    }
    if t.request.wants_response_body() {
        t.request.response_part(&mut t.worker, b"", true, t.now);
    }
    t.done();
}

fn forgotten(t: &Fixture) -> i64 {
    t.worker.counts.pending(Metric::CachesForgotten)
}

#[test]
fn every_form_of_a_whole_answer_judges_what_the_endpoint_holds() {
    for form in FORMS {
        for (cached, after) in [(0, Some(2)), (900, Some(3)), (2_000, None)] {
            let mut t = whole();
            let mut seen = None;
            for number in 0..5 {
                send(&mut t, form, "alike");
                let is_kept = form.0 == "/v1/responses";
                assert_eq!(
                    t.request.wants_response_body(),
                    number > 0 || is_kept,
                    "{form:?}: the first one finds nothing"
                );
                answer(&mut t, form, cached);
                if forgotten(&t) > 0 {
                    seen = Some(number);
                    break;
                }
            }
            assert_eq!(seen, after, "{form:?} {cached}");
            assert!(t.is_idle());
        }
    }
}

#[test]
fn a_stream_whose_client_asked_for_no_usage_is_not_read() {
    let form: Form = ("/v1/chat/completions", r#","stream":true"#, stream_of_usage);
    let mut t = whole();
    for _ in 0..3 {
        send(&mut t, form, "alike");
        assert!(!t.request.wants_response_body());
        t.done();
    }
}

#[test]
fn what_was_read_counts_though_the_answer_has_no_end() {
    // A client that leaves, or trailers behind the body.
    for form in FORMS {
        let mut t = whole();
        for _ in 0..3 {
            send(&mut t, form, "alike");
            t.request.response_part(&mut t.worker, form.2(0).as_bytes(), false, t.now);
            t.done();
        }
        assert_eq!(forgotten(&t), 1, "{form:?}");
    }
}

#[test]
fn few_streams_of_an_endpoint_are_read_at_a_time_and_none_beyond_its_usage() {
    let form = FORMS[1];
    let mut t = whole();
    send(&mut t, form, "alike");
    answer(&mut t, form, 0);
    let mut streams = Vec::new();
    for _ in 0..6 {
        send(&mut t, form, "alike");
        streams.push(core::mem::take(&mut t.request));
    }
    let read = |streams: &[Request]| streams.iter().filter(|request| request.wants_response_body()).count();
    assert_eq!(read(&streams), 3);
    // One ends, one is left by its client, one has told.
    streams[0].response_part(&mut t.worker, form.2(2_000).as_bytes(), true, t.now);
    streams[1].done(&mut t.worker, t.now);
    streams[2].response_part(&mut t.worker, form.2(2_000).as_bytes(), false, t.now);
    assert_eq!(read(&streams), 0);
    for _ in 0..6 {
        send(&mut t, form, "alike");
        streams.push(core::mem::take(&mut t.request));
    }
    assert_eq!(read(&streams), 3);
    streams.iter_mut().for_each(|request| request.done(&mut t.worker, t.now));
    assert!(t.is_idle());
    let (_, state) = t.worker.state.table.iter().next().unwrap();
    assert_eq!(state.streams_read, 0);
}

/// An engine with a prefix cache.
#[derive(Default)]
struct Cache(Vec<String>);

impl Cache {
    /// Tokens of a prompt that are cached. The prompt is, from now on.
    fn cached(&mut self, prompt: &str) -> u64 {
        let common = |seen: &String| seen.bytes().zip(prompt.bytes()).take_while(|(a, b)| a == b).count();
        let bytes = self.0.iter().map(common).max().unwrap_or(0);
        self.0.push(prompt.to_owned());
        bytes as u64 / 4
    }
}

/// Sends prompts one after the other to an engine, and counts the answers of which most was believed and not there, and
/// those in which much was believed.
fn converse(t: &mut Fixture, cache: &mut Cache, prompts: &[String]) -> (usize, usize) {
    let (mut wrong, mut right) = (0, 0);
    for prompt in prompts {
        t.request = Request::default();
        t.headers(&[]);
        let outcome = t.body(&format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{prompt}"}}]}}"#));
        let believed: f64 = state(&outcome, MATCHED_TOKENS).parse().unwrap();
        let decode = state(&outcome, DECODE).to_owned();
        t.request.response_headers(&mut t.worker, Answerer::Host(decode.as_bytes()), Some(200), t.now);
        let cached = cache.cached(prompt);
        if believed >= 512.0 {
            *(if (cached as f64) < believed / 2.0 { &mut wrong } else { &mut right }) += 1;
        }
        t.request.response_part(&mut t.worker, (FORMS[0].2)(cached).as_bytes(), true, t.now);
        t.done();
    }
    (wrong, right)
}

#[test]
fn conversations_that_go_on_after_a_restart_hide_it_for_three_requests_at_most() {
    let system = "system ".repeat(400);
    for shared in ["", &system] {
        let conversations: Vec<_> =
            (0..12).map(|name| format!("{shared} talk {name} {}", format!("w{name} ").repeat(1_600))).collect();
        let mut t = whole();
        let mut cache = Cache::default();
        assert_eq!(converse(&mut t, &mut cache, &conversations).0, 0);
        assert_eq!(converse(&mut t, &mut cache, &conversations), (0, 12));
        assert_eq!(forgotten(&t), 0);
        cache.0.clear();
        // Each one has two turns, and a new one begins: what was computed since the restart is there.
        let turns: Vec<_> = (0..12)
            .flat_map(|name| {
                let turn = &conversations[name];
                let new = format!("{shared} new {name} {}", format!("n{name} ").repeat(1_600));
                [turn.clone(), format!("{turn} and on"), new]
            })
            .collect();
        let (wrong, right) = converse(&mut t, &mut cache, &turns);
        assert!(wrong <= 3, "{wrong} wrong beliefs");
        assert!(right >= 9, "{right} right ones: what came since is believed");
        assert_eq!(forgotten(&t), 1);
    }
}

#[test]
fn a_prompt_that_an_engine_dropped_is_no_restart_where_older_ones_are_there() {
    let conversations: Vec<_> =
        (0..12).map(|name| format!("talk {name} {}", format!("w{name} ").repeat(800))).collect();
    let mut t = whole();
    let mut cache = Cache::default();
    converse(&mut t, &mut cache, &conversations);
    // Every third one was dropped.
    cache.0 = cache.0.into_iter().enumerate().filter(|(at, _)| at % 3 > 0).map(|(_, prompt)| prompt).collect();
    assert_eq!(converse(&mut t, &mut cache, &conversations), (4, 8));
    assert_eq!(forgotten(&t), 0);
}

#[test]
fn a_prefill_leg_beside_its_decode_leg_judges_what_the_endpoint_holds() {
    for engine in ["sglang", "mooncake"] {
        let pool = format!(r#"{{"pools":{{"default":{{"engine":"{engine}","split":{{"mode":"always"}}}}}},"#);
        let mut t = configured(&CONFIG.replacen('{', &pool, 1));
        for index in t.worker.state.table.iter().map(|(index, _)| index).collect::<Vec<_>>() {
            t.worker.state.table.get_mut(index).unwrap().engine_id = Some(br#""e""#[..].into());
        }
        let mut legs = 0;
        while forgotten(&t) == 0 && legs < 6 {
            legs += 1;
            t.request = Request::default();
            t.headers(&[("x-session-id", "s")]);
            t.body(&long_body());
            let usage = r#"{"usage":{"prompt_tokens":800,"prompt_tokens_details":{"cached_tokens":0}}}"#;
            t.answer(200, usage);
            t.done();
        }
        assert_eq!(legs, 3, "{engine}: the first one is believed to find nothing");
    }
}

#[test]
fn a_prefill_leg_before_its_decode_leg_judges_what_the_endpoint_holds() {
    let one = CONFIG.replace(r#"{"address": "10.0.0.1:2", "role": "prefill", "models": ["m"]},"#, "");
    let usage = r#""usage":{"prompt_tokens":800,"prompt_tokens_details":{"cached_tokens":0}}"#;
    let params = PARAMS.replacen('{', r#"{"remote_prefill_cached_tokens":0,"#, 1);
    for (engine, answer) in [
        ("vllm-nixl", format!(r#"{{{usage},"kv_transfer_params":{PARAMS}}}"#)),
        ("vllm-nixl", format!(r#"{{"usage":{{"prompt_tokens":800}},"kv_transfer_params":{params}}}"#)),
        ("vllm-shared", format!("{{{usage}}}")),
    ] {
        let pool = format!(r#"{{"pools":{{"default":{{"engine":"{engine}","split":{{"mode":"always"}}}}}},"#);
        let mut t = configured(&one.replacen('{', &pool, 1));
        let mut legs = 0;
        while forgotten(&t) == 0 && legs < 6 {
            legs += 1;
            t.request = Request::default();
            t.headers(&[]);
            t.body(&long_body());
            assert_eq!(state(&t.answer(200, &answer), REASON), "prefilled");
            t.done();
        }
        assert_eq!(legs, 3, "{answer}: the first one is believed to find nothing");
        assert!(t.is_idle());
    }
}

/// A list with the endpoint of [`whole`].
fn list_of(t: &mut Fixture, version: u64, process: &str) {
    let list = format!(
        r#"{{"wire":1,"epoch":"e","version":{version},"endpoints":[{{"address":"10.0.0.2:1","role":"decode","models":["m"]{process}}}]}}"#
    );
    t.worker.apply(list.as_bytes()).unwrap();
}

/// Answers the next request of a conversation as Envoy does where nothing listens.
fn refuse(t: &mut Fixture, prompt: &str) {
    t.request = Request::default();
    t.headers(&[]);
    t.body(&format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{prompt}"}}]}}"#));
    t.request.response_headers(&mut t.worker, Answerer::FailedConnect(Some(b"10.0.0.2:1")), Some(503), t.now);
    t.done();
    t.now = t.now.saturating_add(Duration::from_secs(1));
}

/// llm-d/llm-d-router#2853: a restart in place went unnoticed.
#[test]
fn each_signal_of_a_restart_leaves_at_most_one_wrong_belief() {
    type Signal = fn(&mut Fixture, &str) -> usize;
    let signals: [(&str, &str, Signal); 6] = [
        ("container", r#","container":"containerd://a""#, |t, _| {
            list_of(t, 2, r#","container":"containerd://b""#);
            0
        }),
        ("restart count", r#","container":"restart 1""#, |t, _| {
            list_of(t, 2, r#","container":"restart 2""#);
            0
        }),
        ("start time or counters in /metrics", r#","cache_epoch":1"#, |t, _| {
            list_of(t, 2, r#","cache_epoch":2"#);
            0
        }),
        ("down, then ready", "", |t, _| {
            list_of(t, 2, r#","state":"down""#);
            list_of(t, 3, "");
            0
        }),
        ("refused connection", "", |t, prompt| {
            refuse(t, prompt);
            1
        }),
        ("refused connection, and the same container", r#","container":"containerd://a""#, |t, prompt| {
            refuse(t, prompt);
            list_of(t, 2, r#","container":"containerd://a""#);
            1
        }),
    ];
    for (what, process, signal) in signals {
        let conversations: Vec<_> =
            (0..12).map(|name| format!("talk {name} {}", format!("w{name} ").repeat(1_600))).collect();
        let mut t = whole();
        list_of(&mut t, 1, process);
        let mut cache = Cache::default();
        assert_eq!(converse(&mut t, &mut cache, &conversations).0, 0);
        assert_eq!(converse(&mut t, &mut cache, &conversations), (0, 12), "{what}");
        cache.0.clear();
        let wrong = signal(&mut t, &conversations[0]);
        let after = converse(&mut t, &mut cache, &conversations[1..]);
        assert!(wrong + after.0 <= 1, "{what}: {wrong} and {after:?}");
        // What came since is believed.
        assert_eq!(converse(&mut t, &mut cache, &conversations[1..]), (0, 11), "{what}");
        assert!(t.is_idle());
    }
}

#[test]
fn doubts_end_with_the_process() {
    let conversations: Vec<_> =
        (0..12).map(|name| format!("talk {name} {}", format!("w{name} ").repeat(1_600))).collect();
    let mut t = whole();
    list_of(&mut t, 1, r#","cache_epoch":1"#);
    let mut cache = Cache::default();
    converse(&mut t, &mut cache, &conversations);
    cache.0.clear();
    assert_eq!(converse(&mut t, &mut cache, &conversations[..1]), (1, 0));
    list_of(&mut t, 2, r#","cache_epoch":2"#);
    converse(&mut t, &mut cache, &conversations);
    assert_eq!(converse(&mut t, &mut cache, &conversations), (0, 12));
    // One prompt that the engine dropped is no restart.
    cache.0.retain(|prompt| *prompt != conversations[5]);
    assert_eq!(converse(&mut t, &mut cache, &conversations), (1, 11));
    assert_eq!(forgotten(&t), 0);
}
