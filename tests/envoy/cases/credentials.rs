//! Engines behind TLS and API keys: both legs and pd-control reach them, and no credential is shown.

use pd_sim::Handle;
use pd_support::body::CHAT;
use pd_support::certificate::Certificate;
use pd_support::client::{BOTH, Http};
use pd_support::config::Config;
use pd_support::wait::until;
use pd_tests::builder::Builder;
use pd_tests::rig::{Rig, run};
use pd_tests::tls::TlsFront;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{ask, assert_right, long_chat, recorded, short_chat, sum};

/// The engines' API key.
const KEY: &str = "s3cret-key";
/// Host that the engines' certificate is for.
const NAME: &str = "engines.internal";

/// Engines that require the key, and an Envoy that has it as a variable.
fn builder() -> Builder {
    Rig::builder().every_engine(|config| config.api_key = Some(KEY.to_owned())).envoy(|config| {
        vm_config(config)["environment_variables"] = json!({"key_values": {"ENGINE_KEY": KEY}});
    })
}

fn vm_config(config: &mut Config) -> &mut Value {
    &mut config.http_filters()[0]["typed_config"]["config"]["vm_config"]
}

/// A file with the key, for pd-control.
fn key_file() -> (TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("key");
    std::fs::write(&file, format!("{KEY}\n")).expect("written");
    let file = file.display().to_string();
    (directory, file)
}

/// Headers of legs from the variable.
fn of_variable(legs: &str) -> Value {
    json!({"headers": [{"name": "authorization", "env": "ENGINE_KEY", "prefix": "Bearer ", "legs": legs}]})
}

/// Sends long and short chats over every worker.
async fn talk(rig: &Rig) {
    for http in BOTH {
        for client in &mut rig.client_of_each_worker(http).await {
            for _ in 0..4 {
                ask(client, &long_chat()).await;
                ask(client, &short_chat()).await;
            }
        }
    }
}

/// Checks that every long prompt was split, and that nothing shows the key.
async fn check(rig: &Rig) {
    assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 16);
    assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), 16);
    assert_eq!(sum(&rig.decode, |stats| stats.local_prefills), 16, "the short ones");
    let status = rig.ask_control("/v1/status").await.expect("a status");
    for (place, text) in [("log", rig.envoy.log()), ("access log", rig.envoy.out()), ("status", status)] {
        assert!(!text.contains(KEY), "the {place} shows the key");
    }
    rig.until_idle().await;
}

fn engine_status(status: &Value, address: &str) -> Option<Value> {
    status["endpoints"].as_array()?.iter().find(|entry| entry["address"] == address).cloned()
}

/// The same with TLS in front of every engine of the list, by number, and an Envoy that trusts one CA.
fn behind_tls(
    builder: Builder,
    ca: &str,
    certificate_of: impl Fn(usize) -> Certificate + Send + 'static,
) -> (Builder, std::sync::mpsc::Receiver<TlsFront>) {
    let context = json!({
        "name": "tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": NAME,
            "common_tls_context": {"validation_context": {
                "trusted_ca": {"filename": ca},
                "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": NAME}}],
            }},
        },
    });
    let (send, fronts) = std::sync::mpsc::channel();
    let builder = builder
        .list(move |list| {
            for (number, entry) in list.iter_mut().enumerate() {
                let engine = entry["address"].as_str().and_then(|text| text.parse().ok()).expect("an address");
                let certificate = certificate_of(number);
                let started =
                    futures::executor::block_on(tokio::spawn(
                        async move { TlsFront::start(engine, &certificate).await },
                    ));
                let front = started.expect("a front");
                entry["address"] = front.address.to_string().into();
                send.send(front).expect("kept");
            }
        })
        .envoy(move |config| config.cluster("engines")["transport_socket"] = context);
    (builder, fronts)
}

/// The gateway adds the key to the client's request by its route, which prefill legs do not pass.
/// llm-d/llm-d-router#2671: what a router itself asked of an engine had no key.
#[test]
fn a_prefill_leg_has_the_key_that_the_route_gives_to_the_decode_leg() {
    run(async {
        let rig = builder()
            .plugin(json!({"legs": of_variable("prefill")}))
            .envoy(|config| {
                let header = json!({"header": {"key": "authorization", "value": format!("Bearer {KEY}")},
                    "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"});
                let routes = &mut config.http()["route_config"]["virtual_hosts"][0]["routes"];
                for route in routes.as_array_mut().expect("a list") {
                    route["request_headers_to_add"]
                        .as_array_mut()
                        .into_iter()
                        .for_each(|list| list.push(header.clone()));
                }
            })
            .start()
            .await;
        talk(&rig).await;
        check(&rig).await;
    });
}

/// One configuration for all legs, TLS to the engines, and pd-control that asks them the same way.
#[test]
fn engines_behind_tls_and_keys_serve_both_legs_and_answer_pd_control() {
    run(async {
        let certificates = tempfile::tempdir().expect("a directory");
        let certificate = Certificate::made(certificates.path(), &format!("DNS:{NAME}"));
        let (_directory, key) = key_file();
        let ca = certificate.certificate.display().to_string();
        let options = [
            "--scrape-interval=0.2",
            "--engine-tls",
            &format!("--engine-ca-file={ca}"),
            &format!("--engine-server-name={NAME}"),
            &format!("--engine-token-file={key}"),
        ];
        let builder = builder()
            .plugin(json!({"legs": {"authority": NAME, "headers": of_variable("all")["headers"]}}))
            .control(&options);
        let (builder, fronts) = behind_tls(builder, &ca, move |_| certificate.clone());
        let rig = builder.start().await;
        let fronts: Vec<TlsFront> = fronts.into_iter().collect();
        talk(&rig).await;
        check(&rig).await;
        let of_prefill = recorded(&rig.prefill);
        let legs = of_prefill.iter().filter(|request| request.path.starts_with("/v1/chat"));
        assert!(legs.map(|request| request.headers.get("host")).all(|host| host.is_some_and(|host| host == NAME)));
        for front in &fronts {
            let address = front.address.to_string();
            until(format_args!("pd-control knows the models of {address}"), async || {
                let status: Value = serde_json::from_str(&rig.ask_control("/v1/status").await?).ok()?;
                let engine = engine_status(&status, &address)?;
                let is_known = engine["models"] == json!(["sim"]) && engine["answers"] == true;
                (is_known && engine["problem"].is_null()).then_some(())
            })
            .await;
        }
    });
}

