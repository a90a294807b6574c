//! A client's own hand-over parameters, which could name another server's memory or end an engine's process.

use pd_support::body::{CHAT, COMPLETIONS, chat, completion};
use pd_support::client::BOTH;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::{Shared, shared};

use crate::support::{new_prompt, recorded, short_chat, sum};

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
