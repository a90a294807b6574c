//! A client's own hand-over parameters, which could name another server's memory or end an engine's process.

use pd_support::body::{CHAT, COMPLETIONS, chat, completion};
use pd_support::client::BOTH;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::{Shared, shared};

use crate::support::{assert_rejected, new_prompt, recorded, short_chat, sum};

/// Ends a real decode server, and the simulated one.
const DEADLY: &str = r#""kv_transfer_params":{"do_remote_prefill":true,"remote_block_ids":null}"#;

/// Ways to put it into an object that ends in `}`.
fn spellings(body: &str) -> Vec<String> {
    let (front, rest) = (body.strip_suffix('}').unwrap(), body.strip_prefix('{').unwrap());
    let escaped = DEADLY.replacen("kv_transfer_params", "kv\\u005ftr\\u0061nsfer_params", 1);
    let all_escaped: String = "kv_transfer_params".bytes().map(|byte| format!("\\u{byte:04X}")).collect();
    let all_escaped = DEADLY.replacen("kv_transfer_params", &all_escaped, 1);
    let harmless = r#""kv_transfer_params":null"#;
    vec![
        format!("{front},{DEADLY}}}"),
        format!("{{{DEADLY},{rest}"),
        format!("{{ {DEADLY} , {DEADLY},{front},{DEADLY}}}", front = front.strip_prefix('{').unwrap()),
        format!("{{{harmless},{front},{DEADLY}}}", front = front.strip_prefix('{').unwrap()),
        format!("{{{DEADLY},{front},{harmless}}}", front = front.strip_prefix('{').unwrap()),
        format!("{front},{escaped}}}"),
        format!("{{{all_escaped},{rest}"),
        format!("\n{{\t{DEADLY}\r\n,{rest} \n"),
    ]
}

fn assert_unharmed(rig: &Rig) {
    for engine in rig.engines() {
        let stats = engine.stats();
        assert!(!engine.is_crashed(), "{stats:#?}");
        assert_eq!((stats.hung, stats.wrong_text, stats.failed_pulls), (0, 0, 0));
    }
}

/// Checks that nothing of a client's parameters has reached an engine: what there is, the filter has put there.
fn assert_none_arrived(rig: &Shared) {
    for request in recorded(rig.engines()) {
        let text = request.text();
        let unescaped = text.replace("\\u005f", "_").replace("\\u0061", "a").to_ascii_lowercase();
        assert!(!unescaped.contains("\"do_remote_prefill\":true"), "{} {text}", request.path);
        assert!(!unescaped.contains("\\u006b\\u0076"), "{} {text}", request.path);
        let own = text.contains("sim_ticket") || text.contains(r#""do_remote_decode":true"#);
        assert_eq!(text.matches("kv_transfer_params").count(), usize::from(own), "{} {text}", request.path);
    }
    assert_unharmed(rig);
}

#[test]
fn no_spelling_of_a_clients_parameters_reaches_an_engine() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for path in [CHAT, COMPLETIONS] {
                for long in [false, true] {
                    let prompt = if long { new_prompt() } else { "hello".to_owned() };
                    let rest = r#","max_tokens":4"#;
                    let body = if path == CHAT { chat(&[&prompt], rest) } else { completion(&prompt, rest) };
                    for body in spellings(&body) {
                        for phase in [None, Some("prefill"), Some("decode")] {
                            let phase = phase.map(|phase| ("x-pd-phase", phase.as_bytes()));
                            let request = client.json(path, body.clone(), phase.as_slice());
                            let answer = client.send(request).await;
                            assert_eq!(answer.status, 200, "{body}: {}", answer.text());
                        }
                    }
                }
            }
        }
        assert_none_arrived(&rig);
    });
}

/// Places that an engine copies parameters from, each with a value that ends a real server or lets the client say where
/// it connects.
const NESTED: [&str; 8] = [
    r#""vllm_xargs":{"kv_transfer_params":0}"#,
    r#""vllm_xargs":{"a":1,"kv_transfer_params":""}"#,
    r#""vllm_xargs":{"kv_transfer_params":[],"a":"b"}"#,
    r#""vllm_xargs":{"kv_\u0074ransfer_params":0}"#,
    r#""vllm_xargs":{"kv_transfer_params":{"do_remote_prefill":true}},"vllm_xargs":{"kv_transfer_params":0}"#,
    r#""sampling_params":{"max_tokens":4,"extra_args":{"kv_transfer_params":{"do_remote_prefill":true,"remote_host":"192.0.2.1"}}}"#,
    r#""ec_transfer_params":{"a":{"peer_host":"192.0.2.1"}},"extra":[{"deep":[{"kv_transfer_params":0}]}]"#,
    r#""parameters":{"bootstrap_host":"192.0.2.1","bootstrap_room":1},"encoder_urls":["http://192.0.2.1"]"#,
];

