use super::*;
use serde::Deserialize;

fn endpoint() -> Endpoint {
    Endpoint::new("10.0.0.1:8000".parse().unwrap(), Role::Prefill)
}

#[test]
fn endpoint_keys_are_the_fields_of_endpoint() {
    let full = Endpoint {
        rank: Some(1),
        pool: "p".into(),
        models: vec!["m".into()],
        models_closed: true,
        engine: Some(Engine::VllmNixl),
        group: Some("g".into()),
        revision: Some("r".into()),
        weight: 2.0,
        cache_tokens: Some(1),
        bootstrap_port: Some(1),
        min_prompt_tokens: Some(1),
        max_prompt_tokens: Some(1),
        state: State::Draining,
        ..endpoint()
    };
    let value = serde_json::to_value(full).unwrap();
    let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
    let mut known = ENDPOINT_KEYS.to_vec();
    keys.sort_unstable();
    known.sort_unstable();
    assert_eq!(keys, known);
}

#[test]
fn a_snapshot_survives_the_wire() {
    let snapshot = Snapshot {
        wire: WIRE_VERSION,
        epoch: "e".into(),
        version: 2,
        base: Some(1),
        endpoints: vec![Endpoint { models_pending: true, ..endpoint() }],
        removed: vec!["[::1]:80#3".into()],
        models: vec![ModelCard { max_model_len: Some(8), parent: Some("b".into()), ..ModelCard::new("m") }],
        stated: None,
    };
    assert_eq!(Snapshot::parse(&snapshot.to_json()), Ok(snapshot));
}

#[test]
fn an_older_peer_sends_no_cards_and_reads_a_list_that_has_some() {
    /// What a filter of the first release reads of a snapshot.
    #[derive(Deserialize)]
    struct First {
        wire: u32,
        endpoints: Vec<FirstEndpoint>,
    }
    #[derive(Deserialize)]
    struct FirstEndpoint {
        models: Vec<String>,
    }
    let now = Endpoint { models: vec!["m".into()], models_closed: true, models_pending: true, ..endpoint() };
    let snapshot = Snapshot {
        wire: WIRE_VERSION,
        epoch: "e".into(),
        version: 1,
        base: None,
        endpoints: vec![now],
        removed: vec![],
        models: vec![ModelCard::new("m")],
        stated: None,
    };
    let first: First = serde_json::from_slice(&snapshot.to_json()).unwrap();
    assert_eq!((first.wire, first.endpoints[0].models.as_slice()), (1, ["m".to_owned()].as_slice()));
    let old = br#"{"wire":1,"epoch":"e","version":1,"endpoints":[{"address":"10.0.0.1:8000","role":"prefill"}]}"#;
    let old = Snapshot::parse(old).unwrap();
    assert_eq!((old.models, old.endpoints), (vec![], vec![endpoint()]));
}

#[test]
fn of_two_servers_the_smaller_length_counts() {
    let card = |max_model_len| ModelCard { max_model_len, ..ModelCard::new("m") };
    for (one, two, both) in [(Some(8), Some(4), Some(4)), (None, Some(4), Some(4)), (Some(8), None, Some(8))] {
        assert_eq!(card(one).or(card(two)).max_model_len, both);
    }
    let (one, two) = (card(None), ModelCard { root: Some("r".into()), ..card(None) });
    assert_eq!(one.or(two).root.as_deref(), Some("r"));
}

#[test]
fn a_newer_peers_fields_are_ignored() {
    let text = br#"{"wire":1,"epoch":"e","version":1,"new":[],"endpoints":[{"address":"10.0.0.1:8000","role":"prefill","new":1}]}"#;
    assert_eq!(Snapshot::parse(text).unwrap().endpoints, vec![endpoint()]);
}

#[test]
fn bad_snapshots_are_refused_whole() {
    for (endpoints, why) in [
        (r#"{"address":"10.0.0.1:0","role":"prefill"}"#, "port"),
        (r#"{"address":"0.0.0.0:80","role":"prefill"}"#, "unspecified"),
        (r#"{"address":"host:80","role":"prefill"}"#, "socket address"),
        (r#"{"address":"[fe80::1%3]:80","role":"prefill"}"#, "zone"),
        (r#"{"address":"[fe80::1%eth0]:80","role":"prefill"}"#, "socket address"),
        (r#"{"address":"fe80::1:80","role":"prefill"}"#, "socket address"),
        (r#"{"address":"10.0.0.1:80","role":"both","weight":0}"#, "weight"),
        (r#"{"address":"10.0.0.1:80","role":"both","models":[""]}"#, "models"),
        (r#"{"address":"10.0.0.1:80","role":"both","min_prompt_tokens":2,"max_prompt_tokens":1}"#, "max_prompt"),
        (r#"{"address":"10.0.0.1:80","role":"boss"}"#, "boss"),
        (r#"{"address":"10.0.0.1:80","role":"both"},{"address":"10.0.0.1:80","role":"both"}"#, "twice"),
    ] {
        let text = format!(r#"{{"wire":1,"epoch":"e","version":1,"endpoints":[{endpoints}]}}"#);
        let error = Snapshot::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    assert_eq!(Snapshot::parse(br#"{"wire":2,"epoch":"e","version":1}"#), Err(WireError::Version(2)));
    assert!(Snapshot::parse(br#"{"wire":1,"epoch":"e","version":1,"removed":["x"]}"#).is_err());
    assert!(Snapshot::parse(br#"{"wire":1,"epoch":"e","version":1,"base":1}"#).is_err());
    for card in [r#"{"id":""}"#.to_owned(), "{}".into(), format!(r#"{{"id":"m","root":"{}"}}"#, "r".repeat(2_000))] {
        let text = format!(r#"{{"wire":1,"epoch":"e","version":1,"models":[{card}]}}"#);
        assert!(Snapshot::parse(text.as_bytes()).is_err(), "{text}");
    }
}
