//! Requests that run a prefill leg and a decode leg.

use pd_sim::{Recorded, expected_text};
use pd_support::body::{CHAT, COMPLETIONS, request};
use pd_support::client::{BOTH, Client, Http};
use pd_tests::answer::{is_done, text};
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::{Value, json};

use crate::support::{ask, assert_right, long_chat, new_prompt, only, spliced, sum};

#[test]
fn the_answer_is_that_of_one_server() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for path in [CHAT, COMPLETIONS] {
                for stream in [false, true] {
                    let body = request(path, &new_prompt(), &format!(r#","max_tokens":20,"stream":{stream}"#));
                    let answer = client.post(path, body.clone()).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    assert_eq!(is_done(&answer.body), stream);
                    let content_type = if stream { "text/event-stream; charset=utf-8" } else { "application/json" };
                    assert_eq!(answer.header("content-type"), Some(content_type));
                    let alone = Client::connect(rig.decode[0].addr(), Http::One).await.post(path, body.clone()).await;
                    assert_eq!(text(&answer.body), text(&alone.body));
                    assert_eq!(text(&answer.body), expected_text("sim", &body));
                }
            }
        }
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 8);
        assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), 8);
        assert_eq!(sum(rig.engines(), |stats| stats.wrong_text), 0);
    });
}

#[test]
fn the_prefill_leg_ends_by_length_at_one_token() {
    run(async {
        let rig = shared().await;
        let limits = [
            r#","max_tokens":20,"stream":true,"stream_options":{"include_usage":true}"#,
            r#","max_completion_tokens":20,"max_tokens":30,"n":1,"stop":["zz","yy"],"min_tokens":3"#,
            r#","stop":"zz","max_tokens":5,"min_tokens":5,"stop_token_ids":[7]"#,
        ];
        for (http, rest) in BOTH.into_iter().flat_map(|http| limits.map(|rest| (http, rest))) {
            for path in [CHAT, COMPLETIONS] {
                rig.engines().for_each(|engine| engine.clear_requests());
                let body = request(path, &new_prompt(), rest);
                let mut client = rig.client(http).await;
                let answer = client.post(path, body.clone()).await;
                assert_right(&answer, &body);
                let leg: Value = serde_json::from_slice(&only(&rig.prefill).body).unwrap();
                assert_eq!((&leg["max_tokens"], &leg["stream"]), (&json!(1), &json!(false)));
                let chat_limit = leg.get("max_completion_tokens").is_none_or(|limit| *limit == 1);
                assert!(chat_limit, "{leg}");
                for key in ["stop", "stop_token_ids", "min_tokens", "stream_options", "n"] {
                    assert!(leg.get(key).is_none(), "{key} in {leg}");
                }
                assert_eq!(leg["kv_transfer_params"]["do_remote_decode"], true);
            }
        }
        assert_eq!(sum(&rig.prefill, |stats| stats.generated_tokens), sum(&rig.prefill, |stats| stats.requests));
    });
}

#[test]
fn the_decode_leg_is_the_clients_bytes_behind_the_parameters() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            rig.engines().for_each(|engine| engine.clear_requests());
            // White space, key order, escapes, numbers that no double holds, unknown members on every level.
            let prompt = new_prompt();
            let body = format!(
                "{{ \"zeta\" : [1.0e5, -0, 18446744073709551617] ,\n\t\"stream\":false,\"messages\": [ {{\"x-own\":{{\"b\":1,\"a\":2}},\
                 \"content\":\"{prompt} \\u00e9\\/\\ud83d\\ude00 é\",\"role\":\"user\",\"name\":\"n\"}} ],\"seed\":9007199254740993,\
                 \"model\":\"sim\" , \"max_tokens\":7,\"metadata\":{{}},\"logit_bias\":{{\"1\":1e-7}} }} "
            );
            let mut client = rig.client(http).await;
            let answer = client.post(CHAT, body.clone()).await;
            assert_right(&answer, &body);
            let decode = only(&rig.decode);
            let params = spliced(&body, &decode.body);
            assert!(params.contains("sim_ticket") && params.contains("\\/"), "{params}");
            assert_eq!(decode.header("content-length"), Some(decode.body.len().to_string().as_str()));
            assert_eq!(decode.path, CHAT);
            let prefill = only(&rig.prefill).text();
            for part in [
                "\"zeta\" : [1.0e5, -0, 18446744073709551617]",
                "\"x-own\":{\"b\":1,\"a\":2}",
                "\"seed\":9007199254740993",
            ] {
                assert!(prefill.contains(part), "{part} in {prefill}");
            }
        }
        assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), 2);
    });
}

