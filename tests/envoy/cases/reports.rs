//! Requests of public reports that other gateways and engines got wrong. Each case names its report.

use pd_support::body::{CHAT, COMPLETIONS, chat, completion};
use pd_support::client::{BOTH, Client, Http};
use pd_support::wait::until;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::{Value, json};

use crate::support::{assert_rejected, assert_right, long_chat, new_id, new_prompt, recorded, short_chat, sum};

const GENERATE: &str = "/inference/v1/generate";

#[test]
fn parameters_of_a_hand_over_reach_no_engine() {
    const EVIL: &str = r#"{"do_remote_prefill":true,"do_remote_decode":false,"remote_host":"evil","remote_port":1,"tp_size":1000000000,"remote_block_ids":[[1]],"remote_engine_id":"evil","remote_request_id":"evil"}"#;
    run(async {
        let rig = shared().await;
        let mut client = rig.client(Http::One).await;
        let ids = format!("{:?}", new_prompt().as_bytes());
        for (report, path, body) in [
            // An engine runs out of memory by `tp_size`.
            (
                "vllm-project/vllm#51137",
                CHAT,
                chat(&[&new_prompt()], &format!(r#","max_tokens":4,"kv_transfer_params":{EVIL}"#)),
            ),
            (
                "vllm-project/vllm#51137",
                COMPLETIONS,
                completion("hi", &format!(r#","max_tokens":4,"kv_transfer_params":{EVIL}"#)),
            ),
            // The engine reads them on its own API, too.
            (
                "vllm-project/vllm#42644",
                GENERATE,
                format!(
                    r#"{{"model":"sim","token_ids":{ids},"sampling_params":{{"max_tokens":4}},"kv_transfer_params":{EVIL}}}"#
                ),
            ),
            (
                "PrimeIntellect-ai/prime-rl#2490",
                GENERATE,
                format!(
                    r#"{{"model":"sim","token_ids":[1],"sampling_params":{{"max_tokens":4,"extra_args":{{"kv_transfer_params":{EVIL}}}}}}}"#
                ),
            ),
            // Parameters of an encoder's cache, which name a host as those of a KV cache do.
            (
                "llm-d/llm-d-router#1704",
                CHAT,
                chat(&[&new_prompt()], &format!(r#","max_tokens":4,"ec_transfer_params":{{"hash":{EVIL}}}"#)),
            ),
            (
                "llm-d/llm-d-kv-cache#602",
                GENERATE,
                format!(
                    r#"{{"model":"sim","token_ids":{ids},"sampling_params":{{"max_tokens":4,"extra_args":{{"ec_transfer_params":{{"hash":{EVIL}}}}}}}}}"#
                ),
            ),
            (
                "llm-d/llm-d-router#2140",
                COMPLETIONS,
                completion(
                    "hi",
                    &format!(r#","max_tokens":4,"vllm_xargs":{{"kv_transfer_params":{{"remote_prefiller":{EVIL}}}}}"#),
                ),
            ),
        ] {
            let answer = client.post(path, body).await;
            assert_eq!(answer.status, 200, "{report}: {}", answer.text());
            assert!(recorded(rig.engines()).iter().all(|leg| !leg.text().contains("evil")), "{report}");
        }
        // A header that names a server.
        let body = long_chat();
        let request = client.json(CHAT, body.clone(), &[("x-prefiller-host-port", b"evil:1")]);
        assert_right(&client.send(request).await, &body);
        let arrived = |name| recorded(rig.engines()).iter().any(|leg| leg.header(name).is_some());
        assert!(!arrived("x-prefiller-host-port"), "llm-d/llm-d-router#242");
        assert!(rig.engines().all(|engine| engine.stats().failed_pulls == 0 && !engine.is_crashed()));
    });
}

#[test]
fn paths_that_administer_an_engine_reach_none() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for (report, path) in [
                // No key of vLLM's protects these.
                ("vllm-project/vllm#29922", "/pause"),
                ("vllm-project/vllm#29922", "/scale_elastic_ep"),
                ("vllm-project/vllm#29922", "/reset_prefix_cache"),
                ("vllm-project/vllm#29922", "/sleep?level=1"),
                ("vllm-project/vllm#29922", "/collective_rpc"),
                // Runs code of the caller.
                ("sgl-project/sglang#26789", "/load_lora_adapter_from_tensors"),
                ("sgl-project/sglang#26789", "/v1/load_lora_adapter"),
                // Fetches a KV cache from whichever server the caller names.
                ("NVIDIA/TensorRT-LLM#15736", "/v1/kv_transfer"),
                ("a server's role", "/pd_role_switch"),
                ("other people's requests", "/abort_request"),
                ("other people's requests", "/inference/v1/abort_requests"),
            ] {
                for spelt in [path.to_owned(), format!("{path}/"), path.replacen("/", "/%2e/", 1)] {
                    for method in ["POST", "GET", "PUT"] {
                        let mut request = client.json(&spelt, r#"{"model":"sim","source":"http://192.0.2.1"}"#, &[]);
                        *request.method_mut() = method.parse().unwrap();
                        let answer = client.send(request).await;
                        assert!(
                            matches!(answer.status, 301 | 307 | 400 | 404),
                            "{report} {method} {spelt}: {}",
                            answer.status
                        );
                    }
                }
                assert_rejected(&client.post(path, "{}").await, 404, "unknown_path");
            }
            for path in [
                "/v1/audio/../load_lora_adapter",
                "/v1/audio/%2e%2e/load_lora_adapter",
                "/v1/audio/..%2fload_lora_adapter",
                "/v1/responses/%252e%252e/%252e%252e/sleep",
                "/v1/models/..;/sleep",
                "/v1/audio\\..\\..\\sleep",
                "/v1//../sleep",
                "/SLEEP",
            ] {
                client.try_send(client.json(path, "{}", &[])).await.ok();
            }
        }
        for request in recorded(rig.engines()) {
            let path = request.path.to_ascii_lowercase();
            let is_below = ["/v1/audio/", "/v1/responses/", "/v1/models/"].iter().any(|known| path.starts_with(known));
            assert!(is_below && !path.contains("/../") && !path.contains("/..%2f"), "{} {path}", request.method);
        }
    });
}

/// A form with a file in front of its other fields.
fn form(fields: &[(&str, &str)], file_bytes: usize) -> String {
    let file = format!(
        "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.ogg\"\r\nContent-Type: audio/ogg\r\n\r\n{}\r\n",
        "OggS".repeat(file_bytes / 4)
    );
    let field = |(name, value): &(&str, &str)| {
        format!("--x\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
    };
    format!("{file}{}--x--\r\n", fields.iter().map(field).collect::<String>())
}

#[test]
fn the_model_decides_which_server_gets_what_has_no_prompt() {
    run(async {
        // One decode server for text, one for all else.
        let rig = Rig::builder()
            .list(|list| {
                for (i, entry) in list.iter_mut().enumerate() {
                    entry["models"] = if i == 3 { json!(["embed", "whisper/1", "rank"]) } else { json!(["sim"]) };
                    entry["models_closed"] = json!(true);
                }
            })
            .plugin(json!({"models": {"text-embedding-3-small": {"targets": [{"model": "embed"}]}, "whisper-1": {"targets": [{"model": "whisper/1"}]}}}))
            .start()
            .await;
        let text = "multipart/form-data; boundary=x";
        let of_form = |model: &str| form(&[("response_format", "json"), ("model", model)], 3 << 20);
        for http in BOTH {
            let mut client = rig.client(http).await;
            for (report, path, content_type, body) in [
                // A router wanted a prompt of each request.
                (
                    "llm-d/llm-d-router#1340",
                    "/v1/rerank",
                    "application/json",
                    r#"{"model":"rank","query":"hello","documents":["doc1","doc2"]}"#.to_owned(),
                ),
                (
                    "llm-d/llm-d-router#1340",
                    "/v1/score",
                    "application/json",
                    r#"{"model":"rank","text_1":"a","text_2":["b"]}"#.to_owned(),
                ),
                (
                    "BerriAI/litellm#14937",
                    "/rerank",
                    "application/json",
                    r#"{"model":"rank","query":"hello","documents":["doc1"],"top_n":1}"#.to_owned(),
                ),
                // Embeddings went to the server of the chat model.
                (
                    "mohitsoni48/TurboLLM#251",
                    "/v1/embeddings",
                    "application/json",
                    r#"{"model":"text-embedding-3-small","input":["text to embed"],"encoding_format":"float"}"#
                        .to_owned(),
                ),
                // Forms: no JSON, and the model behind a file that is larger than a buffer.
                ("vllm-project/production-stack#1019", "/v1/audio/transcriptions", text, of_form("whisper/1")),
                ("vllm-project/aibrix#1859", "/v1/audio/translations", text, of_form("whisper/1")),
                ("agentgateway/agentgateway#2301", "/v1/audio/transcriptions", text, of_form("whisper-1")),
                ("ggml-org/llama.cpp#22215", "/v1/images/edits", text, of_form("embed")),
            ] {
                rig.engines().for_each(pd_sim::Handle::clear_requests);
                let mut request = client.json(path, body, &[("x-session-id", b"s")]);
                request.headers_mut().insert("content-type", content_type.parse().unwrap());
                let answer = client.send(request).await;
                assert_eq!(
                    (answer.reason(), recorded([&rig.decode[1]]).len()),
                    (None, 1),
                    "{report}: {}",
                    answer.text()
                );
                assert_eq!(recorded(rig.engines()).len(), 1, "{report}: no other server");
                let got = recorded([&rig.decode[1]]).remove(0).text();
                assert!(
                    !got.contains("whisper-1") && !got.contains("text-embedding"),
                    "{report}: an alias is replaced"
                );
            }
            // The model is in the wrong place for a server that has it not.
            let mut request = client.json("/v1/audio/transcriptions", form(&[("model", "sim2")], 100), &[]);
            request.headers_mut().insert("content-type", text.parse().unwrap());
            assert_rejected(&client.send(request).await, 404, "unknown_model");
            // sybil-solutions/vllm-studio#194: a form that is none.
            let mut request = client.json("/v1/audio/transcriptions", "not-multipart", &[]);
            request.headers_mut().insert("content-type", "multipart/form-data; boundary=nope".parse().unwrap());
            assert_rejected(&client.send(request).await, 400, "invalid_form");
        }
    });
}

#[test]
fn lists_of_models_say_what_clients_look_for() {
    run(async {
        let rig = Rig::builder()
            .control(&["--scrape-interval=0.1"])
            .every_engine(|config| {
                config.max_model_len = 32_768;
                config.loras = vec!["adapter".to_owned()];
            })
            .plugin(json!({"models": {
                "coder": {"targets": [{"model": "sim"}]},
                "asleep": {"targets": [{"model": "scaled-to-zero"}]},
            }}))
            .start()
            .await;
        let card = async |client: &mut Client, id: &str| -> Value {
            let list = client.get("/v1/models").await.json();
            list["data"]
                .as_array()
                .and_then(|all| all.iter().find(|card| card["id"] == id))
                .cloned()
                .unwrap_or_default()
        };
        until("the engines have told their models", async || {
            (card(&mut rig.client(Http::One).await, "adapter").await["parent"] == "sim").then_some(())
        })
        .await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            // azrtydxb/Fastllm-proxy#18, BerriAI/litellm#10096: a gateway dropped what the engine says.
            let sim = card(&mut client, "sim").await;
            assert_eq!(
                (&sim["max_model_len"], &sim["root"], &sim["owned_by"]),
                (&json!(32_768), &json!("sim"), &json!("vllm"))
            );
            // azrtydxb/Fastllm-proxy#24: an alias has the length of the model behind it.
            assert_eq!(card(&mut client, "coder").await["max_model_len"], 32_768);
            // vllm-project/production-stack#331, vllm-project/vllm#11761: adapters have a parent, and are listed once each.
            let list = client.get("/v1/models").await.json();
            let ids: Vec<_> =
                list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap()).collect();
            assert_eq!(ids, ["adapter", "coder", "sim"], "production-stack#490: one list of all servers");
            assert_eq!(card(&mut client, "adapter").await["parent"], "sim");
            for id in ids {
                let one = client.get(&format!("/v1/models/{id}")).await;
                assert_eq!((one.status, one.json()), (200, card(&mut client, id).await));
            }
            // vllm-project/production-stack#1003: a gateway that never saw a server of the model says "not now", not "never".
            for path in ["/v1/models/asleep", "/v1/models/scaled-to-zero"] {
                assert_rejected(&client.get(path).await, 503, "no_endpoint");
            }
            for (path, model) in [(CHAT, "asleep"), (CHAT, "scaled-to-zero"), ("/v1/embeddings", "asleep")] {
                let body = short_chat().replace("\"sim\"", &format!("\"{model}\""));
                assert_rejected(&client.post(path, body).await, 503, "no_endpoint");
            }
            assert_rejected(
                &client.post(CHAT, short_chat().replace("\"sim\"", "\"gpt-4o\"")).await,
                404,
                "unknown_model",
            );
        }
        // gpustack/gpustack#6038: all servers of a model fail their health checks at once.
        let down: Vec<Value> = rig
            .engines()
            .enumerate()
            .map(|(i, engine)| {
                let role = if i < 2 { "prefill" } else { "decode" };
                json!({"address": engine.addr().to_string(), "role": role, "state": "down"})
            })
            .collect();
        rig.relist(&down).await;
        let mut client = rig.client(Http::One).await;
        for model in ["sim", "adapter", "coder"] {
            let body = short_chat().replace("\"sim\"", &format!("\"{model}\""));
            assert_rejected(&client.post(CHAT, body).await, 503, "no_endpoint");
        }
    });
}

#[test]
fn paths_are_understood_or_refused_with_a_reason() {
    run(async {
        let models = |list: &mut [Value]| list.iter_mut().for_each(|entry| entry["models"] = json!(["sim"]));
        let rig = Rig::builder().list(models).start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            // unslothai/unsloth#9876, Routstr/routstr-core#424: a list is asked for with a slash at its end. Agenta-AI/agenta#5487:
            // no redirect, which clients do not follow with a body.
            for path in ["/v1/models/", "/v1/models"] {
                let answer = client.get(path).await;
                assert_eq!((answer.status, answer.json()["data"][0]["id"].as_str()), (200, Some("sim")), "{path}");
            }
            for path in ["/v1/chat/completions/", "/v1/embeddings/"] {
                let answer = client
                    .post(path, r#"{"model":"sim","input":"a","messages":[{"role":"user","content":"a"}]}"#)
                    .await;
                assert_eq!(answer.status, 200, "{path}: {}", answer.text());
            }
            // dstackai/dstack#1546: a base address without `/v1`; modelplaneai/modelplane#327: one with it twice.
            for path in ["/chat/completions", "/v1/v1/chat/completions"] {
                assert_rejected(&client.post(path, short_chat()).await, 404, "unknown_path");
            }
            // kubernetes-sigs/gateway-api-inference-extension#2109: APIs beside completions, of a model and of none.
            for path in ["/v1/rerank", "/rerank", "/v1/embeddings", "/v1/score", "/pooling", "/tokenize"] {
                rig.engines().for_each(pd_sim::Handle::clear_requests);
                client.post(path, r#"{"model":"sim","input":"a","query":"a","documents":["b"]}"#).await;
                assert_eq!(recorded(&rig.decode).len(), 1, "{path}");
                assert!(recorded(&rig.prefill).is_empty(), "{path}");
                assert_rejected(&client.post(path, r#"{"model":"none","input":"a"}"#).await, 404, "unknown_model");
            }
        }
    });
}

/// Base64 of `bytes` random-looking bytes behind the begin of a file.
fn media(begin: &str, bytes: usize) -> String {
    let mut data = format!("{begin}{}", new_id("media").replace('-', "/"));
    data.extend(std::iter::repeat_n('A', bytes.saturating_sub(data.len())));
    data
}

#[test]
fn media_are_counted_by_what_they_show() {
    run(async {
        let rig = Rig::builder().control(&["--scrape-interval=0.1"]).start().await;
        until("the filter knows the engines' context length", async || {
            rig.client(Http::One).await.get("/v1/models").await.text().contains("131072").then_some(())
        })
        .await;
        let mut client = rig.client(Http::One).await;
        let (png, jpeg) = ("iVBORw0KGgoAAAANSUhEUgAAAjAAAAK8CAIAAAAA", "/9j/4AAQSkZJRgABAQAAAQABAAD/wAARCADIASwDASIA");
        let (gif, webp) = ("R0lGODlhLAHIAPAAAAAAAP///ywAAAAA", "UklGRiQAAABXRUJQVlA4IBgAAAAwAQCdASosAcgA");
        for (report, path, body) in [
            // A JPEG of 300 by 200 pixels in Anthropic's form.
            (
                "llm-d/llm-d-router#1508",
                "/v1/messages",
                format!(r#"{{"model":"sim","max_tokens":32,"messages":[{{"role":"user","content":[{{"type":"text","text":"What animal is in this image?"}},{{"type":"image","source":{{"type":"base64","media_type":"image/jpeg","data":"{}"}}}}]}}]}}"#, media(jpeg, 40_000)),
            ),
            // 1.9 MB were taken for 638,000 tokens, and refused as too many for the model.
            (
                "diegosouzapw/OmniRoute#8368",
                "/v1/responses",
                format!(r#"{{"model":"sim","max_output_tokens":1000,"input":[{{"role":"user","content":[{{"type":"input_image","image_url":"data:image/png;base64,{}"}}]}}]}}"#, media(png, 2_550_000)),
            ),
            (
                "NVIDIA/nvcf#1316",
                CHAT,
                format!(r#"{{"model":"sim","max_tokens":32,"messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"data:image/gif;base64,{}"}}}},{{"type":"image_url","image_url":{{"url":"data:image/webp;base64,{}"}}}}]}}]}}"#, media(gif, 400_000), media(webp, 400_000)),
            ),
            (
                "llm-d/llm-d-router#1018",
                CHAT,
                r#"{"model":"sim","max_tokens":32,"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"https://dummyimage.com/1280x720.png"}},{"type":"text","text":"What is in this image?"}]}]}"#.to_owned(),
            ),
        ] {
            let before = rig.metric("pd_prompt_tokens_total").await;
            let path = format!("{path}?{}", new_id("report"));
            let answer = client.post(&path, body).await;
            assert_eq!(answer.status, 200, "{report}: {}", answer.text());
            assert_ne!(rig.access_log_of(&path).await["reason"], "too_long", "{report}");
            let after = rig.until_metric("pd_prompt_tokens_total", |value| value > before).await;
            assert!((20.0..4_000.0).contains(&(after - before)), "{report}: {}", after - before);
        }
        // llm-d/llm-d-router#781: two pictures with the same text are two prompts.
        for picture in [media(png, 20_000), media(png, 20_000)] {
            let path = format!("{CHAT}?{}", new_id("report"));
            let body = format!(
                r#"{{"model":"sim","max_tokens":4,"messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{picture}"}}}}]}}]}}"#
            );
            assert_eq!(client.post(&path, body).await.status, 200);
            assert_eq!(rig.access_log_of(&path).await["reason"], "prefilled", "llm-d/llm-d-router#781");
        }
    });
}

#[test]
fn what_two_servers_cannot_give_comes_from_one() {
    run(async {
        let rig = shared().await;
        let mut client = rig.client(Http::One).await;
        for (report, path, body) in [
            ("vllm-project/vllm-ascend#13363", CHAT, long_chat().replace(":8}", ":8,\"prompt_logprobs\":1}")),
            (
                "vllm-project/vllm#50792",
                COMPLETIONS,
                completion(&new_prompt(), r#","max_tokens":8,"prompt_logprobs":0"#),
            ),
            (
                "vllm-project/vllm#27449",
                COMPLETIONS,
                completion(&new_prompt(), r#","max_tokens":8,"echo":true,"logprobs":5"#),
            ),
            (
                "EleutherAI/lm-evaluation-harness",
                COMPLETIONS,
                completion(&new_prompt(), r#","max_tokens":1,"temperature":0,"logprobs":1,"seed":1234,"echo":true"#),
            ),
        ] {
            let answer = client.post(path, body.clone()).await;
            assert_eq!(answer.status, 200, "{report}: {}", answer.text());
        }
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 0);
        // vllm-project/vllm#16705: a minimum above the prefill leg's one token is none of its business.
        let body = completion(&new_prompt(), r#","max_tokens":1000,"min_tokens":100"#);
        let answer = client.post(COMPLETIONS, body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 1);
    });
}

#[test]
fn what_the_engine_refuses_is_refused_in_its_words_and_computed_nowhere() {
    run(async {
        let rig = Rig::builder()
            .control(&["--scrape-interval=0.1"])
            .every_engine(|config| config.max_model_len = 4_096)
            .plugin(json!({"pools": {"default": {"split": {"mode": "always"}}}}))
            .start()
            .await;
        until("the filter knows the engines' context length", async || {
            rig.client(Http::One).await.get("/v1/models").await.text().contains("4096").then_some(())
        })
        .await;
        let mut client = rig.client(Http::One).await;
        for (report, path, members) in [
            ("vllm-project/vllm#5700", CHAT, r#""max_tokens":-160"#),
            ("vllm-project/vllm#4365", COMPLETIONS, r#""max_tokens":4,"min_tokens":5"#),
            ("experientiallabs/experiential#538", CHAT, r#""max_tokens":8000"#),
            ("waybarrios/vllm-mlx#376", "/v1/messages", r#""stream":true"#),
            ("a client that always asks for usage", CHAT, r#""max_tokens":4,"stream_options":{"include_usage":true}"#),
        ] {
            let prompt = new_prompt();
            let body = if path == COMPLETIONS {
                completion(&prompt, &format!(",{members}"))
            } else {
                chat(&[&prompt], &format!(",{members}"))
            };
            let answer = client.post(path, body.clone()).await;
            let own = Client::connect(rig.decode[0].addr(), Http::One).await.post(path, body).await;
            assert_eq!((answer.status, own.status), (400, 400), "{report}: {}", answer.text());
            assert_eq!(answer.text(), own.text(), "{report}");
        }
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 0);
    });
}

#[test]
fn what_agents_and_browsers_send_beside_plain_requests_is_served_or_refused_at_once() {
    const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd\x04\x00\x11\x00\x00{}";
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            // earendil-works/pi#3579, envoyproxy/gateway#3047: a name with `_`.
            let body = short_chat();
            let request = client.json(CHAT, body.clone(), &[("session_id", b"s"), ("conversation_id", b"c")]);
            assert_right(&client.send(request).await, &body);
            // BYK/loreai#1049: Codex compresses. QuantumNous/new-api#4913: and something on its way loses the header.
            let request = client.json("/v1/responses", ZSTD, &[("content-encoding", b"zstd")]);
            assert_rejected(&client.send(request).await, 415, "content_encoding");
            assert_rejected(&client.send(client.json("/v1/responses", ZSTD, &[])).await, 400, "invalid_json");
            let mut client = rig.client(http).await;
            // envoyproxy/ai-gateway#965: a browser asks first, without a body and without a model. The engine answers.
            for path in [CHAT, "/v1/models", "/v1/embeddings"] {
                rig.engines().for_each(pd_sim::Handle::clear_requests);
                let mut request = client.request("OPTIONS", path);
                for (name, value) in [
                    ("origin", "vscode-file://vscode-app"),
                    ("access-control-request-method", "POST"),
                    ("access-control-request-headers", "authorization,content-type"),
                ] {
                    request.headers_mut().insert(name, value.parse().unwrap());
                }
                let answer = client.send(request).await;
                assert_eq!((answer.reason(), recorded(&rig.decode).len()), (None, 1), "{path}: {}", answer.text());
            }
        }
    });
}
