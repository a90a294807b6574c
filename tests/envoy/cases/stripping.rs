//! Headers that name an endpoint or steer the filter, from clients that may not.

use pd_sim::{Config, Role};
use pd_support::body::CHAT;
use pd_support::client::{BOTH, Client};
use pd_support::headers;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::json;

use crate::support::{assert_right, long_chat, recorded, short_chat, sum};

/// All headers that name an endpoint, with this value, and one of them twice.
fn forge(value: &[u8]) -> Vec<(&'static str, &[u8])> {
    headers::all().chain(["X-Pd-Destination"]).map(|name| (name, value)).collect()
}

/// Requests of every kind that reaches an engine: method, path, body, phase.
fn every_kind() -> Vec<(&'static str, &'static str, String, Option<&'static str>)> {
    vec![
        ("POST", CHAT, long_chat(), None),
        ("POST", CHAT, short_chat(), None),
        ("POST", CHAT, long_chat(), Some("prefill")),
        ("POST", CHAT, long_chat(), Some("decode")),
        ("POST", "/invocations", long_chat(), None),
        ("POST", "/tokenize", r#"{"prompt":"a"}"#.to_owned(), None),
        ("GET", "/v1/models", String::new(), None),
        ("GET", "/version", String::new(), None),
        ("DELETE", "/v1/models", String::new(), None),
    ]
}

async fn send(
    client: &mut Client,
    (method, path, body, phase): &(&str, &str, String, Option<&str>),
    forged: &[(&str, &[u8])],
) -> u16 {
    let phase = phase.map(|phase| ("x-pd-phase", phase.as_bytes()));
    let headers: Vec<_> = forged.iter().copied().chain(phase).collect();
    let mut request = client.json(path, body.clone(), &headers);
    if body.is_empty() {
        let parts = request.into_parts().0;
        request = client.request(method, path);
        *request.headers_mut() = parts.headers;
    } else {
        *request.method_mut() = method.parse().unwrap();
    }
    client.send(request).await.status
}

#[test]
fn none_of_our_headers_reaches_an_engine_from_a_client() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for kind in every_kind() {
                let forged = forge(b"10.66.66.66:6666");
                let before = sum(rig.engines(), |stats| stats.requests);
                send(&mut client, &kind, &forged).await;
                assert!(sum(rig.engines(), |stats| stats.requests) > before, "{kind:?} reaches an engine");
            }
        }
        for request in recorded(rig.engines()) {
            for (name, value) in &request.headers {
                assert!(!value.as_bytes().starts_with(b"10.66."), "{name} of {} {}", request.method, request.path);
            }
            for name in headers::OTHERS {
                assert!(!request.headers.contains_key(name), "{name} of {} {}", request.method, request.path);
            }
        }
    });
}

#[test]
fn a_forged_destination_has_no_effect() {
    run(async {
        let rig = shared().await;
        let outside = pd_sim::start(Config::of(Role::Both)).await.unwrap();
        let forged = [rig.prefill[0].addr(), rig.decode[1].addr(), outside.addr()];
        for http in BOTH {
            let mut client = rig.client(http).await;
            for address in forged {
                let value = address.to_string();
                let headers = forge(value.as_bytes());
                for kind in every_kind() {
                    send(&mut client, &kind, &headers).await;
                }
                // The decode engine of a conversation does not depend on what its client says.
                let body = short_chat();
                let before: Vec<_> = rig.decode.iter().map(|engine| engine.stats().requests).collect();
                assert_right(&client.post(CHAT, body.clone()).await, &body);
                let honest: Vec<_> = rig.decode.iter().map(|engine| engine.stats().requests).collect();
                let request = client.json(CHAT, body.clone(), &headers);
                assert_right(&client.send(request).await, &body);
                let after: Vec<_> = rig.decode.iter().map(|engine| engine.stats().requests).collect();
                let went = |from: &[u64], to: &[u64]| from.iter().zip(to).position(|(from, to)| from != to);
                assert_eq!(went(&before, &honest), went(&honest, &after), "{value}");
            }
        }
        // Whatever names a destination to an engine is the filter's own choice: the engine itself comes first.
        for engine in rig.engines() {
            for request in engine.requests() {
                let named = request.header("x-pd-destination").expect("the route sets it").to_owned();
                assert!(named.starts_with(&engine.addr().to_string()), "{named} at {}", engine.addr());
            }
        }
        assert_eq!(outside.stats().connections, 0);
        // No request of the kinds above is a prefill engine's business, but for the prefill legs.
        let wrong = recorded(&rig.prefill).into_iter().filter(|request| request.path == CHAT);
        let legs = sum(&rig.prefill, |stats| stats.prefill_legs) + 6;
        assert_eq!(wrong.count() as u64, legs, "prefill legs and requests marked as prefill work");
    });
}

#[test]
fn error_answers_do_not_depend_on_forged_headers() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let value = rig.prefill[0].addr().to_string();
            let headers = forge(value.as_bytes());
            for (body, status) in [("{", 400), ("{}", 400), (r#"{"model":1}"#, 400), ("", 400)] {
                let request = client.json(CHAT, body, &headers);
                assert_eq!(client.send(request).await.status, status, "{body}");
            }
        }
        assert_eq!(sum(rig.engines(), |stats| stats.requests), 0);
    });
}

#[test]
fn the_listener_strips_the_destination_where_no_filter_does() {
    run(async {
        let without_filter = |config: &mut pd_support::config::Config| {
            let filters = config.http()["http_filters"].as_array_mut().unwrap();
            filters.retain(|filter| filter["name"] != "pd");
        };
        let rig = Rig::builder().plugin_text("").without_control().envoy(without_filter).start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for _ in 0..20 {
                let mut request = client.request("GET", "/v1/models");
                let forged = rig.prefill[0].addr().to_string().parse().unwrap();
                request.headers_mut().insert("x-pd-destination", forged);
                assert_eq!(client.send(request).await.status, 200);
            }
        }
        assert!(rig.prefill[0].stats().requests < 30, "the balancer spreads: {:#?}", rig.prefill[0].stats());
        assert!(recorded(rig.engines()).iter().all(|request| !request.headers.contains_key("x-pd-destination")));
    });
}

#[test]
fn headers_of_the_filter_are_counted_when_they_are_stripped() {
    run(async {
        let rig = Rig::builder().engines(1, 1).plugin(json!({"trusted_headers": []})).start().await;
        let mut client = rig.client(BOTH[0]).await;
        let body = long_chat();
        let request = client.json(CHAT, body.clone(), &[("x-pd-phase", b"decode"), ("target-pod", b"x")]);
        assert_right(&client.send(request).await, &body);
        assert_eq!(rig.prefill[0].stats().prefill_legs, 1, "an untrusted phase does not count");
        rig.until_metric("pd_headers_stripped_total", |value| value == 2.0).await;
    });
}