#[test]
fn headers_reach_both_engines_as_they_are() {
    run(async {
        let rig = shared().await;
        let sent: [(&str, &[u8]); 8] = [
            ("authorization", b"Bearer t0p-secret=="),
            ("x-odd", b"\xff\xfe caf\xe9 \x80"),
            ("x-twice", b"one"),
            ("x-twice", b"two, three"),
            ("x-empty", b""),
            ("cookie", b"a=b"),
            ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            ("user-agent", b"test/1"),
        ];
        for http in BOTH {
            rig.engines().for_each(|engine| engine.clear_requests());
            let mut client = rig.client(http).await;
            let body = long_chat();
            let mut headers = sent.to_vec();
            headers.push(("accept-encoding", b"identity;q=0.5"));
            let answer = client.send(client.json(CHAT, body.clone(), &headers)).await;
            assert_right(&answer, &body);
            let (prefill, decode) = (only(&rig.prefill), only(&rig.decode));
            for (leg, name) in [(&prefill, "prefill"), (&decode, "decode")] {
                for (header, _) in sent {
                    let wanted: Vec<&[u8]> = sent.iter().filter(|(name, _)| *name == header).map(|(_, v)| *v).collect();
                    assert_eq!(values(leg, header), wanted, "{header} at {name} over {http:?}");
                }
                assert_eq!(leg.header("content-type"), Some("application/json"), "{name}");
                assert_eq!(leg.header("host"), Some(rig.address().to_string().as_str()), "{name}");
            }
            assert_eq!(decode.header("accept-encoding"), Some("identity;q=0.5"));
            // Push-mode connectors pair the legs by it.
            let ids = [&prefill, &decode].map(|leg| leg.header("x-request-id").map(str::to_owned));
            assert!(ids[0].is_some() && ids[0] == ids[1], "{ids:?}");
            assert_eq!(answer.header("x-request-id"), ids[0].as_deref());
        }
    });
}

#[test]
fn long_prompts_are_split_as_short_ones_are() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for bytes in [40_000, 300_000] {
                let prompt = new_prompt().repeat(bytes / 4_000);
                let body = request(CHAT, &prompt, r#","max_tokens":8"#);
                assert_right(&client.post(CHAT, body.clone()).await, &body);
            }
        }
        assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), 4);
    });
}

#[test]
fn many_requests_at_once_are_all_answered_right() {
    run(async {
        let rig = shared().await;
        let one = async |http| {
            let mut client = rig.client(http).await;
            for i in 0..20 {
                let stream = format!(r#","max_tokens":12,"stream":{}"#, i % 2 == 0);
                let body = request(CHAT, &new_prompt(), &stream);
                assert_right(&client.post(CHAT, body.clone()).await, &body);
            }
        };
        futures::future::join_all((0..12).map(|i| one(BOTH[i % 2]))).await;
        assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), 240);
        assert_eq!(sum(rig.engines(), |stats| stats.wrong_text + stats.leases_open), 0);
    });
}

fn values<'a>(leg: &'a Recorded, name: &str) -> Vec<&'a [u8]> {
    leg.headers.get_all(name).iter().map(|value| value.as_bytes()).collect()
}

#[test]
fn prompts_go_to_engines_whose_bounds_have_room() {
    run(async {
        let bounds = |list: &mut [serde_json::Value]| {
            list[0]["max_prompt_tokens"] = 200.into();
            list[1]["min_prompt_tokens"] = 201.into();
        };
        let rig = Rig::builder().list(bounds).start().await;
        let mut client = rig.client(Http::One).await;
        for _ in 0..8 {
            ask(&mut client, &long_chat()).await;
        }
        let legs: Vec<_> = rig.prefill.iter().map(|engine| engine.stats().prefill_legs).collect();
        assert_eq!(legs, [0, 8]);
    });
}