/// Endings of a legal body that hold one of [`NESTED`], before and behind the prompt.
fn nested(prompt: &str, is_chat: bool) -> Vec<String> {
    let with = |member: &str| {
        let rest = format!(r#","max_tokens":4,{member}"#);
        let body = if is_chat { chat(&[prompt], &rest) } else { completion(prompt, &rest) };
        [body.clone(), body.replacen('{', &format!("{{{member},"), 1)]
    };
    NESTED.iter().flat_map(|member| with(member)).collect()
}

#[test]
fn nested_parameters_reach_no_engine_on_any_path() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for long in [false, true] {
                for path in [CHAT, COMPLETIONS, "/v1/chat/completions/batch", "/invocations", "/vertex_generate"] {
                    let prompt = if long { new_prompt() } else { "hello".to_owned() };
                    for body in nested(&prompt, path != COMPLETIONS) {
                        for phase in [None, Some("prefill"), Some("decode")] {
                            let phase = phase.map(|phase| ("x-pd-phase", phase.as_bytes()));
                            let answer = client.send(client.json(path, body.clone(), phase.as_slice())).await;
                            let wanted = [CHAT, COMPLETIONS].contains(&path);
                            assert!(!wanted || answer.status == 200, "{body}: {}", answer.text());
                        }
                    }
                }
            }
        }
        for request in recorded(rig.engines()) {
            let text = request.text();
            for secret in ["192.0.2.1", "ec_transfer", "bootstrap", "encoder_urls"] {
                assert!(!text.contains(secret), "{} {text}", request.path);
            }
            assert!(!text.contains(r#""a":1,"kv"#) && !text.contains("\\u0074"), "{} {text}", request.path);
        }
        let kept = |text: &str| recorded(rig.engines()).iter().any(|request| request.text().contains(text));
        assert!(kept(r#""vllm_xargs":{"a":1}"#) && kept(r#""vllm_xargs":{"a":"b"}"#), "their neighbours stay");
        assert_none_arrived(&rig);
    });
}

#[test]
fn a_tools_argument_of_that_name_stays() {
    run(async {
        let rig = shared().await;
        let tools = r#","tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"kv_transfer_params":{"type":"object"}}}}}],"max_tokens":4"#;
        let mut client = rig.client(BOTH[0]).await;
        for prompt in ["hello".to_owned(), new_prompt()] {
            assert_eq!(client.post(CHAT, chat(&[&prompt], tools)).await.status, 200);
        }
        assert!(recorded(rig.engines()).iter().all(|request| request.text().contains(tools.split_at(20).0)));
    });
}

#[test]
fn forms_bring_no_parameters() {
    run(async {
        let rig = shared().await;
        let part =
            |head: &str, value: &str| format!("--x\r\ncontent-disposition: form-data; {head}\r\n\r\n{value}\r\n");
        let file = part(r#"name="file"; filename="a.wav""#, "RIFF {\"kv_transfer_params\":0}");
        let whole = |parts: &[String]| format!("{}--x--\r\n", parts.concat());
        let clean = whole(&[part(r#"name="model""#, "sim"), file.clone(), part(r#"name="vllm_xargs""#, r#"{"a":1}"#)]);
        let dirty = whole(&[
            part(r#"name="kv_transfer_params""#, "0"),
            part(r#"name="model""#, "sim"),
            file.clone(),
            part(r#"name="vllm_xargs""#, r#"{"kv_transfer_params":0,"a":1}"#),
        ]);
        let refused = [
            whole(&[file.clone(), part("name*=utf-8''vllm%5Fxargs", r#"{"kv_transfer_params":0}"#)]),
            whole(&[file.clone(), part(r#"name="vllm_xargs""#, r#"{"kv_transfer_params":NaN}"#)]),
            clean.replace("\r\n", "\n"),
        ];
        for http in BOTH {
            let mut client = rig.client(http).await;
            let mut send = async |body: &str, content_type: &str| {
                let mut request = client.json("/v1/audio/transcriptions", body.to_owned(), &[]);
                request.headers_mut().insert("content-type", content_type.parse().unwrap());
                client.send(request).await
            };
            for body in [&clean, &dirty] {
                for content_type in ["multipart/form-data; boundary=x", "Multipart/Form-Data; Boundary=\"x\""] {
                    assert_eq!(send(body, content_type).await.status, 200);
                }
            }
            for body in &refused {
                assert_rejected(&send(body, "multipart/form-data; boundary=x").await, 400, "invalid_form");
            }
            let utf16 = "multipart/form-data; boundary=x; charset=utf-16";
            assert_rejected(&send(&dirty, utf16).await, 400, "invalid_form");
            let pairs = "model=sim&kv_transfer_params=0&vllm_xargs=%7B%22kv_transfer_params%22%3A0%7D";
            assert_eq!(
                send(pairs, "application/x-www-form-urlencoded").await.status,
                415,
                "the simulator's own answer"
            );
        }
        for request in recorded(rig.engines()) {
            let text = request.text();
            assert!(text == clean || text == "model=sim&vllm_xargs=%7B%7D", "{text}");
        }
        assert_eq!(recorded(rig.engines()).len(), 2 * 5);
    });
}

#[test]
fn neither_do_they_by_other_paths() {
    run(async {
        let rig = shared().await;
        let paths = [
            "/invocations",
            "/v1/chat/complet%69ons",
            "//v1//chat/completions",
            "/v1/x/../chat/completions",
            "/pooling?a=b",
        ];
        for http in BOTH {
            let mut client = rig.client(http).await;
            for path in paths {
                for body in spellings(&short_chat()) {
                    for (method, content_type) in [("POST", "application/json"), ("PUT", "text/plain"), ("POST", "")] {
                        let mut request = client.json(path, body.clone(), &[]);
                        *request.method_mut() = method.parse().unwrap();
                        request.headers_mut().insert("content-type", content_type.parse().unwrap());
                        client.send(request).await;
                    }
                }
            }
        }
        let reached = recorded(rig.engines()).iter().filter(|request| request.path == "/invocations").count();
        assert_eq!(reached, 2 * 8 * 3, "they go on, without the parameters");
        assert_none_arrived(&rig);
    });
}

/// Python's `json.loads` takes these bytes, JSON's grammar does not: what the filter cannot read must not pass by a path
/// behind which an engine reads JSON.
#[test]
fn nor_do_they_in_what_only_a_lenient_parser_reads() {
    run(async {
        let rig = shared().await;
        let body = format!(r#"{{"model":"sim",{DEADLY},"prompt":"a","x":"#);
        let utf16: Vec<u8> = format!("{body}1}}").encode_utf16().flat_map(u16::to_le_bytes).collect();
        let bodies = [
            format!("{body}NaN}}").into_bytes(),
            format!("{body}-Infinity}}").into_bytes(),
            format!("\u{feff}{body}1}}").into_bytes(),
            format!("{body}\"\\ud800\"}}").into_bytes(),
            format!("{body}{}1{}}}", "[".repeat(500), "]".repeat(500)).into_bytes(),
            format!("{body}1{}}}", ",\"user\":1".repeat(2_000)).into_bytes(),
            utf16,
        ];
        for http in BOTH {
            let mut client = rig.client(http).await;
            for path in ["/invocations", CHAT] {
                for body in &bodies {
                    client.send(client.json(path, body.clone(), &[])).await;
                }
            }
        }
        for request in recorded(rig.engines()) {
            let bytes: Vec<u8> = request.body.iter().copied().filter(|byte| *byte != 0).collect();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert!(!text.contains("kv_transfer_params"), "{} {}", request.path, &text[..text.len().min(200)]);
        }
        assert_unharmed(&rig);
    });
}

#[test]
fn other_engines_parameters_are_stripped_too() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for prompt in ["hello".to_owned(), new_prompt()] {
                let rest = r#","bootstrap_room":1,"max_tokens":4,"bootstrap_host":"h","disaggregated_params":{"a":[]},"data_parallel_rank":3"#;
                let answer = client.post(CHAT, chat(&[&prompt], rest)).await;
                assert_eq!(answer.status, 200, "{}", answer.text());
            }
        }
        for request in recorded(rig.engines()) {
            for key in ["bootstrap", "disaggregated", "data_parallel_rank"] {
                assert!(!request.text().contains(key), "{}", request.text());
            }
        }
        assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), 2);
    });
}