/// Without the key pd-control learns no models; it says so, and takes the engine for one that works.
/// vllm-project/production-stack#150: a router without the key knew no model, and answered 404.
#[test]
fn pd_control_says_that_engines_want_a_key() {
    run(async {
        let rig =
            builder().plugin(json!({"legs": of_variable("all")})).control(&["--scrape-interval=0.1"]).start().await;
        let engines: Vec<String> = rig.engines().map(Handle::addr).map(|address| address.to_string()).collect();
        let text = "/v1/models answers 401 Unauthorized: name the file with its API key by --engine-token-file";
        for address in &engines {
            until(format_args!("the status shows that {address} wants a key"), async || {
                let status: Value = serde_json::from_str(&rig.ask_control("/v1/status").await?).ok()?;
                let engine = engine_status(&status, address)?;
                (engine["problem"] == text && engine["answers"] == true && engine["state"] != "down").then_some(())
            })
            .await;
            let line = format!("pd_control_engine_refusing{{address=\"{address}\"}} 1.0");
            let metrics = rig.ask_control("/metrics").await.expect("metrics");
            assert!(metrics.lines().any(|known| known == line), "{metrics}");
        }
        let log = rig.control_log();
        assert_eq!(log.lines().filter(|line| line.contains(text)).count(), engines.len(), "once for each: {log}");
        let mut client = rig.client(Http::One).await;
        ask(&mut client, &long_chat()).await;
    });
}

/// A variable that Envoy does not have: the configuration is refused with its key, and shown nowhere else.
/// kcolemangt/llm-router#13: where the key was missing, the client's own went to the engines.
#[test]
fn a_key_that_envoy_does_not_pass_on_is_named() {
    run(async {
        let text = json!({"legs": of_variable("all"), "endpoints": []}).to_string();
        let rig = Rig::builder().plugin_text(&text).start().await;
        let answer = rig.client(Http::One).await.post("/v1/chat/completions", short_chat()).await;
        assert_eq!(answer.status, 503);
        let line = "legs.headers[0].env: ENGINE_KEY is not set, or Envoy does not pass it to the filter";
        assert!(rig.envoy.log().contains(line), "{}", rig.envoy.log());
    });
}

/// BerriAI/litellm#12090: the client's credential is the gateway's alone, and engines refuse requests that have it.
#[test]
fn a_credential_that_is_only_for_the_gateway_reaches_no_engine() {
    run(async {
        let legs = json!({"headers": [{"name": "authorization", "remove": true, "legs": "all"}]});
        let rig = Rig::builder().plugin(json!({"legs": legs})).start().await;
        for http in BOTH {
            for client in &mut rig.client_of_each_worker(http).await {
                for body in [long_chat(), short_chat()] {
                    let request = client.json(CHAT, body.clone(), &[("authorization", b"Bearer of-the-gateway")]);
                    assert_right(&client.send(request).await, &body);
                }
            }
        }
        let legs = recorded(rig.engines());
        assert_eq!(legs.iter().filter(|leg| leg.path.starts_with(CHAT)).count(), 12);
        assert!(legs.iter().all(|leg| leg.header("authorization").is_none()));
        rig.until_idle().await;
    });
}

/// Envoy cannot speak to it, nor can pd-control: no client notices, and the status names the reason.
#[test]
fn a_server_whose_certificate_is_anothers_is_left_out_and_said() {
    run(async {
        let directories = [tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory")];
        let [trusted, other] =
            directories.each_ref().map(|directory| Certificate::made(directory.path(), &format!("DNS:{NAME}")));
        let ca = trusted.certificate.display().to_string();
        let (file, name) = (format!("--engine-ca-file={ca}"), format!("--engine-server-name={NAME}"));
        let builder = Rig::builder().control(&["--scrape-interval=0.2", "--engine-tls", &file, &name]);
        // One prefill and one decode server.
        let certificate = move |number: usize| if number.is_multiple_of(2) { other.clone() } else { trusted.clone() };
        let (builder, fronts) = behind_tls(builder, &ca, certificate);
        let rig = builder.start().await;
        let fronts: Vec<TlsFront> = fronts.into_iter().collect();
        talk(&rig).await;
        for server in [&rig.prefill[0], &rig.decode[0]] {
            assert_eq!(server.stats().requests, 0);
        }
        assert_eq!(rig.prefill[1].stats().prefill_legs, 16);
        for (number, front) in fronts.iter().enumerate() {
            let address = front.address.to_string();
            until(format_args!("the status tells of {address}"), async || {
                let status: Value = serde_json::from_str(&rig.ask_control("/v1/status").await?).ok()?;
                let engine = engine_status(&status, &address)?;
                let is_said = engine["answers"] == false && engine.to_string().contains("ertificate");
                (if number.is_multiple_of(2) { is_said } else { engine["answers"] == true }).then_some(())
            })
            .await;
        }
        rig.until_idle().await;
    });
}
