//! NIXL's hand-over: right once, and wrong in the ways of the real one.

use std::time::Duration;

use futures::future::join_all;
use pd_sim::{Config, Handle, Role, WRONG_PREFIX, expected_text, start};
use serde_json::json;
use tokio::io::AsyncReadExt as _;

use crate::client::{
    Answer, CHAT, COMPLETIONS, ask, ask_with_fault, begin, chat, decode_leg, get, post, prefill_leg, send,
};

const PROMPT: &str = "Once upon a time there was a prompt of more than one block, and it lived on a prefill server.";

async fn pair() -> (Handle, Handle) {
    (start(Config::of(Role::Prefill)).await.unwrap(), start(Config::of(Role::Decode)).await.unwrap())
}

async fn params(prefill: &Handle, prompt: &str) -> String {
    ask(prefill, CHAT, &prefill_leg(prompt)).await.params()
}

async fn decode(decode: &Handle, prompt: &str, params: &str) -> Answer {
    ask(decode, CHAT, &decode_leg(prompt, params, "")).await
}

#[tokio::test]
async fn fresh_params_move_the_kv_and_give_the_right_text() {
    let (prefill, decode) = pair().await;
    for (i, stream) in [false, true].into_iter().enumerate() {
        let prompt = format!("{i} {PROMPT}");
        let params = params(&prefill, &prompt).await;
        assert!(params.contains("do_remote_prefill\" : true"), "{params}");
        let answer = ask(&decode, CHAT, &decode_leg(&prompt, &params, &format!(r#","stream":{stream}"#))).await;
        assert_eq!(answer.choice(0), expected_text("sim", chat(&prompt, "")));
    }
    let (p, d) = (prefill.stats(), decode.stats());
    assert_eq!((p.prefill_legs, p.local_prefills, p.generated_tokens), (2, 0, 2));
    assert_eq!((p.leases_issued, p.leases_pulled, p.leases_open, p.pinned_tokens), (2, 2, 0, 0));
    assert_eq!((d.decode_legs, d.local_prefills, d.wrong_text, d.computed_tokens), (2, 0, 0, 0));
    assert_eq!(d.external_tokens, p.prompt_tokens);
}

#[tokio::test]
async fn a_server_of_another_revision_cannot_fetch() {
    let of = |role, revision: Option<&str>| Config { revision: revision.map(str::to_owned), ..Config::of(role) };
    for (one, other) in [(Some("a"), Some("b")), (Some("a"), None), (None, Some("b"))] {
        let prefill = start(of(Role::Prefill, one)).await.unwrap();
        let (same, different) =
            (start(of(Role::Decode, one)).await.unwrap(), start(of(Role::Decode, other)).await.unwrap());
        let issued = params(&prefill, PROMPT).await;
        let refused = decode(&different, PROMPT, &issued).await;
        assert!(refused.status == 500 && refused.text.contains("compatibility hash mismatch"), "{}", refused.text);
        assert_eq!((different.stats().failed_pulls, prefill.stats().leases_open), (1, 1), "the blocks stay");
        assert_eq!(decode(&same, PROMPT, &issued).await.choice(0), expected_text("sim", chat(PROMPT, "")));
        let streamed = ask(&different, CHAT, &decode_leg(PROMPT, &issued, r#","stream":true"#)).await;
        assert!(streamed.text.contains("compatibility hash mismatch"), "{}", streamed.text);
    }
}

#[tokio::test]
async fn params_come_only_without_stream_and_by_length() {
    let sim = start(Config::of(Role::Prefill)).await.unwrap();
    let ask_kv = |fields: &str| {
        let body = chat(PROMPT, &format!(r#"{fields},"kv_transfer_params":{{"do_remote_decode":true}}"#));
        let request = post(&sim, CHAT, &body);
        async move { send(request).await.unwrap() }
    };
    // The natural length is at most 48 tokens.
    assert_eq!(ask_kv(r#","max_tokens":100"#).await.params(), "null");
    let stop = &expected_text("sim", chat(PROMPT, ""))[1..3];
    assert_eq!(ask_kv(&format!(r#","max_tokens":1,"stop":"{stop}""#)).await.params(), "null");
    assert_eq!(sim.stats().leases_issued, 0);
    assert!(!ask_kv(r#","max_tokens":1,"stream":true"#).await.text.contains("kv_transfer_params"));
    // Nobody can fetch these: they stay until the lease ends.
    assert_eq!((sim.stats().leases_open, sim.stats().prefill_legs), (1, 3));
    assert_eq!(ask(&sim, CHAT, &chat(PROMPT, "")).await.params(), "null");
}

#[tokio::test]
async fn used_altered_and_expired_params_give_wrong_text_with_200() {
    let (prefill, other) = pair().await;
    let right = expected_text("sim", chat(PROMPT, ""));
    let used = params(&prefill, PROMPT).await;
    assert_eq!(decode(&other, PROMPT, &used).await.choice(0), right);
    let rebuilt = params(&prefill, PROMPT).await;
    let rebuilt = serde_json::from_str::<serde_json::Value>(&rebuilt).unwrap().to_string();
    let expired = params(&prefill, PROMPT).await;
    prefill.expire_leases();
    let others = params(&prefill, "Another prompt").await;
    for (params, reason) in [(used, "reused"), (rebuilt, "unknown"), (expired, "expired"), (others, "other_prompt")] {
        let answer = decode(&other, PROMPT, &params).await;
        assert_eq!(answer.status, 200);
        let text = answer.choice(0);
        assert!(text.starts_with(WRONG_PREFIX) && !text.contains(&right), "{reason}: {text}");
        assert_eq!(other.stats().wrong_text_by.get(reason), Some(&1), "{reason}");
    }
    assert_eq!(other.stats().wrong_text, 4);
    // What was computed from the wrong KV is not taken for the prompt's.
    let answer = ask(&other, CHAT, &chat(PROMPT, "")).await;
    assert_eq!(answer.choice(0), right);
}

#[tokio::test]
async fn decode_reports_the_prefill_servers_hits_unless_it_gets_none() {
    let (prefill, other) = pair().await;
    let details = |answer: &Answer| answer.json()["usage"]["prompt_tokens_details"].clone();
    for (number, (fault, in_params, is_own)) in
        [("", true, false), ("handover:recompute", true, false), ("", false, true), ("handover:recompute", false, true)]
            .into_iter()
            .enumerate()
    {
        let prompt = format!("{number} {PROMPT}");
        let mut params = params(&prefill, &prompt).await;
        assert!(params.contains("\"remote_prefill_cached_tokens\" : 0,"), "{params}");
        if !in_params {
            params = params.replace("cached_tokens\" : 0", "cached_tokens\" : null");
        }
        let answer = ask_with_fault(&other, fault, &decode_leg(&prompt, &params, "")).await.unwrap();
        assert_eq!(answer.choice(0), expected_text("sim", chat(&prompt, "")));
        let (prompt_tokens, details) = (answer.json()["usage"]["prompt_tokens"].clone(), details(&answer));
        // The server's own count shows whether the KV cache came; the count in the parameters does not.
        let own = if fault.is_empty() { prompt_tokens } else { json!(0) };
        assert_eq!(details["cached_tokens"], if is_own { own } else { json!(0) }, "{fault} {in_params}");
        assert_eq!(details["created_cache_tokens"] == json!(0), fault.is_empty(), "{details}");
    }
}

#[tokio::test]
async fn a_decode_server_that_stands_still_beyond_the_lease_answers_wrong_text() {
    let lease = Duration::from_millis(50);
    let prefill = start(Config { lease, ..Config::of(Role::Prefill) }).await.unwrap();
    let other = start(Config::of(Role::Decode)).await.unwrap();
    let body = decode_leg(PROMPT, &params(&prefill, PROMPT).await, "");
    let answer = ask_with_fault(&other, "handover:stall=150", &body).await.unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.choice(0).starts_with(WRONG_PREFIX), "{}", answer.text);
    let page = send(get(&prefill, "/metrics")).await.unwrap().text;
    for name in ["nixl_num_kv_expired_reqs_total", "nixl_num_notifications_after_expiry_total"] {
        let line = page.lines().find(|line| line.starts_with(&format!("vllm:{name}{{"))).unwrap();
        assert!(line.ends_with(" 1.0"), "{line}");
    }
    assert!(page.lines().any(|line| line.starts_with("process_start_time_seconds 1")), "{page}");
}

#[tokio::test]
async fn a_dead_engine_is_an_error_in_the_form_of_the_answer() {
    let (prefill, other) = pair().await;
    let side = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let dead = params(&prefill, PROMPT).await;
    let port = serde_json::from_str::<serde_json::Value>(&dead).unwrap()["remote_port"].as_u64().unwrap();
    prefill.stop().await;
    let answer = decode(&other, PROMPT, &dead).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (500, &json!(500)));
    // Another engine at the same place does not have the blocks either.
    let side = std::net::SocketAddr::new(side.ip(), port as u16);
    let restarted = start(Config { side_channel: Some(side), ..Config::of(Role::Prefill) }).await.unwrap();
    assert_eq!(decode(&other, PROMPT, &dead).await.status, 500);
    let answer = ask(&other, CHAT, &decode_leg(PROMPT, &dead, r#","stream":true"#)).await;
    let events = answer.events();
    assert_eq!((answer.status, events.len(), events[2]), (200, 3, "[DONE]"));
    assert!(events[0].contains(r#""role":"assistant""#) && events[1].starts_with(r#"{"error":{"#), "{events:?}");
    assert_eq!(other.stats().failed_pulls, 3);
    assert_eq!(restarted.stats().leases_pulled, 0);
}

#[tokio::test]
async fn params_without_request_id_hang_until_the_client_goes() {
    let (prefill, other) = pair().await;
    let params = params(&prefill, PROMPT).await.replace("remote_request_id", "remote_request_ix");
    for (i, stream) in [false, true].into_iter().enumerate() {
        let body = decode_leg(PROMPT, &params, &format!(r#","stream":{stream}"#));
        let mut client = begin(other.addr(), CHAT, &body).await;
        other.wait_for(|stats| stats.hung == i as u64 + 1).await;
        if stream {
            let mut head = [0; 15];
            client.read_exact(&mut head).await.unwrap();
            assert_eq!(&head, b"HTTP/1.1 200 OK");
        }
        drop(client);
        other.wait_for(|stats| stats.client_disconnects == i as u64 + 1 && stats.in_flight == 0).await;
    }
}

#[tokio::test]
async fn params_without_block_ids_end_the_process() {
    for params in [r#"{"do_remote_prefill":true}"#, r#"{"do_remote_prefill":true,"remote_block_ids":null}"#] {
        let sim = start(Config::of(Role::Decode)).await.unwrap();
        assert!(send(post(&sim, CHAT, &decode_leg(PROMPT, params, ""))).await.is_err());
        sim.crashed().await;
        assert!(sim.is_crashed() && sim.stats().crashed);
        let refused = async {
            // The listener closes a moment after the connections.
            while send(post(&sim, CHAT, &chat(PROMPT, ""))).await.is_ok() {}
        };
        tokio::time::timeout(Duration::from_secs(10), refused).await.unwrap();
        assert_eq!(sim.stats().local_prefills, 0);
    }
}

#[tokio::test]
async fn blocks_stay_pinned_until_the_lease_ends() {
    let config = Config { lease: Duration::from_millis(20), cache_tokens: 320, ..Config::of(Role::Prefill) };
    let sim = start(config).await.unwrap();
    let prompt = "x".repeat(4 * 200);
    // The second needs blocks that the first one's lease holds: it waits for its end.
    let (first, second) = (prefill_leg(&prompt), prefill_leg(&prompt.replace('x', "y")));
    let answers = tokio::join!(ask(&sim, CHAT, &first), ask(&sim, CHAT, &second));
    assert_ne!(answers.0.params(), answers.1.params());
    let stats = sim.wait_for(|stats| stats.leases_expired == 2).await;
    assert_eq!((stats.leases_open, stats.pinned_tokens, stats.leases_issued), (0, 0, 2));
}

#[tokio::test]
async fn open_leases_count_as_used_cache() {
    let sim = start(Config { cache_tokens: 1_600, ..Config::of(Role::Prefill) }).await.unwrap();
    params(&sim, &"x".repeat(4 * 400)).await;
    let stats = sim.stats();
    assert!((400..420).contains(&stats.pinned_tokens) && stats.leases_open == 1);
    let metrics = send(crate::client::get(&sim, "/metrics")).await.unwrap().text;
    let usage = metrics.lines().find_map(|line| line.strip_prefix("vllm:kv_cache_usage_perc")).unwrap();
    let usage: f64 = usage.rsplit_once(' ').unwrap().1.parse().unwrap();
    assert!((0.25..0.28).contains(&usage), "{usage}");
}

#[tokio::test]
async fn a_batch_shares_one_object_and_only_its_first_prompt_is_right() {
    let (prefill, other) = pair().await;
    let body = |fields: &str| format!(r#"{{"model":"sim","prompt":["first","second"]{fields}}}"#);
    let leg = body(r#","max_tokens":1,"kv_transfer_params":{"do_remote_decode":true}"#);
    let params = ask(&prefill, COMPLETIONS, &leg).await.params();
    assert_eq!(prefill.stats().leases_open, 2);
    let answer = ask(&other, COMPLETIONS, &body(&format!(r#","kv_transfer_params":{params}"#))).await;
    assert_eq!(answer.choice(0), expected_text("sim", r#"{"prompt":"first"}"#));
    assert!(answer.choice(1).starts_with(WRONG_PREFIX));
}

#[tokio::test]
async fn a_decode_server_without_params_computes_the_prompt_itself() {
    let (_, other) = pair().await;
    let body = chat(PROMPT, "");
    assert_eq!(ask(&other, CHAT, &body).await.choice(0), expected_text("sim", &body));
    let stats = other.stats();
    assert_eq!((stats.local_prefills, stats.decode_legs, stats.external_tokens), (1, 0, 0));
    assert_eq!(stats.computed_tokens, stats.prompt_tokens);
}

#[tokio::test]
async fn many_pairs_at_once_are_all_right() {
    let (prefill, other) = pair().await;
    let one = |i: usize| {
        let (prefill, other) = (&prefill, &other);
        async move {
            let prompt = format!("{i} {}", PROMPT.repeat(i % 7));
            let params = params(prefill, &prompt).await;
            assert_eq!(decode(other, &prompt, &params).await.choice(0), expected_text("sim", chat(&prompt, "")));
        }
    };
    join_all((0..64).map(one)).await;
    assert_eq!((other.stats().decode_legs, other.stats().wrong_text, prefill.stats().leases_open), (64, 0, 0));
}
